"""Training of only the DiT on cached latents and text features, without frozen parts in memory."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from sana_lab.checkpoints.build import build, build_on_meta, without_weights
from sana_lab.config import specs
from sana_lab.config.ranges import Decay, Positive, PositiveShare, Seed, Share, Steps, Width
from sana_lab.config.schema import Config
from sana_lab.config.specs import AsBefore, Spec, SpecError
from sana_lab.diffusion import Prediction, Process, Weighting
from sana_lab.diffusion.sampling import generator
from sana_lab.models.dit import Dit
from sana_lab.ops.transfer import to_device
from sana_lab.systems import Evaluator, System
from sana_lab.systems.ema import Average
from sana_lab.systems.losses import TRAIN, Objective, check_draws, process, validate
from sana_lab.systems.method_steps import Methods, build_methods, training_loss
from sana_lab.systems.optim import Groups
from sana_lab.systems.text2image import TextToImage
from sana_lab.types import Batch, Part, Text


class DitSystem(System):
    """Flow matching on batches with latents and text (`data: features`).

    The loss is that of `text2image`. A text2image experiment takes the result with `dit: experiment:NAME`.
    """

    auxiliary = ("methods",)

    def __init__(
        self,
        dit: Annotated[Spec, "dit"] = "sana",  # denoiser
        autoencoder: Annotated[Spec, "autoencoder"] = "vae",  # autoencoder of the latents, for its number of channels
        text_encoder: Annotated[Spec, "text_encoder"] = "llm",  # text encoder of the features, for their width
        optimizer: Annotated[Spec, "optimizer"] = "adamw",  # optimiser and its options, such as the learning rate
        shift: Positive = 3.0,  # shifts times towards noise, in training and sampling; above 0, 1 is no shift
        start: PositiveShare = 1.0,  # first sampling time before the shift, in (0, 1]
        text_dropout: Share = 0.1,  # share of captions replaced by the empty prompt, for guidance
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
    ) -> None:
        super().__init__()
        check_draws(draws)
        self.flow: Process = process(objective, shift, start, model_time, prediction, weighting)
        encoder = build_on_meta("autoencoder", autoencoder)
        self.downsample: int = encoder.downsample
        text = build_on_meta("text_encoder", text_encoder)
        if text.null != "diffusers":
            raise SpecError(
                f"text_encoder null is {text.null!r}, which needs features of padding, and a cache holds none; "
                "expected 'diffusers', or system: text2image"
            )
        self.dit: Dit = build("dit", dit, channels=encoder.channels, text_dim=text.dim)
        self.methods = Methods(method)
        self.adapter = None if adapter is None else specs.build("adapter", adapter)
        self.average = Average(self, ema)
        self.wholes: list[TextToImage] = []  # the system that samples, once it was needed; no child module

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        latents, text, null = features(batch)
        random, part = generator(self.settings.seed, TRAIN, batch_idx, 0), Part.of_trainer(self._trainer)
        dropped = part.draw(lambda n: torch.rand(n, generator=random), len(latents)) < self.settings.text_dropout
        text = without(text, dropped, null)
        return training_loss(self, batch, latents, text, random, part, batch_idx, dropped.tolist())

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        latents, text, _ = features(batch)
        with self.averaged():
            validate(self, self.dit, self.flow, latents, text, self.settings.seed, batch_idx)

    def images_of(self, batch: Batch, latents: Tensor) -> Tensor:
        """The batch's images (B, 3, H, W) in [-1, 1]. ValueError if it has none."""
        if batch.images is None:
            raise ValueError(
                "the batch holds no images, which a training method reads; expected data.source.images=true"
            )
        return batch.images

    def null_of(self, batch: Batch, text: Text) -> Text:
        """The batch's features of the empty prompt, the null condition of guidance."""
        return features(batch)[2]

    def build_methods(
        self,
        size: int,
        batch: int | None = None,
        images: bool = True,
        device: torch.device | None = None,
        buckets: Sequence[tuple[int, int]] = (),
    ) -> None:
        build_methods(self, self.downsample, size, batch, images, device, buckets)

    # Sampling

    @property
    def evaluates(self) -> bool:
        """Whether it can sample: the specs of both encoders, which it does not hold, have weights."""
        encoder = build_on_meta("text_encoder", self.settings.text_encoder)
        reads = encoder.pretrained or "weights" in encoder.spec
        return reads and "weights" in build_on_meta("autoencoder", self.settings.autoencoder).spec

    def evaluate(self, evaluator: Evaluator) -> Config:
        """All measures of generated images. SpecError for encoders without weights."""
        return self.whole().evaluate(evaluator)

    def evaluate_in_training(self, evaluator: Evaluator) -> Config:
        """The same by the denoiser as it is."""
        return self.whole().evaluate_in_training(evaluator)

    def whole(self) -> TextToImage:
        """The system that samples: this denoiser between the encoders of its data, which are built on first use."""
        if not self.evaluates:
            raise SpecError(
                "system 'dit' samples with the encoders of its data, and system.autoencoder or system.text_encoder has "
                "no weights; expected those that the features were encoded with"
            )
        if not self.wholes:
            given: Config = {key: self.settings[key] for key in ("dit", "autoencoder", "text_encoder")}
            given["dit"] = without_weights(specs.resolve("dit", given["dit"]))
            self.wholes.append(TextToImage(**given, train_text=False))
        whole = self.wholes[0]
        whole.dit, whole.flow, whole.experiment = self.dit, self.flow, self.experiment
        return whole.to(self.device).eval()


def features(batch: Batch) -> tuple[Tensor, Text, Text]:
    """The batch's latents, text and empty prompt; ValueError if it has none."""
    if batch.latents is None or batch.text is None or batch.null is None:
        raise ValueError(
            "system 'dit' trains on cached latents and text; expected data: features, or system: text2image"
        )
    text, null = (t._replace(tokens=t.tokens.to(batch.latents.dtype)) for t in (batch.text, batch.null))
    return batch.latents, text, null


def without(text: Text, dropped: Tensor, null: Text) -> Text:
    """Rows `dropped` (B,) bool replaced by the empty prompt (1, L0, D); both are padded to one length."""
    length = max(text.tokens.shape[1], null.tokens.shape[1])
    text, null, dropped = text.padded(length), null.padded(length), to_device(dropped, text.mask.device)
    tokens = torch.where(dropped[:, None, None], null.tokens, text.tokens)
    return Text(tokens, torch.where(dropped[:, None], null.mask, text.mask))
