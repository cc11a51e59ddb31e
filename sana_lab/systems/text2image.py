"""The full system: prompts to images through a text encoder, a DiT and an autoencoder."""

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from sana_lab.checkpoints.build import build
from sana_lab.config.experiments import image_size
from sana_lab.config.schema import Config
from sana_lab.config.specs import AsBefore, Spec
from sana_lab.costs.out_of_memory import describe_out_of_memory
from sana_lab.diffusion import Process
from sana_lab.diffusion.guidance import Bind, guided
from sana_lab.diffusion.sampling import Sampling, check_finite, check_request, generator, noise_like
from sana_lab.models.autoencoders import Autoencoder
from sana_lab.models.dit import Dit
from sana_lab.models.layers import dtype_of
from sana_lab.models.text import TextEncoder
from sana_lab.systems import Evaluator, System
from sana_lab.systems.cuda_graphs import Graphs
from sana_lab.systems.ema import Average
from sana_lab.systems.losses import TRAIN, Objective, check_draws, draws_losses, process, validate
from sana_lab.systems.offload import Offload
from sana_lab.systems.quantize import quantize, quantized
from sana_lab.types import Batch, Text, Velocity


class TextToImage(System):
    """Flow matching on the latents of a frozen autoencoder; the text encoder is trained when it begins from scratch.

    Loss: mean squared error of the velocity. A share `text_dropout` of captions becomes the empty prompt, for guidance.
    Noise and times of a training step depend on (seed, step, rank) alone, so a resumed run repeats an unbroken one.
    """

    offload: Offload | None = None  # where networks work, if they do not stay there

    def __init__(
        self,
        dit: Annotated[Spec, "dit"] = "sana",
        autoencoder: Annotated[Spec, "autoencoder"] = "vae",
        text_encoder: Annotated[Spec, "text_encoder"] = "llm",
        optimizer: Annotated[Spec, "optimizer"] = "adamw",
        shift: float = 3.0,
        start: float = 1.0,
        text_dropout: float = 0.1,
        train_text: bool | None = None,
        warmup: int = 100,
        decay: float = 0.0,
        ema: float = 0.999,
        seed: int = 0,
        objective: Annotated[Objective, AsBefore("flow")] = "flow",
        model_time: Annotated[Literal["exact", "released"], AsBefore("exact")] = "exact",
        draws: Annotated[int, AsBefore(1)] = 1,
    ) -> None:
        """`train_text` None trains a text encoder that has no pretrained weights; `decay` is the last share of training
        in which the learning rate falls linearly to zero; `draws` is how many noises and times a step takes for each
        picture, whose text it reads once."""
        super().__init__()
        check_draws(draws)
        self.flow: Process = process(objective, shift, start, model_time)
        self.autoencoder: Autoencoder = build("autoencoder", autoencoder).requires_grad_(False).eval()
        self.text_encoder: TextEncoder = build("text_encoder", text_encoder)
        self.text_trains = not self.text_encoder.pretrained if train_text is None else train_text
        self.text_encoder.requires_grad_(self.text_trains)
        self.frozen = ("autoencoder",) if self.text_trains else ("autoencoder", "text_encoder")
        self.dit: Dit = build("dit", dit, channels=self.autoencoder.channels, text_dim=self.text_encoder.dim)
        self.average = Average(self, ema)
        self.graphs = Graphs()

    def train(self, mode: bool = True) -> "TextToImage":
        """Frozen parts stay in evaluation mode."""
        super().train(mode)
        self.autoencoder.eval()
        self.text_encoder.train(mode and self.text_trains)
        return self

    # Training

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        random = generator(self.settings.seed, TRAIN, batch_idx, self.global_rank)
        latents = self.latents_of(batch)
        dropped = torch.rand(len(latents), generator=random) < self.settings.text_dropout
        text = self.encode_text(batch.prompts, dropped.tolist())
        loss = draws_losses(self.dit, self.flow, latents, text, random, self.settings.draws).mean()
        self.log("train/loss", loss.detach(), batch_size=len(latents))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss of the averaged weights on fixed noise and times."""
        latents = self.latents_of(batch)
        with self.averaged():
            validate(self, self.dit, self.flow, latents, self.encode_text(batch.prompts), self.settings.seed, batch_idx)

    @torch.no_grad()
    def latents_of(self, batch: Batch) -> Tensor:
        if batch.latents is not None:
            return batch.latents
        assert batch.images is not None
        return self.autoencoder.encode(batch.images)

    def encode_text(self, prompts: Sequence[str], dropped: Sequence[bool] | None = None) -> Text:
        """Features of prompts, or of the null condition where they are dropped."""
        with nullcontext() if self.text_trains else torch.no_grad():
            return self.text_encoder(prompts) if dropped is None else self.text_encoder.with_dropout(prompts, dropped)

    def preview(self, experiment: Config) -> Tensor | None:
        """The experiment's prompts at the size of its data, on the same noise each time."""
        size, sampling = image_size(experiment["data"]), Sampling(**experiment["sampling"])
        with self.averaged():
            return self.sample(experiment["prompts"], size=size, sampling=sampling)

    def evaluate(self, evaluator: Evaluator) -> Config:
        """All measures of generated images."""
        self.settle(Sampling(**self.experiment["sampling"]), evaluator.device)
        return evaluator.generated(self.sample)

    # Sampling

    def settle(self, sampling: Sampling, device: torch.device | str) -> "TextToImage":
        """Ready to draw so on a device: the denoiser quantised in place, and all networks there, or to visit it."""
        quantize(self.dit, sampling.quantize)
        self.offload = Offload(device) if sampling.offload else None
        return self.to("cpu" if sampling.offload else device)

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        *,
        size: int | tuple[int, int],
        sampling: Sampling,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        negative: str | Sequence[str] = "",
        batch: int = 64,
    ) -> Tensor:
        """Images (B, 3, H, W) uint8 of `size` pixels. The noise of image i depends on (seed, indices[i]) alone.

        `negative` is what guidance leads away from: the empty prompt, one text, or one for each prompt. Latents and
        solver are in float32, whatever dtypes the parts have. Where `settle` has not quantised the denoiser, a copy is
        for this call. `Overflow` where what was drawn is not finite, `OutOfMemory` where it does not fit.
        """
        negatives = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
        indices = list(range(len(prompts)) if indices is None else indices)
        check_request(prompts, negatives, indices)
        shape = self.latent_shape(size)
        noise = noise_like(shape, seed, indices).to(self.offload.device if self.offload else self.device)
        dit = quantized(self.dit, sampling.quantize)
        self._bind(sampling, dit)  # what cannot be is said before any work
        made = [
            self._draw(prompts[i : i + batch], negatives[i : i + batch], noise[i : i + batch], sampling, dit)
            for i in range(0, len(prompts), batch)
        ]
        return torch.cat(made)

    def latent_shape(self, size: int | tuple[int, int]) -> tuple[int, int, int]:
        """(channels, h, w) of images of `size`; ValueError where the autoencoder and the patches do not divide it."""
        height, width = (size, size) if isinstance(size, int) else size
        unit = self.autoencoder.downsample * self.dit.patch
        if min(height, width) < 1 or height % unit or width % unit:
            near = " x ".join(str(max(1, round(s / unit)) * unit) for s in (height, width))
            raise ValueError(
                f"image size {height} x {width} is not a multiple of {unit} "
                f"(autoencoder {self.autoencoder.downsample} x patch {self.dit.patch}); the nearest is {near}"
            )
        return self.autoencoder.channels, height // self.autoencoder.downsample, width // self.autoencoder.downsample

    def _draw(
        self, prompts: Sequence[str], negatives: Sequence[str], noise: Tensor, sampling: Sampling, dit: Dit
    ) -> Tensor:
        with self.working(self.text_encoder, f"reading {len(prompts)} prompts"):
            text = self.text_encoder(prompts)
            null = (
                text
                if sampling.guidance == 1
                else self.text_encoder.negative([*{*negatives}] if len({*negatives}) == 1 else negatives, text)
            )
        with self.working(dit, f"denoising {self._named(noise)}"):
            velocity = self.velocity(text, null, sampling, dit)
            latents = check_finite(sampling.run(velocity, noise, self.flow), dtype_of(dit))
        with self.working(self.autoencoder, f"decoding {self._named(noise)}"):
            return self.pixels(latents)

    def velocity(self, text: Text, null: Text, how: Sampling, dit: Dit | None = None) -> Velocity:
        """The guided velocity of one sampling run with the system's denoiser, or with another one."""
        dit = self.dit if dit is None else dit
        times = how.network_times(self.flow)
        return guided(dit, text, null, how.guidance, how.guidance_interval, times, self._bind(how, dit))

    def _bind(self, how: Sampling, dit: Dit) -> Bind:
        """Steps are replayed where weights stay where they are."""
        moves = self.offload is not None or dit is not self.dit
        if moves and how.graph == "always":
            raise ValueError(
                "sampling graph is 'always', which needs weights that stay where they are; expected offload: false, "
                "and a denoiser that is quantised already (`settle`)"
            )
        self.graphs.check(dit, how.graph)
        return partial(self.graphs.velocity, "never" if moves else how.graph)

    def pixels(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> images (B, 3, H, W) uint8."""
        images = self.autoencoder.decode(latents.to(dtype_of(self.autoencoder)))
        return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)

    def working(self, network: nn.Module, what: str) -> ExitStack:
        """A network where it works, meanwhile; OutOfMemory says what it was doing."""
        stack = ExitStack()
        stack.enter_context(describe_out_of_memory(what))
        if self.offload:
            stack.enter_context(self.offload.visit(network))
        return stack

    def _named(self, latents: Tensor) -> str:
        count, _, *sides = latents.shape
        size = " x ".join(str(side * self.autoencoder.downsample) for side in sides)
        return f"{count} images of {size} pixels" if count > 1 else f"an image of {size} pixels"
