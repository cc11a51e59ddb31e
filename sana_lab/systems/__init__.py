"""The interface of a training system: its step, optimiser, learning rate, averaged weights and checkpoints."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from sana_lab.checkpoints import mismatch
from sana_lab.config.schema import Config
from sana_lab.config.specs import SpecError
from sana_lab.diffusion import Process
from sana_lab.models.autoencoders import Autoencoder
from sana_lab.systems import sharding
from sana_lab.systems.adapters import Adapter, Factors
from sana_lab.systems.ema import Average, trainable
from sana_lab.systems.optim import gradient_norm, optimizer, set_learning_rate, split_groups
from sana_lab.types import Batch


class Sample(Protocol):
    """The method `sample` of a system that generates images."""

    def __call__(
        self, prompts: Sequence[str], *, size: int, sampling: Any, seed: int, indices: Sequence[int], batch: int
    ) -> Tensor:
        """Images (B, 3, size, size) uint8 of prompts, `batch` at a time; image i from noise `indices[i]` of `seed`."""
        ...


class Evaluator(Protocol):
    """Evaluations available to `System.evaluate`. Each method returns a part of the report as plain data."""

    @property
    def options(self) -> Config:
        """The experiment's `eval:`."""
        ...

    @property
    def device(self) -> torch.device:
        """The device to evaluate on."""
        ...

    def generated(self, sample: Sample) -> Config:
        """All measures of generated images, under the experiment's `sampling` and `eval`."""
        ...

    def reconstructed(self, autoencoder: Autoencoder) -> Config:
        """PSNR, SSIM, LPIPS and rFID of an autoencoder on held-out images."""
        ...

    def reported(self, reports: Mapping[str, Any]) -> Config:
        """Reports (`sana_lab.evaluation.Report`) by name that the system computed itself."""
        ...


