"""The verb `train`: one experiment to a model folder that its hash names, resumed where it stopped."""

import json
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from filelock import AcquireReturnProxy, FileLock, Timeout
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import Logger
from omegaconf import OmegaConf
from torch import Tensor

from sana_lab import config, files, parts, tracking, weights
from sana_lab.checks import check
from sana_lab.diffusion.sampling import Sampling
from sana_lab.logger import Tracker
from sana_lab.outputs import check_folder
from sana_lab.parts import SpecError
from sana_lab.room import advised, training_tips
from sana_lab.systems.compiling import compile_blocks
from sana_lab.systems.text2image import TextToImage

Progress = Callable[[int, int], None]


class Diverged(RuntimeError):
    """The loss is no longer a number."""


def folder(experiment: config.Config) -> Path:
    return weights.HOME / "models" / config.experiment_hash(experiment)


def train(
    experiment: config.Config,
    *,
    name: str = "experiment",
    logger: Logger | None = None,
    progress: Progress | None = None,
) -> Path:
    """Train (or finish training) an experiment; its weights file. One that is trained already returns at once.

    A second process that asks for the same model says so and waits for the first.
    """
    home = folder(experiment)
    check_folder(home)
    with _alone(home, name):
        done = weights.trained(experiment)
        with advised(lambda: training_tips(experiment)):
            return done or _fit(experiment, home, name, logger, progress)


def _alone(home: Path, name: str) -> AcquireReturnProxy:
    """The folder's lock, once it is free."""
    lock = FileLock(home / "lock")
    try:
        return lock.acquire(blocking=False)
    except Timeout:
        print(f"another process trains {name} in {home.absolute()}; waiting for it", file=sys.stderr, flush=True)
        return lock.acquire()


