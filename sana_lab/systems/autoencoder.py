"""The LightningModule that trains an autoencoder."""

import math
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from sana_lab.checkpoints.build import build
from sana_lab.config.ranges import Decay, Nonnegative, Seed, Share, Steps, Width
from sana_lab.config.schema import Config
from sana_lab.config.specs import AsBefore, Spec, SpecError
from sana_lab.diffusion.sampling import generator
from sana_lab.models.autoencoders import Autoencoder, Layers, Normalise
from sana_lab.models.autoencoders.discriminator import PatchDiscriminator
from sana_lab.models.autoencoders.latent_structure import draw_transform, keep_front
from sana_lab.models.autoencoders.losses import Lpips, hinge_discriminator, hinge_generator, kl_divergence
from sana_lab.ops.transfer import to_device
from sana_lab.systems import Evaluator, System
from sana_lab.systems.ema import Average
from sana_lab.systems.optim import fused
from sana_lab.types import Batch, Part

Schedule = Literal["constant", "cosine"]


class AutoencoderSystem(System):
    """The loss is l1 |r - x| + l2 (r - x)^2, means over image values, + kl KL + lpips LPIPS + adversarial hinge.

    KL is summed over the latent and divided by the number of image values, as in latent diffusion (arXiv 2112.10752),
    so that 1e-6 has the same effect. With the adversarial loss, two optimisers step manually, clipped at
    `trainer.gradient_clip`, and the Trainer counts the autoencoder's steps. Validation and the latent normalisation,
    fitted at the end of training, use the averaged weights.
    """

    frozen, auxiliary = ("lpips",), ("discriminator",)
    decays_by_time = True

    def __init__(
        self,
        autoencoder: Annotated[Spec, "autoencoder"],  # what is trained
        l1: Nonnegative = 1.0,  # weight of the absolute error
        l2: Nonnegative = 0.0,  # weight of the squared error
        kl: Nonnegative = 1e-6,  # weight of the KL divergence from a standard normal
        latent_noise: Nonnegative = 0.0,  # Gaussian noise before the decoder, as a share of each channel's deviation
        lpips: Nonnegative = 0.0,  # weight of LPIPS; 0 needs no weights of it
        lpips_weights: str | None = None,  # torchvision's VGG-16 .pth, for LPIPS
        adversarial: Nonnegative = 0.0,  # weight of the hinge loss of a patch discriminator; 0 is none
        adversarial_start: Steps = 0,  # optimiser step at which the adversarial loss begins
        discriminator_width: Width = 64,  # channels of the discriminator's first layer
        lr: Nonnegative = 1e-3,  # learning rate of AdamW
        betas: tuple[Decay, Decay] = (0.9, 0.99),  # of AdamW
        warmup: Steps = 100,  # steps in which the learning rate rises linearly
        schedule: Schedule = "cosine",  # learning rate after the warm-up: constant, or half a cosine down to zero
        ema: Decay = 0.999,  # decay of the average of weights, in [0, 1)
        seed: Annotated[Seed, AsBefore(0)] = 0,  # of the noise
        # Of each latent channel, fitted at the end: by mean and deviation (affine), or by root mean square (scale).
        normalise: Annotated[Normalise, AsBefore("affine")] = "affine",
        # What of it trains: all, the layers next to the latent (middle: DC-AE's phase at high resolution), or the last
        # ones of the decoder (head: its phase with an adversarial loss), which leaves latents as they are.
        trains: Annotated[Literal["all", "middle", "head"], AsBefore("all")] = "all",
        # Structured latents (DC-AE 1.5): the decoder gets a random number of front channels, a multiple of this, and
        # zeros behind them; null gives it all.
        front_channels: Annotated[Width | None, AsBefore(None)] = None,
        # Share of batches that reconstruct scaled and rotated images from scaled and rotated latents (EQ-VAE).
        equivariance: Annotated[Share, AsBefore(0.0)] = 0.0,
    ) -> None:
        super().__init__()
        self.l1, self.l2, self.kl, self.latent_noise = l1, l2, kl, latent_noise
        self.perceptual, self.adversarial, self.adversarial_start = lpips, adversarial, adversarial_start
        self.lr, self.betas, self.warmup, self.schedule, self.seed = lr, betas, warmup, schedule, seed
        self.normalise: Normalise = normalise
        self.autoencoder: Autoencoder = build("autoencoder", autoencoder)
        if front_channels is not None and front_channels > self.autoencoder.channels:
            raise SpecError(
                f"system.front_channels is {front_channels}, and the autoencoder has {self.autoencoder.channels} "
                "channels; expected fewer"
            )
        if trains == "head" and (front_channels is not None or equivariance):
            given = "front_channels" if front_channels is not None else "equivariance"
            raise SpecError(
                f"system.{given} gives latents a structure, and trains: head leaves latents as they are; expected "
                "trains: all or middle"
            )
        self.front_channels, self.equivariance = front_channels, equivariance
        self.trains = trains
        if trains != "all":
            _train_layers(self.autoencoder, trains)
        self.average = Average(self.autoencoder, ema)
        self.lpips = Lpips(lpips_weights) if lpips else None
        self.discriminator = PatchDiscriminator(discriminator_width) if adversarial else None
        self.automatic_optimization = not adversarial

    @property
    def averaged_module(self) -> Autoencoder:
        return self.autoencoder

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        networks: list[nn.Module] = [self.autoencoder, *([self.discriminator] if self.discriminator else [])]
        low, high = self.betas
        return [
            torch.optim.AdamW(own, self.lr, (low, high), weight_decay=0.0, fused=fused(own, self))
            for own in ([p for p in network.parameters() if p.requires_grad] for network in networks)
        ]

    def train(self, mode: bool = True) -> "AutoencoderSystem":
        """Set the mode; batch norms of layers that do not train keep their statistics."""
        super().train(mode)
        for module in self.autoencoder.modules():
            if isinstance(module, nn.BatchNorm2d) and not any(p.requires_grad for p in module.parameters()):
                module.eval()
        return self

    def on_fit_start(self) -> None:
        if self.schedule == "cosine" and self.trainer.max_steps < 1:
            raise ValueError("schedule 'cosine' needs trainer.max_steps, which is not set; or say schedule: constant")

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        elapsed = 0.0 if self.elapsed is None else self.elapsed()
        factor = ramp(self.global_step, self.warmup, self.schedule, self.trainer.max_steps, elapsed)
        for group in (g for optimizer in self.trainer.optimizers for g in optimizer.param_groups):
            group["lr"] = self.lr * factor

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        images = images_of(batch).contiguous(memory_format=torch.channels_last)
        count = self.trainer.fit_loop.epoch_loop.total_batch_idx  # unlike batch_idx, continues after a resume
        latents, kl = self.compress(images, generator(self.seed, count, 0))
        latents, images = self.disturb(latents, images, generator(self.seed, count, 1))
        output = self.autoencoder.reconstruct(latents)
        loss = self.distance(output, images) + self.kl * kl
        if self.discriminator is not None:
            loss = self._adversarial_step(self.discriminator, images, output, loss)
        self.log("train/loss", loss.detach(), sync_dist=True)
        self.log("train/kl", kl.detach(), sync_dist=True)
        return loss if self.automatic_optimization else None

    def compress(self, images: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Raw latents sampled for the decoder, and the KL divergence per image value."""
        mean, log_variance = self.autoencoder.posterior(images)
        deviation = (0.5 * log_variance).exp()
        if self.latent_noise:
            spread = mean.detach().std((0, 2, 3), keepdim=True)
            deviation = (deviation.square() + (self.latent_noise * spread).square()).sqrt()
        n, *shape = mean.shape
        noise = Part.of_trainer(self._trainer).draw(lambda k: torch.randn(k, *shape, generator=random), n)
        noise = to_device(noise, mean.device, mean.dtype)
        return mean + deviation * noise, kl_divergence(mean, log_variance).sum() / images.numel()

    def disturb(self, latents: Tensor, images: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents with fewer channels, and latents and images under one transform, as the options say."""
        if self.front_channels is not None:
            latents = keep_front(latents, self.front_channels, random, Part.of_trainer(self._trainer))
        if self.equivariance:
            unit, grid = self.autoencoder.downsample, (latents.shape[2], latents.shape[3])
            if transform := draw_transform(grid, unit, self.equivariance, random):
                return transform.of(latents), transform.of(images, unit)
        return latents, images

    def distance(self, output: Tensor, images: Tensor) -> Tensor:
        """The weighted L1, L2 and LPIPS between two batches; a scalar."""
        difference = output - images
        total = self.l1 * difference.abs().mean() + self.l2 * difference.square().mean()
        return total if self.lpips is None else total + self.perceptual * self.lpips(output, images).mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images = images_of(batch)
        with self.averaged():
            output = self.autoencoder.decode(self.autoencoder.encode(images)).clamp(-1, 1)
        self.log("val/psnr", psnr(output, images).mean(), prog_bar=True, batch_size=len(images), sync_dist=True)
        from torchmetrics.functional.image import structural_similarity_index_measure  # takes seconds to import

        ssim = structural_similarity_index_measure(output, images, data_range=2.0)
        assert isinstance(ssim, Tensor)
        self.log("val/ssim", ssim, batch_size=len(images), sync_dist=True)

    def evaluate(self, evaluator: Evaluator) -> Config:
        """Reconstruction quality on held-out images."""
        return evaluator.reconstructed(self.autoencoder.to(evaluator.device))

    @torch.no_grad()
    def on_train_end(self) -> None:
        """Fit the latent normalisation to about a thousand training images, unless latents are those of a parent."""
        if self.trains == "head":
            return
        with self.averaged():
            self.autoencoder.fit_normalisation(torch.cat(self._training_latents(1024)), self.normalise)

    def _training_latents(self, images: int) -> list[Tensor]:
        latents: list[Tensor] = []
        trainer: Any = self.trainer  # Lightning does not annotate `datamodule`
        for batch in trainer.datamodule.train_dataloader():
            part = self.autoencoder.posterior(images_of(batch).to(self.device))[0]
            latents.append(torch.cat(list(self.all_gather(part))) if trainer.world_size > 1 else part)
            if sum(map(len, latents)) >= images:
                break
        return latents

    def _adversarial_step(self, critic: PatchDiscriminator, images: Tensor, output: Tensor, loss: Tensor) -> Tensor:
        """Step the autoencoder, then the discriminator; the autoencoder's loss."""
        optimizers: Any = self.optimizers()
        started = self.global_step >= self.adversarial_start
        if started:
            loss = loss + self.adversarial * hinge_generator(critic(output))
        self._step(optimizers[0], loss, logged=True)
        self.average.update(self.autoencoder)  # manual optimisation does not call `optimizer_step`
        if started:
            self._step(uncounted(optimizers[1]), hinge_discriminator(critic(images), critic(output.detach())))
        return loss

    def _step(self, optimizer: Any, loss: Tensor, logged: bool = False) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        if logged:
            self.log_gradient_norm(optimizer)
        self.clip_gradients(optimizer, gradient_clip_val=self.clip, gradient_clip_algorithm="norm")
        optimizer.step()


def _train_layers(autoencoder: Autoencoder, layers: Layers) -> None:
    """Let only these layers of an autoencoder train. SpecError if it does not tell them apart."""
    autoencoder.requires_grad_(False)
    try:
        chosen = autoencoder.layers(layers)
    except NotImplementedError as error:
        raise SpecError(f"system.trains is {layers!r}, and {error}; expected all") from error
    for module in chosen:
        module.requires_grad_(True)


def uncounted(optimizer: Any) -> Any:
    """An optimiser of Lightning whose next step does not count as one of the training's."""
    optimizer._on_before_step = optimizer._on_after_step = lambda: None  # Lightning sets both before each batch
    return optimizer


def ramp(step: int, warmup: int, schedule: Schedule, steps: int, elapsed: float = 0.0) -> float:
    """The learning rate's factor: linear warm-up, then constant or half a cosine down to 0 at `steps`, or at the end of
    a time of which the share `elapsed` has passed, whichever is farther."""
    rise = min(1.0, (step + 1) / max(1, warmup))
    return (
        rise if schedule == "constant" else rise * 0.5 * (1 + math.cos(math.pi * max(elapsed, min(1.0, step / steps))))
    )


def images_of(batch: Batch) -> Tensor:
    """The batch's images; ValueError if it has none."""
    if batch.images is None:
        raise ValueError("an autoencoder trains on images, but this data has only latents; expected shapes or folder")
    return batch.images


def psnr(output: Tensor, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image (B,), of values in [-1, 1]."""
    return -10 * torch.log10((output - images).square().mean((1, 2, 3)) / 4)
