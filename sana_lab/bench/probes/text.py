"""Text encoders: what reading a batch of prompts costs."""

from functools import partial
from typing import Annotated, final

import torch

from sana_lab.bench.probes import PROMPT, Dtype, How, Probe
from sana_lab.bench.record import Seconds, weights_of
from sana_lab.checkpoints.build import build
from sana_lab.config import experiments
from sana_lab.config.specs import Spec, SpecError
from sana_lab.costs.flops import count_macs, parameters, whole_masks
from sana_lab.costs.live_memory import peak_memory
from sana_lab.costs.timing import Call, sample
from sana_lab.models.text import TextEncoder


@final
class TextProbe(Probe):
    """`batch` prompts at a time, each padded to the encoder's `max_tokens`, without an instruction: the sequences of
    300 tokens at a batch of 32 that the SANA paper's Table 13 states. A pretrained encoder is taken by its shape."""

    inside = "tokenizing a batch of prompts, padded to the longest length, and the encoder's forward"

    def __init__(self, encoder: Annotated[Spec, "text_encoder"], batch: int = 32, dtype: Dtype = "float32") -> None:
        given = {"name": encoder} if isinstance(encoder, str) else encoder
        if batch < 1:
            raise SpecError(f"batch is {batch}, expected at least 1")
        shape = {"random_init": True, "dtype": dtype} if given.get("model") else {}
        anew = {"cache": False} if given.get("name") == "llm" else {}  # what was read is to be read again
        self.encoder = experiments.resolve("text_encoder", {**given, **shape, **anew, "pad_to_max": True})
        self.batch, self.dtype = batch, dtype

    def count(self) -> dict[str, float]:
        encoder = self._encoder(torch.device("meta"))
        with torch.no_grad(), whole_masks(encoder):
            length = encoder([PROMPT]).tokens.shape[1]
            macs = count_macs(partial(encoder, [PROMPT]))
        return {"text_params_m": parameters(encoder)["total"] / 1e6, "text_tokens": length, "text_gmacs": macs / 1e9}

    @torch.no_grad()
    def measure(self, how: How) -> dict[str, float]:
        encoder = self._encoder(how.device)
        call: Call = partial(encoder, [PROMPT] * self.batch)
        seconds = Seconds.of(sample({"": call}, how.warmup, how.repeats, how.device)[""])
        memory = peak_memory(call, how.device, weights_of([encoder]))
        ends = {"text_s_low": seconds.low, "text_s_high": seconds.high}
        return {"text_s": seconds.median, **ends, "peak_gib": memory.peak_mib / 1024}

    def _encoder(self, device: torch.device) -> TextEncoder:
        with device:
            made: TextEncoder = build("text_encoder", self.encoder)
        return made.to(device, getattr(torch, self.dtype)).eval()
