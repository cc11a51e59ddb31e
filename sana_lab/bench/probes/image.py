"""Probe of a text2image experiment: the cost of an image with its untrained system."""

from functools import partial
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from sana_lab.bench import bench
from sana_lab.bench.peer_stages import measure_call
from sana_lab.bench.probes import PROMPT, Dtype, Probe, ProbeSettings
from sana_lab.bench.stages import components, evaluation_times
from sana_lab.bench.untrained import check_cost, untrained_system, with_random_text_encoder
from sana_lab.checkpoints.build import build_on_meta
from sana_lab.config import experiments
from sana_lab.config.ranges import BatchSize, Evaluations, Pixels
from sana_lab.config.specs import SpecError
from sana_lab.costs.flops import count_macs, count_pair_macs, count_parameters, expanded_masks
from sana_lab.diffusion.guidance import reads_null
from sana_lab.diffusion.sampling import Sampling
from sana_lab.diffusion.solvers import at
from sana_lab.types import Text

if TYPE_CHECKING:
    from sana_lab.systems.text2image import TextToImage


@final
class Image(Probe):
    """An image of a text2image experiment, with changes to its system and sampling."""

    inside = "tokenizing, text encoder, all denoising steps with guidance, decoding to floats"

    def __init__(
        self,
        experiment: str,  # name of an experiment whose system is text2image
        system: dict[str, Any] | None = None,  # options merged over the experiment's `system`
        sampling: dict[str, Any] | None = None,  # options merged over its `sampling`
        size: Pixels = 1024,  # pixels a side
        batch: BatchSize = 1,  # images of the throughput and memory measurement; latency is at 1
        dtype: Dtype = "float32",  # of weights and activations
        # number of denoiser evaluations to time and extrapolate from; None times all steps
        measured_steps: Evaluations | None = None,
    ) -> None:
        changes = {"system": system or {}, "sampling": sampling or {}}
        complete = experiments.complete(experiments.merge(experiments.compose(experiment), changes), experiment)
        if complete["system"]["name"] != "text2image":
            raise SpecError(
                f"an image needs a text2image system, but {experiment!r} trains {complete['system']['name']!r}"
            )
        check_cost(complete)
        self.experiment = {**complete, "system": with_random_text_encoder(complete["system"])}
        self.sampling = Sampling(**complete["sampling"])
        self.size, self.batch, self.dtype, self.measured_steps = size, batch, dtype, measured_steps

    def count(self) -> dict[str, float]:
        system: TextToImage = build_on_meta("system", self.experiment["system"])
        with torch.device("meta"):
            shape = system.latent_shape(self.size)
            x, t = torch.empty(1, *shape), torch.empty(1)
        with torch.no_grad(), expanded_masks(system.text_encoder):
            text_macs, text = measure_call(count_macs, partial(system.text_encoder, [PROMPT]))
            null_macs, null = 0, text
            if reads_null(system.dit, self.sampling.guidance):
                null_macs, null = measure_call(count_macs, partial(system.text_encoder.without_instruction, [""]))
        with torch.no_grad():
            denoise_macs = self._denoise_macs(system, x, unmasked(text), unmasked(null))
            candidate_macs = denoise_macs + count_macs(lambda: system.autoencoder.decode(x))
            image_macs = text_macs + null_macs + self.sampling.best_of * candidate_macs
        dit = count_parameters(system.dit)["total"]
        return {
            "params_b": count_parameters(nn.ModuleDict(components(system)))["total"] / 1e9,
            "dit_params_b": dit / 1e9,
            "dit_params_m": dit / 1e6,
            "tokens": shape[1] * shape[2] / system.dit.patch**2,
            "text_tokens": text.tokens.shape[1],
            "steps": self.sampling.steps,
            "evaluations": sum(evaluation_times(self.sampling, system.flow).values()),
            "tmacs": count_macs(lambda: system.dit.without_guidance(x, t, text)) / 1e12,
            "tmacs_pair": count_pair_macs(system.dit.without_guidance, shape, system.text_encoder.dim) / 1e12,
            "tmacs_image": image_macs / 1e12,
        }

    def measure(self, settings: ProbeSettings) -> dict[str, float]:
        system = untrained_system(self.experiment["system"], settings.device, getattr(torch, self.dtype))
        options: Any = {"repeats": settings.repeats, "warmup": settings.warmup, "measured_steps": self.measured_steps}
        record = bench.bench(system, self.sampling, self.size, self.batch, **options)
        stages = record["stages"]
        return {
            "latency_s": record["latency_s"],
            "latency_s_low": stages["total"]["low_s"],
            "latency_s_high": stages["total"]["high_s"],
            **{key: record[key] for key in ("images_per_s", "images_per_s_low", "images_per_s_high")},
            "peak_gib": record["peak_mib"] / 1024,
            **{f"{name}_s": stages[name]["latency_s"] for name in ("text", "denoise", "decode")},
        }

    def _denoise_macs(self, system: "TextToImage", x: Tensor, text: Text, null: Text) -> int:
        """MACs of all steps, with captions and times prepared once, as in sampling."""
        prepared, velocity = measure_call(count_macs, lambda: system.velocity(text, null, self.sampling))
        times = evaluation_times(self.sampling, system.flow)
        return prepared + sum(n * count_macs(partial(velocity, x, at(t, x))) for t, n in times.items())


def unmasked(text: Text) -> Text:
    """The text with an all-true mask on the host, because the values of a meta mask cannot be read."""
    return Text(text.tokens, torch.ones(text.mask.shape, dtype=torch.bool))
