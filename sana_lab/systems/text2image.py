"""The full system: text encoder, DiT and autoencoder, trained on captioned images and sampled from prompts."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from sana_lab.checkpoints.build import build
from sana_lab.config import specs
from sana_lab.config.experiments import image_size
from sana_lab.config.ranges import Decay, Positive, PositiveShare, Seed, Share, Steps, Width
from sana_lab.config.schema import Config
from sana_lab.config.specs import AsBefore, Spec, SpecError
from sana_lab.costs.allocator import return_freed_memory
from sana_lab.costs.out_of_memory import describe_out_of_memory
from sana_lab.diffusion import Prediction, Process, Weighting, guidance
from sana_lab.diffusion.guidance import Bind, guided, reads_null
from sana_lab.diffusion.regional import Encoded, RegionPlan, plan, regional
from sana_lab.diffusion.regions import Regions
from sana_lab.diffusion.sampling import NoiseStreams, Sampling, check_finite, check_request, generator
from sana_lab.diffusion.step_cache import CachedSteps
from sana_lab.models.autoencoders import Autoencoder
from sana_lab.models.dit import Dit
from sana_lab.models.layers import dtype_of
from sana_lab.models.text import TextEncoder
from sana_lab.ops.transfer import to_device
from sana_lab.systems import Evaluator, System, best_of
from sana_lab.systems.cuda_graphs import Graphs
from sana_lab.systems.ema import Average
from sana_lab.systems.losses import TRAIN, Objective, check_draws, process, validate
from sana_lab.systems.low_bit_layers import largest_inputs
from sana_lab.systems.method_steps import Methods, build_methods, training_loss
from sana_lab.systems.offload import Offload
from sana_lab.systems.optim import Groups
from sana_lab.systems.quantize import layers, needs_activations, quantize, quantized
from sana_lab.systems.sharding import is_sharded
from sana_lab.types import Batch, Part, Text, Velocity

CALIBRATION_PROMPTS = ("a photo of a red apple on a wooden table", "a blue bird", "a street in the rain at night")
CALIBRATION_STEPS = 8
CALIBRATION_SEED = 1234
"""Of the sampling that finds the range of activations before they are rounded to 4 bits."""


class TextToImage(System):
    """Flow matching on the latents of a frozen autoencoder; a text encoder without pretrained weights is trained too.

    The loss is the mean squared error of the velocity, or of the noise with `objective: ddpm`.
    """

    auxiliary = ("methods",)
    offload: Offload | None = None  # copies each network to the device only while it runs; None disables offload

    def __init__(
        self,
        dit: Annotated[Spec, "dit"] = "sana",  # denoiser
        autoencoder: Annotated[Spec, "autoencoder"] = "vae",  # frozen; encodes images to latents and decodes them
        text_encoder: Annotated[Spec, "text_encoder"] = "llm",  # features of the captions
        optimizer: Annotated[Spec, "optimizer"] = "adamw",  # optimiser and its options, such as the learning rate
        shift: Positive = 3.0,  # shifts times towards noise, in training and sampling; above 0, 1 is no shift
        start: PositiveShare = 1.0,  # first sampling time before the shift, in (0, 1]
        text_dropout: Share = 0.1,  # share of captions replaced by the empty prompt, for guidance
        train_text: bool | None = None,  # train the text encoder; null: only if it has no pretrained weights
        warmup: Steps = 100,  # steps of linear warm-up of the learning rate
        decay: Share = 0.0,  # final share of training with linear decay of the learning rate to 0
        ema: Decay = 0.999,  # decay of the average of weights, in [0, 1); the average is what is sampled and kept
        seed: Seed = 0,  # seed of noise, times and dropped captions
        objective: Annotated[Objective, AsBefore("flow")] = "flow",  # predict the flow's velocity, or the noise (ddpm)
        # Times given to a flow's network: exact, or rounded down to thousandths as in the released models.
        model_time: Annotated[Literal["exact", "released"], AsBefore("exact")] = "exact",
        draws: Annotated[Width, AsBefore(1)] = 1,  # noises and times per image and step; text is encoded once
        # Output of a flow's network: the velocity, or the clean latents (x-prediction); the loss is on the velocity.
        prediction: Annotated[Prediction, AsBefore("velocity")] = "velocity",
        # Weight of a flow's loss by time: 1, SD3's cosmap, or min-SNR with 5; validation is not weighted.
        weighting: Annotated[Weighting, AsBefore("uniform")] = "uniform",
        # Training methods beside the objective: one spec or a list of specs; they are in no exported weights.
        method: Annotated[Spec | list[Spec] | None, "method", AsBefore(None)] = None,
        # Options of the optimiser for parameters by pattern of their names: {"*norm*": {weight_decay: 0}}; the first
        # pattern that matches counts.
        groups: Annotated[Groups, AsBefore({})] = {},  # noqa: B006  (never changed)
        # Modules that alone train, beside a DiT of a parent or with weights; weights files hold them merged into it.
        adapter: Annotated[Spec | None, "adapter", AsBefore(None)] = None,
        # Train the DiT; false: it keeps the weights of its spec or of a parent, and the text encoder alone trains.
        train_dit: Annotated[bool, AsBefore(True)] = True,
    ) -> None:
        super().__init__()
        check_draws(draws)
        self.flow: Process = process(objective, shift, start, model_time, prediction, weighting)
        self.autoencoder: Autoencoder = build("autoencoder", autoencoder).requires_grad_(False).eval()
        self.text_encoder: TextEncoder = build("text_encoder", text_encoder)
        self.text_trains = not self.text_encoder.pretrained if train_text is None else train_text
        self.text_encoder.requires_grad_(self.text_trains)
        inner = (f"text_encoder.{name}" for name in self.text_encoder.frozen)
        self.frozen = ("autoencoder", *(inner if self.text_trains else ("text_encoder",)))
        self.dit: Dit = build("dit", dit, channels=self.autoencoder.channels, text_dim=self.text_encoder.dim)
        if not train_dit:
            check_text_trains(self.text_trains, adapter)
            self.dit.requires_grad_(False)
        self.methods = Methods(method)
        self.adapter = None if adapter is None else specs.build("adapter", adapter)
        self.average = Average(self, ema)
        self.graphs = Graphs()

    def adapt(self) -> None:
        super().adapt()
        self.text_trains = False  # frozen, and saved as before

    def train(self, mode: bool = True) -> "TextToImage":
        """Set the mode of trainable parts; frozen parts stay in evaluation mode."""
        super().train(mode)
        self.autoencoder.eval()
        self.text_encoder.train(mode and self.text_trains)
        return self

    # Training

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        random, part = generator(self.settings.seed, TRAIN, batch_idx, 0), Part.of_trainer(self._trainer)
        latents = self.latents_of(batch)
        dropped = part.draw(lambda n: torch.rand(n, generator=random), len(latents)) < self.settings.text_dropout
        text = self.encode_text(batch.prompts, dropped.tolist())
        return training_loss(self, batch, latents, text, random, part, batch_idx, dropped.tolist())

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss of the averaged weights on fixed noise and times."""
        latents = self.latents_of(batch)
        with self.averaged():
            validate(self, self.dit, self.flow, latents, self.encode_text(batch.prompts), self.settings.seed, batch_idx)

    @torch.no_grad()
    def latents_of(self, batch: Batch) -> Tensor:
        """The batch's latents (B, C, h, w), encoded from its images if necessary."""
        if batch.latents is not None:
            return batch.latents
        assert batch.images is not None
        return self.autoencoder.encode(batch.images)

    @torch.no_grad()
    def images_of(self, batch: Batch, latents: Tensor) -> Tensor:
        """The batch's images (B, 3, H, W) in [-1, 1], decoded from its latents if it has none."""
        return self.autoencoder.decode(latents).clamp(-1, 1) if batch.images is None else batch.images

    def null_of(self, batch: Batch, text: Text) -> Text:
        """Features of the empty prompt, the null condition of guidance for `text`."""
        with torch.no_grad():
            return self.text_encoder.negative([""], text)

    def build_methods(
        self,
        size: int,
        batch: int | None = None,
        images: bool = True,
        device: torch.device | None = None,
        buckets: Sequence[tuple[int, int]] = (),
    ) -> None:
        build_methods(self, self.autoencoder.downsample, size, batch, True, device, buckets)

    def encode_text(self, prompts: Sequence[str], dropped: Sequence[bool] | None = None) -> Text:
        """Features of prompts; dropped prompts get the features of the empty prompt."""
        with nullcontext() if self.text_trains else torch.no_grad():
            return self.text_encoder(prompts) if dropped is None else self.text_encoder.with_dropout(prompts, dropped)

    def preview(self, experiment: Config) -> Tensor | None:
        """Images of the experiment's prompts at the size of its data, from the same noise each time."""
        size, sampling = image_size(experiment["data"]), Sampling(**experiment["sampling"])
        with self.averaged():
            return self.sample(experiment["prompts"], size=size, sampling=sampling)

    def evaluate(self, evaluator: Evaluator) -> Config:
        """All measures of generated images; with `eval.reconstruct` those of the autoencoder's reconstructions too."""
        self.prepare_for_sampling(Sampling(**self.experiment["sampling"]), evaluator.device)
        report = self.evaluate_in_training(evaluator)
        if not evaluator.options["reconstruct"]:
            return report
        return report | evaluator.reconstructed(self.autoencoder.to(evaluator.device))

    def evaluate_in_training(self, evaluator: Evaluator) -> Config:
        """The same by the networks as they are, neither moved nor quantised in place."""
        return evaluator.generated(self.sample)

    # Sampling

    def check_sampling(self, experiment: Config) -> None:
        sampling = Sampling(**experiment["sampling"])
        if sampling.perturbation is not None and self.dit.width is not None:
            sampling.perturbation.check(self.dit)
        if sampling.regions is not None:
            latent = self.latent_shape(image_size(experiment["data"]))
            self.plan(experiment["prompts"] or [""], sampling, latent[1:])
        if sampling.best_by is not None:
            best_of.check(sampling.best_by, experiment["prompts"])

    def prepare_for_sampling(self, sampling: Sampling, device: torch.device | str) -> "TextToImage":
        """Quantise the denoiser in place, and move the networks to the device or set up offload; the system itself."""
        quantize(self.dit, sampling.precision, self._activations(sampling))
        self.offload = Offload(device) if sampling.offload else None
        return self.to("cpu" if sampling.offload else device)

    def _activations(self, sampling: Sampling) -> dict[str, Tensor] | None:
        """Largest inputs by channel of the layers to quantise, over a short sampling of the experiment's prompts; None
        if the precision needs none."""
        if not needs_activations(self.dit, sampling.precision):
            return None
        experiment = self.experiment or {}
        prompts = experiment.get("prompts") or CALIBRATION_PROMPTS
        size = image_size(experiment["data"]) if experiment else self.dit.spec["base"] * self.autoencoder.downsample
        exact = Sampling("euler", CALIBRATION_STEPS, sampling.guidance, graph="never")
        chosen = {name: self.dit.get_submodule(name) for name in layers(self.dit, sampling.quantize)}
        return largest_inputs(chosen, lambda: self.sample(prompts, size=size, sampling=exact, seed=CALIBRATION_SEED))

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        *,
        size: int | tuple[int, int],
        sampling: Sampling,
        seed: Seed = 0,
        indices: Sequence[int] | None = None,
        negative: str | Sequence[str] = "",
        batch: int = 64,
    ) -> Tensor:
        """Images (B, 3, H, W) uint8 of `size` pixels. The noise of image i depends only on (seed, indices[i]).

        `negative` is the negative prompt of guidance, one for all images or one per image. Latents and solver are in
        float32 for all dtypes of the parts. A denoiser that `prepare_for_sampling` has not quantised is quantised as a
        copy for this call. Overflow if latents are not finite; OutOfMemory naming the stage.
        """
        how: dict[str, Any] = {"size": size, "sampling": sampling, "seed": seed, "indices": indices}
        return torch.cat([*self.sample_batches(prompts, **how, negative=negative, batch=batch)])

    @torch.no_grad()
    def sample_batches(
        self,
        prompts: Sequence[str],
        *,
        size: int | tuple[int, int],
        sampling: Sampling,
        seed: Seed = 0,
        indices: Sequence[int] | None = None,
        negative: str | Sequence[str] = "",
        batch: int = 64,
    ) -> Iterator[Tensor]:
        """The images of `sample` in its order, (b, 3, H, W) at a time as each batch is done. What `sample` refuses is
        refused before the first."""
        negatives = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
        indices = list(range(len(prompts)) if indices is None else indices)
        check_request(prompts, negatives, indices)
        shape = self.latent_shape(size)
        if self.autoencoder.tile is not None and self.device.type == "cpu":
            return_freed_memory()
        dit = quantized(self.dit, sampling.precision, self._activations(sampling))
        guidance.check(dit, sampling.guidance_interval)
        self._bind(sampling, dit)  # raises before any work
        self.plan(prompts, sampling, shape[1:])
        if sampling.best_by is not None:
            best_of.check(sampling.best_by, prompts)
        together = max(1, batch // sampling.best_of)
        parts = [slice(i, i + together) for i in range(0, len(prompts), together)]
        return (
            self._sample_best(prompts[p], negatives[p], shape, seed, indices[p], sampling, dit, batch) for p in parts
        )

    @torch.no_grad()
    def _sample_best(
        self,
        prompts: Sequence[str],
        negatives: Sequence[str],
        shape: tuple[int, int, int],
        seed: Seed,
        indices: Sequence[int],
        sampling: Sampling,
        dit: Dit,
        batch: int,
    ) -> Tensor:
        """One image of each prompt: the best of `sampling.best_of` candidates, sampled `batch` or fewer at a time."""
        if sampling.best_by is None:
            return self._sample_batch(prompts, negatives, NoiseStreams(shape, seed, indices), sampling, dit)
        choice, together = best_of.Choice(prompts, sampling.best_by), max(1, batch // len(prompts))
        for first in range(0, sampling.best_of, together):
            count = min(together, sampling.best_of - first)
            texts, others = (best_of.repeated(t, count) for t in (prompts, negatives))
            streams = NoiseStreams(shape, seed, best_of.candidates(indices, count, first))
            choice.add(self._sample_batch(texts, others, streams, sampling, dit))
        return choice.images

    def plan(self, prompts: Sequence[str], sampling: Sampling, latent: Sequence[int]) -> RegionPlan | None:
        """The regions of these prompts' pictures of (h, w) latents; None if there are none. SpecError for regions that
        do not fit."""
        if sampling.regions is None:
            return None
        patch = self.dit.patch
        return plan(specs.build("regions", sampling.regions), prompts, (latent[0] // patch, latent[1] // patch))

    def encoded_regions(self, prompts: Sequence[str], sampling: Sampling, latent: Sequence[int]) -> Encoded | None:
        """The same with the features of the regions' prompts."""
        chosen = self.plan(prompts, sampling, latent)
        return None if chosen is None else Encoded(chosen, self.text_encoder(chosen.prompts))

    def latent_shape(self, size: int | tuple[int, int]) -> tuple[int, int, int]:
        """(channels, h, w) of images of `size`; ValueError if it is not a multiple of downsampling x patch."""
        height, width = (size, size) if isinstance(size, int) else size
        unit = self.autoencoder.downsample * self.dit.patch
        if min(height, width) < 1 or height % unit or width % unit:
            nearest = " x ".join(str(max(1, round(s / unit)) * unit) for s in (height, width))
            raise ValueError(
                f"image size {height} x {width} is not a multiple of {unit} "
                f"(autoencoder {self.autoencoder.downsample} x patch {self.dit.patch}); the nearest is {nearest}"
            )
        return self.autoencoder.channels, height // self.autoencoder.downsample, width // self.autoencoder.downsample

    def _sample_batch(
        self, prompts: Sequence[str], negatives: Sequence[str], streams: NoiseStreams, sampling: Sampling, dit: Dit
    ) -> Tensor:
        def fresh() -> Tensor:
            return to_device(streams(), torch.device(self.offload.device if self.offload else self.device))

        noise = fresh()
        with self._active(self.text_encoder, f"reading {len(prompts)} prompts"):
            text = self.text_encoder(prompts)
            null = (
                text
                if not reads_null(dit, sampling.guidance)
                else self.text_encoder.negative([*{*negatives}] if len({*negatives}) == 1 else negatives, text)
            )
            regions = self.encoded_regions(prompts, sampling, noise.shape[2:])
        with self._active(dit, f"denoising {self._describe(noise)}"):
            velocity = self.velocity(text, null, sampling, dit, regions)
            latents = check_finite(sampling.run(velocity, noise, self.flow, fresh), dtype_of(dit))
        with self._active(self.autoencoder, f"decoding {self._describe(noise)}"):
            return self.pixels(latents)

    def velocity(
        self, text: Text, null: Text, sampling: Sampling, dit: Dit | None = None, regions: Encoded | None = None
    ) -> Velocity:
        """The guided velocity for one batch of prompts, of the system's denoiser or of another."""
        dit = self.dit if dit is None else dit
        how: dict[str, Any] = {"interval": sampling.guidance_interval, "pag": sampling.perturbation}
        how |= {"times": sampling.network_times(self.flow), "scale": sampling.guidance}
        if regions is None:
            return guided(dit, text, null, bind=self._bind(sampling, dit), **how)
        assert sampling.regions is not None
        rule: Regions = specs.build("regions", sampling.regions)
        return regional(partial(guided, dit, **how), text, null, regions, rule, how["times"], dit.patch)

    def _bind(self, sampling: Sampling, dit: Dit) -> Bind:
        """Wrapper of the denoiser's steps: a step cache, CUDA graphs (of weights at fixed addresses), or none."""
        if sampling.cache is not None:
            return partial(CachedSteps, specs.build("cache", sampling.cache))
        moves = self.offload is not None or dit is not self.dit or is_sharded(dit)
        if moves and sampling.graph == "always":
            raise ValueError(
                "sampling graph is 'always', which needs weights that stay where they are; expected offload: false, "
                "and a denoiser that is quantised already (`prepare_for_sampling`)"
            )
        self.graphs.check(dit, sampling.graph)
        return partial(self.graphs.velocity, "never" if moves else sampling.graph)

    def pixels(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> images (B, 3, H, W) uint8."""
        images = self.autoencoder.decode(latents.to(dtype_of(self.autoencoder)))
        return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)

    def _active(self, network: nn.Module, action: str) -> ExitStack:
        """Have a network on its device within the block; OutOfMemory says what it was doing."""
        stack = ExitStack()
        stack.enter_context(describe_out_of_memory(action))
        if self.offload:
            stack.enter_context(self.offload.visit(network))
        return stack

    def _describe(self, latents: Tensor) -> str:
        count, _, *sides = latents.shape
        size = " x ".join(str(side * self.autoencoder.downsample) for side in sides)
        return f"{count} images of {size} pixels" if count > 1 else f"an image of {size} pixels"


def check_text_trains(text_trains: bool, adapter: Spec | None) -> None:
    """SpecError for a training of the text encoder alone, if that does not train or an adapter of the DiT does."""
    if adapter is not None:
        raise SpecError("system.train_dit is false, and system.adapter trains in the DiT's place; expected true")
    if not text_trains:
        raise SpecError(
            "system.train_dit is false, and the text encoder does not train either, so that nothing does; expected "
            "true, or system.train_text: true"
        )
