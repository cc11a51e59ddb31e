"""Probe of a text encoder: the cost of encoding a batch of prompts."""

from functools import partial
from typing import Annotated, final

import torch

from sana_lab.bench.probes import PROMPT, Dtype, Probe, ProbeSettings
from sana_lab.bench.record import Latency
from sana_lab.config import experiments
from sana_lab.config.ranges import BatchSize
from sana_lab.config.specs import Spec, SpecError, build
from sana_lab.costs.flops import count_macs, count_parameters, expanded_masks
from sana_lab.costs.live_memory import module_tensors, peak_memory
from sana_lab.costs.timing import Call, collect_samples
from sana_lab.models.text import TextEncoder


@final
class TextProbe(Probe):
    """Encoding of prompts padded to the encoder's `max_tokens`, without an instruction, as in the SANA paper's Table 13
    (300 tokens, batch 32). A pretrained encoder has random weights of the published size."""

    inside = "tokenizing a batch of prompts, padded to the longest length, and the encoder's forward"

    def __init__(
        self,
        encoder: Annotated[Spec, "text_encoder"],  # the text encoder
        batch: BatchSize = 32,  # prompts encoded at a time, at least 1
        dtype: Dtype = "float32",  # of weights and activations
    ) -> None:
        spec = {"name": encoder} if isinstance(encoder, str) else encoder
        if batch < 1:
            raise SpecError(f"batch is {batch}, expected at least 1")
        weights = {"random_init": True, "dtype": dtype} if spec.get("model") else {}
        uncached = {"cache": False} if spec.get("name") == "llm" else {}  # so that every call encodes its prompts
        self.encoder = experiments.resolve("text_encoder", {**spec, **weights, **uncached, "pad_to_max": True})
        self.batch, self.dtype = batch, dtype

    def count(self) -> dict[str, float]:
        encoder = self._encoder(torch.device("meta"))
        with torch.no_grad(), expanded_masks(encoder):
            length = encoder([PROMPT]).tokens.shape[1]
            macs = count_macs(partial(encoder, [PROMPT]))
        return {
            "text_params_m": count_parameters(encoder)["total"] / 1e6,
            "text_tokens": length,
            "text_gmacs": macs / 1e9,
        }

    @torch.no_grad()
    def measure(self, settings: ProbeSettings) -> dict[str, float]:
        encoder = self._encoder(settings.device)
        call: Call = partial(encoder, [PROMPT] * self.batch)
        samples = collect_samples({"": call}, settings.warmup, settings.repeats, settings.device)[""]
        latency = Latency.of(samples)
        memory = peak_memory(call, settings.device, module_tensors([encoder]))
        interval = {"text_s_low": latency.low, "text_s_high": latency.high}
        return {"text_s": latency.median, **interval, "peak_gib": memory.peak_mib / 1024}

    def _encoder(self, device: torch.device) -> TextEncoder:
        with device:
            encoder: TextEncoder = build("text_encoder", self.encoder)
        return encoder.to(device, getattr(torch, self.dtype)).eval()
