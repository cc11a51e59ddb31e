"""An image of a text2image experiment: what it costs, untrained."""

from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from sana_lab.bench import bench
from sana_lab.bench.probes import PROMPT, Dtype, How, Probe
from sana_lab.bench.stages import components, evaluation_times
from sana_lab.config import experiments, specs
from sana_lab.config.specs import SpecError
from sana_lab.costs.flops import count_macs, count_pair_macs, parameters, whole_masks
from sana_lab.costs.timing import Call
from sana_lab.diffusion.sampling import Sampling
from sana_lab.diffusion.solvers import at
from sana_lab.systems.text2image import TextToImage
from sana_lab.types import Text


@final
class Image(Probe):
    """`experiment` with what `system` and `sampling` change of it, at `size` pixels; throughput is at `batch`.

    With `measured_steps` the denoiser's time is the median of so many evaluations, times their number.
    """

    inside = "tokenizing, text encoder, all denoising steps with guidance, decoding to floats"

    def __init__(
        self,
        experiment: str,
        system: dict[str, Any] | None = None,
        sampling: dict[str, Any] | None = None,
        size: int = 1024,
        batch: int = 1,
        dtype: Dtype = "float32",
        measured_steps: int | None = None,
    ) -> None:
        changes = {"system": system or {}, "sampling": sampling or {}}
        complete = experiments.complete(experiments.merge(experiments.compose(experiment), changes), experiment)
        if complete["system"]["name"] != "text2image":
            raise SpecError(
                f"an image needs a text2image system, but {experiment!r} trains {complete['system']['name']!r}"
            )
        self.experiment = {**complete, "system": drawn(complete["system"])}
        self.sampling = Sampling(**complete["sampling"])
        self.size, self.batch, self.dtype, self.measured_steps = size, batch, dtype, measured_steps

    def count(self) -> dict[str, float]:
        with torch.device("meta"):
            system: TextToImage = specs.build("system", self.experiment["system"])
            shape = system.latent_shape(self.size)
            x, t = torch.empty(1, *shape), torch.empty(1)
        with torch.no_grad(), whole_masks(system.text_encoder):
            text, texts = counted(partial(system.text_encoder, [PROMPT]))
            null, nulls = (
                counted(partial(system.text_encoder.without_instruction, [""]))
                if self.sampling.guidance != 1
                else (text, 0)
            )
        with torch.no_grad():
            denoise = self._denoise(system, x, seen(text), seen(null))
            image = texts + nulls + denoise + count_macs(lambda: system.autoencoder.decode(x))
        dit = parameters(system.dit)["total"]
        return {
            "params_b": parameters(nn.ModuleDict(components(system)))["total"] / 1e9,
            "dit_params_b": dit / 1e9,
            "dit_params_m": dit / 1e6,
            "tokens": shape[1] * shape[2] / system.dit.patch**2,
            "text_tokens": text.tokens.shape[1],
            "steps": self.sampling.steps,
            "evaluations": sum(evaluation_times(self.sampling, system.flow).values()),
            "tmacs": count_macs(lambda: system.dit(x, t, text)) / 1e12,
            "tmacs_pair": count_pair_macs(system.dit, shape, system.text_encoder.dim) / 1e12,
            "tmacs_image": image / 1e12,
        }

    def measure(self, how: How) -> dict[str, float]:
        system = bench.draw_untrained(self.experiment["system"], how.device, getattr(torch, self.dtype))
        timed: dict[str, Any] = {"repeats": how.repeats, "warmup": how.warmup, "measured_steps": self.measured_steps}
        record = bench.bench(system, self.sampling, self.size, self.batch, **timed)
        stages = record["stages"]
        return {
            "latency_s": record["latency_s"],
            "latency_s_low": stages["total"]["low_s"],
            "latency_s_high": stages["total"]["high_s"],
            **{key: record[key] for key in ("images_per_s", "images_per_s_low", "images_per_s_high")},
            "peak_gib": record["peak_mib"] / 1024,
            **{f"{name}_s": stages[name]["latency_s"] for name in ("text", "denoise", "decode")},
        }

    def _denoise(self, system: TextToImage, x: Tensor, text: Text, null: Text) -> int:
        """MACs of all steps, with what is prepared once, as the system itself takes them."""
        velocity, prepared = counted(lambda: system.velocity(text, null, self.sampling))
        times = evaluation_times(self.sampling, system.flow)
        return prepared + sum(n * count_macs(partial(velocity, x, at(t, x))) for t, n in times.items())


def counted(call: Call) -> tuple[Any, int]:
    """What a call gives, and its MACs."""
    out: list[Any] = []
    macs = count_macs(lambda: out.append(call()))
    return out[0], macs


def seen(text: Text) -> Text:
    """The text with its mask on the host, every token real: so it can be looked at."""
    return Text(text.tokens, torch.ones(text.mask.shape, dtype=torch.bool))


def drawn(system: dict[str, Any]) -> dict[str, Any]:
    """The spec of a system without its weights: a pretrained text encoder by its shape alone."""
    bare = bench.without_weights(system)
    encoder = bare["text_encoder"]
    return {**bare, "text_encoder": {**encoder, "random_init": True}} if encoder.get("model") else bare