class System(L.LightningModule, ABC):
    """Networks that are trained together, and the loss of a batch.

    A subclass sets its networks and `average` in its constructor and implements `training_step`. The constructor's
    arguments are the hyperparameters of its checkpoints, so that a checkpoint rebuilds its system. The options
    `optimizer` (a spec), `warmup` (steps) and `decay` (share of training) work without further code; a system without
    `optimizer` overrides `configure_optimizers`.

    Noise and times of a training step depend only on (seed, step), and each rank takes those of its rows, so that a
    resumed run equals an uninterrupted one, and several devices equal one.
    """

    average: Average
    """Moving average of the parameters that train; `Average(self, decay)`, at the end of the constructor."""

    experiment: Any = None
    """The resolved experiment (`Config`) of the weights; None if unknown."""

    flow: Process | None = None
    """The process from data to noise, of a system that samples."""

    frozen: tuple[str, ...] = ()
    """Child modules that do not train: checkpoints leave them out, and their specs rebuild them."""

    divisible: bool = True
    """Whether the loss is a mean over the items of a batch, so that several devices may each train on a part of it."""

    clip: float = 1.0
    """Largest norm of the gradient, 0 is no clipping, of a system that steps by hand: `trainer.gradient_clip`."""

    adapter: Adapter | None = None
    """Modules that alone train, from the beginning of a training on (`adapt`)."""

    elapsed: Callable[[], float] | None = None
    """Share of the training's time that has passed, if it ends by time (`trainer.max_seconds`)."""

    decays_by_time: bool = False
    """Whether its option `schedule`, if it has one, follows `elapsed` too."""

    auxiliary: tuple[str, ...] = ()
    """Child modules used only in training: kept in checkpoints, omitted by `trained`."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.settings: Any = self.hparams
        self.strict_loading = False  # frozen modules are not in a checkpoint; on_load_checkpoint checks the others

    @abstractmethod
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """The loss of a batch; None with manual optimisation."""

    def preview(self, experiment: Config) -> Tensor | None:
        """Images (B, 3, H, W) uint8 of the experiment's prompts by the averaged weights; None if it generates none."""
        return None

    def evaluate(self, evaluator: Evaluator) -> Config:
        """The report of `sana-lab eval` on the trained system. SpecError for a system without an evaluation."""
        raise SpecError(f"system {type(self).__name__} has no method `evaluate`, so there is nothing to measure of it")

    def check_sampling(self, experiment: Config) -> None:
        """SpecError for sampling options of an experiment that do not fit the networks or the size of its data."""

    def evaluate_in_training(self, evaluator: Evaluator) -> Config:
        """The report at a point of the training, whose networks stay where and as they are; else as `evaluate`."""
        return self.evaluate(evaluator)

    @property
    def evaluates(self) -> bool:
        """Whether the system has an evaluation of its own."""
        return type(self).evaluate is not System.evaluate

    def part(self, kind: str) -> Any:
        """The child module of that name (`dit`, `autoencoder`, `text_encoder`), or None."""
        return dict(self.named_children()).get(kind)

    def check(self) -> None:
        """SpecError where the constructor left out what training needs; a line on what evaluation will lack."""
        if not isinstance(vars(self).get("average"), Average):
            raise SpecError(
                f"system {type(self).__name__} has no `average` of its weights; expected self.average = "
                "Average(self, decay) at the end of its constructor, from sana_lab.systems.ema"
            )
        if self.adapter is not None:
            self.adapter.check(self.part("dit"))
        if not self.evaluates:
            rank_zero_info(
                f"system {type(self).__name__} has no method `evaluate`: `sana-lab eval` has nothing to measure of it, "
                "and tables show its losses and costs alone"
            )

    # Training methods

    def setup(self, stage: str) -> None:
        """Build adapter and training methods, before Lightning makes the optimisers and reads the checkpoint."""
        methods, trainer = self.part("methods"), self.trainer
        if stage == "fit" and self.adapter is not None and not self.adapter.injected(self.part("dit")):
            self.adapt()
        if stage == "fit" and methods is not None and methods.specs:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            if data is None:
                raise ValueError("a system with `method` is trained on a data module, whose size it must know")
            device = trainer.strategy.root_device
            self.build_methods(data.size, data.batch, data.gives_images, device, getattr(data, "shapes", ()))

    def adapt(self) -> None:
        """Freeze all parts, put the adapter into the DiT, and average its parameters."""
        assert self.adapter is not None
        self.requires_grad_(False)
        self.adapter.inject(self.part("dit"))
        self.average = Average(self, self.average.decay)

    def adapter_factors(self) -> Factors:
        """The averaged low-rank change of each layer of the DiT; {} without an adapter."""
        if self.adapter is None:
            return {}
        with self.averaged():
            return {
                k: (a.clone(), b.clone()) for k, (a, b) in self.adapter.factors(self.part("dit").state_dict()).items()
            }

    def build_methods(
        self,
        size: int,
        batch: int | None = None,
        images: bool = True,
        device: torch.device | None = None,
        buckets: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Build the methods of the option `method`, unless they are, for square images of `size` pixels and images of
        `buckets`, (height, width) in pixels; none here."""

    def configure_model(self) -> None:
        """Shard the DiT over the ranks, with `trainer.strategy: fsdp2`."""
        if self.device_mesh is not None and not sharding.is_sharded(self):
            sharding.shard(self.part("dit"), self.device_mesh["data_parallel"])
            self.average.shard(self.averaged_module)

    # Optimisation

    def configure_optimizers(self) -> Any:
        """The optimiser of the option `optimizer`, over all parameters that train; those of training methods may be in
        groups of their own."""
        if "optimizer" not in self.settings:
            raise SpecError(
                f"system {type(self).__name__} has no option `optimizer` and no method `configure_optimizers`"
            )
        groups = [] if (methods := self.part("methods")) is None else methods.parameter_groups()
        own = {p for group in groups for p in group["params"]}
        pairs = [(name, p) for name, p in trainable(self) if p not in own]
        built = optimizer(self.settings.optimizer, pairs, self)
        split_groups(built, self.settings.get("groups") or {}, pairs)
        for group in groups:
            built.add_param_group(group)
        return built

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Set the step's learning rate, if the system has the option `warmup`."""
        if "warmup" in self.settings:
            elapsed = 0.0 if self.elapsed is None else self.elapsed()
            set_learning_rate(self.trainer, self.settings.warmup, self.settings.get("decay", 0.0), elapsed)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Step, then update the average; `on_train_batch_end` would be after the step's checkpoint is written."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.average.update(self.averaged_module)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the norm of the gradient, unless a system steps by hand and logs it itself."""
        if self.automatic_optimization:
            self.log_gradient_norm(optimizer)

    def log_gradient_norm(self, optimizer: torch.optim.Optimizer) -> None:
        """Log train/grad_norm, the norm of an optimiser's gradients before clipping, at the steps that are logged."""
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.log("train/grad_norm", gradient_norm(optimizer))

    # Averaged weights

    @property
    def averaged_module(self) -> nn.Module:
        """The module whose parameters `average` follows."""
        return self

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Context with the averaged weights in place of the raw ones; unchanged weights before the first step.

        Loaded weights are averages already. Sharded weights are whole in it; all ranks enter it.
        """
        with self._average_in_place(), sharding.whole(self):
            yield

    def _average_in_place(self) -> AbstractContextManager[None]:
        return self.average.swapped(self.averaged_module) if self.average.updates else nullcontext()

    def write_average(self) -> None:
        """Replace the weights by their average permanently."""
        self.average.write(self.averaged_module)

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the raw weights of trainable modules, and their average."""
        own = self._own_state()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in own}
        checkpoint["average"] = self.average.state()

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore the average. SpecError if the checkpoint is of another system."""
        expected = mismatch.shapes_of(self._own_state())
        unbuilt = () if any(name.startswith("methods.") for name in expected) else ("methods.*",)
        state, model = checkpoint.get("state_dict"), type(self).__name__
        if state is not None:  # of sharded parameters Lightning has loaded and left it out
            mismatch.check_state(expected, state, "the checkpoint", model, ignored=unbuilt)
        self.average.load(checkpoint["average"])

    def trained(self) -> dict[str, Tensor]:
        """Final averaged weights, with the names of their parts as prefixes (`dit.`, `autoencoder.`, ...); to be called
        by all ranks."""
        with self._average_in_place():
            kept = _without(self._own_state(), self.auxiliary)
            kept = kept if self.adapter is None else self.adapter.merged(kept)
            return {k: sharding.full(v.detach()).clone() for k, v in kept.items()}

    def _own_state(self) -> dict[str, Tensor]:
        return _without(self.state_dict(), self.frozen)


def _without(state: Mapping[str, Tensor], modules: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of a state dict outside these child modules."""
    return {k: v for k, v in state.items() if not k.startswith(tuple(f"{m}." for m in modules))}