def _fit(experiment: config.Config, home: Path, name: str, logger: Logger | None, progress: Progress | None) -> Path:
    options = experiment["trainer"]
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    L.seed_everything(experiment["seed"], verbose=False)
    (home / "experiment.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(experiment)))
    data = parts.build("data", experiment["data"])
    system = parts.build("system", experiment["system"])
    if options["compile"]:
        compile_blocks(system.dit)
    clock = Clock()
    if options["max_steps"] > 0:
        start = resumable(home)
        trainer = _trainer(experiment, home, logger, progress, clock)
        with warnings.catch_warnings():
            quiet()
            try:
                trainer.fit(system, datamodule=data, ckpt_path=start, weights_only=True)
            except SystemExit as error:  # what Lightning makes of Ctrl-C, which it then switches off
                signal.signal(signal.SIGINT, signal.default_int_handler)
                raise KeyboardInterrupt from error
    path = home / "weights.safetensors"
    weights.write(path, system.trained(), card(experiment, name, clock.seconds, metrics(system)))
    return path


def metrics(system: L.LightningModule) -> dict[str, float]:
    found = system._trainer.callback_metrics if system._trainer else {}
    return {k: float(v) for k, v in found.items()}


def card(experiment: config.Config, name: str, seconds: float, measured: dict[str, float]) -> dict[str, Any]:
    """What a weights file says of itself."""
    command = shlex.join(["sana-lab", *sys.argv[1:]]) if Path(sys.argv[0]).stem in ("sana-lab", "__main__") else None
    return {
        "experiment": name,
        "hash": config.experiment_hash(experiment),
        "config": experiment,
        "command": command,
        "seed": experiment["seed"],
        "steps": experiment["trainer"]["max_steps"],
        "seconds": round(seconds, 1),
        "date": time.strftime("%Y-%m-%d"),
        "measured": measured,
        "environment": tracking.environment(),
    }


def latest(home: Path) -> str | None:
    """The newest checkpoint."""
    found = _checkpoints(home)
    return str(found[0]) if found else None


def resumable(home: Path) -> str | None:
    """The newest checkpoint that is whole. SpecError where there are some, and none is: it names what to delete."""
    found = _checkpoints(home)
    for path in found:
        try:
            files.read_torch(path)
            return str(path)
        except SpecError as error:
            print(f"sana-lab: left out: {error}", file=sys.stderr)
    if found:
        named = " ".join(str(path) for path in found)
        raise SpecError(f"no checkpoint in {home} can be read; to train from the beginning, delete {named}")
    return None


def _checkpoints(home: Path) -> list[Path]:
    """The newest first."""
    return sorted(home.glob("*.ckpt"), key=lambda p: p.stat().st_mtime, reverse=True)


def quiet() -> None:
    """Silence what Lightning says of choices made here on purpose."""
    for message in (
        ".*does not have many workers.*",
        ".*IterableDataset.*__len__.*",
        ".*Checkpoint directory.*exists.*",
        ".*GPU available but not used.*",
        ".*LeafSpec.*",
        ".*max_epochs.*",
        ".*litlogger.*",
        ".*isinstance.treespec.*",
        ".*in eval mode at the start of training.*",
        ".*no pre-optimization state was saved.*",
    ):
        warnings.filterwarnings("ignore", message=message)


def _trainer(
    experiment: config.Config, home: Path, logger: Logger | None, progress: Progress | None, clock: "Clock"
) -> L.Trainer:
    options = experiment["trainer"]
    keep = ModelCheckpoint(
        home, filename="{step}", every_n_train_steps=options["checkpoint_every"], enable_version_counter=False
    )
    callbacks: list[Callback] = [keep, Guard(home, options["log_every"]), clock]
    if experiment["prompts"] and experiment["system"]["name"] == "text2image":
        callbacks.append(SampleGrid(experiment))
    callbacks.append(Report(progress) if progress is not None else Bar(options["log_every"]))
    return L.Trainer(
        max_steps=options["max_steps"],
        max_epochs=-1,
        precision=options["precision"],
        gradient_clip_val=options["gradient_clip"] if experiment["system"].get("adversarial", 0) == 0 else None,
        accumulate_grad_batches=options["accumulate"],
        accelerator=options["accelerator"],
        devices=options["devices"],
        log_every_n_steps=options["log_every"],
        val_check_interval=options["validate_every"],
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=logger or False,
        callbacks=callbacks,
        enable_progress_bar=progress is None,
        enable_model_summary=False,
        default_root_dir=home,
    )


class Guard(Callback):
    """Stops when loss or weights are NaN or infinite, naming the step and the last good checkpoint.

    The loss is looked at `every` so many steps, the weights before each checkpoint: what is written is good.
    """

    def __init__(self, home: Path, every: int) -> None:
        self.home, self.every = home, every

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if index % self.every and trainer.global_step < trainer.max_steps:
            return
        loss = outputs["loss"] if isinstance(outputs, dict) else trainer.callback_metrics.get("train/loss")
        if isinstance(loss, Tensor) and not loss.isfinite().all():
            raise self._diverged(f"the loss is {float(loss)}", trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._check_weights(trainer, module)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._check_weights(trainer, module)

    def _check_weights(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        odd = next((name for name, p in module.named_parameters() if not p.isfinite().all()), None)
        if odd is not None:
            raise self._diverged(f"{odd} is not finite", trainer)

    def _diverged(self, what: str, trainer: L.Trainer) -> Diverged:
        return Diverged(
            f"{what} at step {trainer.global_step}; last good checkpoint: {latest(self.home) or 'none yet'}; "
            "try a lower learning rate or gradient clip"
        )


class Clock(Callback):
    """Counts the seconds of training, those before a resume too, as far as the checkpoint knows of them."""

    def __init__(self) -> None:
        self.before, self.began = 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.began

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before = state_dict["seconds"]


class Report(Callback):
    """Tells `progress` how far training is."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step % 10 == 0 or trainer.global_step == trainer.max_steps:
            self.progress(trainer.global_step, trainer.max_steps)


class Bar(RichProgressBar):
    """Lightning's bar with the loss of every so many steps: for that of each the host would wait for the device."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every, self.shown = every, {"loss": float("nan")}

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        loss = trainer.callback_metrics.get("train/loss")
        if loss is not None and trainer.global_step % self.every == 0:
            self.shown = {"loss": float(loss)}
        return {**super().get_metrics(trainer, pl_module), **self.shown}


class SampleGrid(Callback):
    """Draws the experiment's prompts with averaged weights at every validation; same noise each time."""

    def __init__(self, experiment: config.Config) -> None:
        self.prompts, self.size = experiment["prompts"], config.image_size(experiment["data"])
        self.sampling = Sampling(**experiment["sampling"])

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        log = getattr(trainer.logger, "log_image", None)
        if log is None or not isinstance(module, TextToImage) or not trainer.is_global_zero:
            return
        with module.averaged():
            images = module.sample(self.prompts, size=self.size, sampling=self.sampling)
        log("samples", side_by_side(images), trainer.global_step)


def side_by_side(images: Tensor, gap: int = 2) -> Tensor:
    """(B, 3, H, W) uint8 -> one row (3, H, B (W + gap))."""
    padded = torch.nn.functional.pad(images, (0, gap), value=255)
    return torch.cat(list(padded), -1)


def main(name: str, overrides: Sequence[str], dry_run: bool) -> None:
    """`sana-lab train`: print the resolved experiment, or train it under an MLflow run."""
    experiment = config.load(name, overrides)
    check(experiment)
    if dry_run:
        print(OmegaConf.to_yaml(OmegaConf.create(experiment)), end="")
        print(f"# hash {config.experiment_hash(experiment)}; trained: {'yes' if weights.trained(experiment) else 'no'}")
        return
    for needed in config.needed(experiment):
        required = config.load(needed)
        if weights.ready(required) is None:
            main(needed, [], False)
    if (done := weights.trained(experiment)) is not None:
        print(f"{name} is trained already: {done}")
        return
    print(f"trained: {_tracked(experiment, name)}")


def _tracked(experiment: config.Config, name: str) -> Path:
    """Train under a run of its own, which ends as FINISHED, KILLED or FAILED."""
    check_folder(folder(experiment))
    store = tracking.Store(weights.HOME)
    run = store.start_run(
        "training", name, {"sana.model": config.experiment_hash(experiment), **tracking.environment()}
    )
    store.log_params(run, experiment)
    tracker = Tracker(store, run)
    try:
        path = train(experiment, name=name, logger=tracker)
    except BaseException as error:
        tracker.finalize("failed")
        store.set_tags(run, {"sana.error": f"{type(error).__name__}: {error}"})
        store.finish(run, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    tracker.finalize("success")
    store.finish(run)
    print(json.dumps(weights.card(path)["measured"]))
    return path
