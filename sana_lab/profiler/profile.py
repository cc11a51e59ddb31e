"""`sana-lab profile`: time of an untrained system's training step or image, by phase and operator."""

import json
import logging
import tempfile
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from torch import profiler

from sana_lab.bench.probes import PROMPT
from sana_lab.bench.record import machine
from sana_lab.bench.untrained import build_untrained
from sana_lab.config import experiments, schema, specs
from sana_lab.config.atomic_write import write_text
from sana_lab.config.paths import check_file
from sana_lab.costs.live_memory import Memory, module_tensors, peak_memory
from sana_lab.costs.timing import Timing
from sana_lab.diffusion.sampling import Sampling
from sana_lab.profiler.host_syncs import count_syncs
from sana_lab.profiler.phases import SAMPLING, TRAINING, PhaseProfiler, PhaseTimer, instrument
from sana_lab.profiler.stand_ins import random_weights, small_data, untrained_system
from sana_lab.systems.compile import compile_blocks
from sana_lab.training.callbacks import ProgressReporter
from sana_lab.training.checks import check
from sana_lab.training.divergence import DivergenceGuard
from sana_lab.training.quiet import quiet
from sana_lab.types import Json

RECORDED_STEPS = 3
"""Training steps recorded by torch.profiler."""

Run = Callable[[PhaseTimer, int], None]
"""Function that runs a number of steps under a timer."""


def main(options: Namespace) -> None:
    """`sana-lab profile`: print phases and operators; write JSON and a Chrome trace with `--json` and `--trace`."""
    _check(options)
    experiment = experiments.load(options.experiment, options.overrides)
    check(experiment)
    measure = profile_sampling if options.sampling else profile_training
    steps = options.steps or (3 if options.sampling else 20)
    record = measure(experiment, steps=steps, warmup=options.warmup, top=options.top, trace=options.trace)
    print(table(record))
    if options.json is not None:
        write_text(options.json, json.dumps(record, indent=2) + "\n")


def _check(options: Namespace) -> None:
    for name, minimum in (("steps", 1), ("warmup", 0), ("top", 0)):
        value = getattr(options, name)
        if value is not None and value < minimum:
            raise ValueError(f"--{name} is {value}, expected at least {minimum}; the nearest is {minimum}")
    for path in (options.json, options.trace):
        check_file(path)


def profile_training(
    experiment: schema.Config, *, steps: int = 20, warmup: int = 3, top: int = 10, trace: Path | None = None
) -> Json:
    """A training step of an experiment's untrained system, as plain data; `notes` defines every number."""
    with _isolated(), tempfile.TemporaryDirectory() as folder:
        if experiment["trainer"]["threads"]:
            torch.set_num_threads(experiment["trainer"]["threads"])
        L.seed_everything(experiment["seed"], verbose=False)
        data, data_notes = small_data(experiment, Path(folder))
        system = untrained_system(experiment)
        syncs = _syncs(experiment, data)

        def run(timer: PhaseTimer, count: int, *callbacks: Callback) -> None:
            _trainer(experiment, Path(folder), timer, count, *callbacks).fit(system, datamodule=data)

        def measure_memory() -> Memory:
            return peak_memory(lambda: run(PhaseTimer(device), 2), device, module_tensors([system]))

        device = _device(experiment)
        # on the CPU, measured before compilation, which hides operators from the counter
        memory = measure_memory() if device.type == "cpu" else None
        if experiment["trainer"]["compile"]:
            compile_blocks(system.dit)
        record = _measured(run, system, device, steps, warmup, TRAINING)
        memory = memory or measure_memory()
        recorder = Recorder(warmup, trace)
        run(PhaseTimer(device), warmup + RECORDED_STEPS, recorder)
    return {
        "mode": "training",
        **record,
        **_sync_record(syncs),
        **_memory_record(memory),
        "operators": recorder.operators(top, device),
        "settings": {**machine(device, None, dict(system.named_children())), **experiment["trainer"]},
        "notes": [*data_notes, *_notes(device), *_training_notes(experiment), *_phase_notes(record, TRAINING)],
    }


@torch.no_grad()
def profile_sampling(
    experiment: schema.Config, *, steps: int = 3, warmup: int = 1, top: int = 10, trace: Path | None = None
) -> Json:
    """Sampling of one image by an experiment's untrained system, as plain data. SpecError for a system without
    `sample`."""
    name = experiment["system"]["name"]
    if not hasattr(specs.find("system", name), "sample"):
        raise specs.SpecError(
            f"--sampling needs a system that generates images, and {name!r} does not; expected text2image"
        )
    with _isolated():
        if experiment["trainer"]["threads"]:
            torch.set_num_threads(experiment["trainer"]["threads"])
        system = build_untrained({**experiment, "system": random_weights(experiment["system"])}).eval()
        size, how = experiments.image_size(experiment["data"]), Sampling(**{**experiment["sampling"], "graph": "never"})

        def sample() -> None:
            system.text_encoder.clear_cache()
            system.sample([PROMPT], size=size, sampling=how)

        def run(timer: PhaseTimer, count: int) -> None:
            for _ in range(count):
                timer.step()
                sample()
            timer.step()

        record = _measured(run, system, system.device, steps, warmup, SAMPLING)
        memory = peak_memory(sample, system.device, module_tensors([system]))
        recorder = Recorder(0, trace)
        recorder.begin()
        sample()
        recorder.end(1)
    return {
        "mode": "sampling",
        **record,
        **_memory_record(memory),
        "operators": recorder.operators(top, system.device),
        "settings": {**machine(system.device, None, dict(system.named_children())), **experiment["sampling"]},
        "notes": [
            f"a step is one image of {size} px, {how.steps} denoising steps, every prompt new, no CUDA graphs",
            *_notes(system.device),
            *_phase_notes(record, SAMPLING),
        ],
    }


def _measured(
    run: Run, system: L.LightningModule, device: torch.device, steps: int, warmup: int, phases: dict[str, str]
) -> Json:
    """Times of steps by phase, and of steps without phase boundaries."""
    timers = PhaseTimer(device), PhaseTimer(device, boundaries=False)
    with instrument(system, timers[0]):
        run(timers[0], warmup + steps)
    run(timers[1], warmup + steps)
    by_phase, whole = (timer.steps[warmup:] for timer in timers)
    totals = [sum(step.values()) for step in by_phase]
    return {
        "steps": steps,
        "warmup": warmup,
        "step": _spread(totals),
        "unwatched": _spread([sum(step.values()) for step in whole]),
        "phases": {name: _phase([step.get(name, 0.0) for step in by_phase], totals) for name in phases},
    }


def _spread(seconds: list[float]) -> Json:
    """Mean, median with its 95 % interval, minimum and interquartile range, in milliseconds."""
    timing = Timing.of(seconds)
    median = {"median": timing.median_s, "low": timing.low_s, "high": timing.high_s, "least": timing.min_s}
    spread = {"mean": sum(seconds) / len(seconds), **median, "quartiles": timing.iqr_s}
    return {f"{name}_ms": 1e3 * value for name, value in spread.items()}


def _phase(seconds: list[float], totals: list[float]) -> Json:
    return {"share": sum(seconds) / sum(totals), **_spread(seconds)}


class Recorder(Callback):
    """Record operators with torch.profiler from batch `first` on; write a Chrome trace to `trace`."""

    def __init__(self, first: int, trace: Path | None) -> None:
        self.first, self.trace, self.steps = first, trace, 0
        kinds = [profiler.ProfilerActivity.CPU]
        kinds += [profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self.profiler = profiler.profile(activities=kinds)

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.first:
            self.begin()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.first + RECORDED_STEPS - 1:
            self.end(RECORDED_STEPS)

    def begin(self) -> None:
        self.profiler.start()

    def end(self, steps: int) -> None:
        self.steps = steps
        self.profiler.stop()
        if self.trace is not None:
            self.profiler.export_chrome_trace(str(self.trace))

    def operators(self, top: int, device: torch.device) -> list[Json]:
        """The `top` operators by self time, of the device on CUDA, else of the CPU."""
        key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
        events = [e for e in self.profiler.key_averages() if "#" not in e.key]  # ranges around an optimiser's step
        total = sum(getattr(e, key) for e in events) or 1.0
        ordered = sorted(events, key=lambda e: getattr(e, key), reverse=True)[:top]
        return [
            {
                "name": e.key,
                "calls": e.count / self.steps,
                "ms": getattr(e, key) / 1e3 / self.steps,
                "share": getattr(e, key) / total,
            }
            for e in ordered
        ]


def _trainer(experiment: schema.Config, folder: Path, timer: PhaseTimer, steps: int, *callbacks: Callback) -> L.Trainer:
    """The Trainer of `train` without output files."""
    options = experiment["trainer"]
    return L.Trainer(
        max_steps=-(-(steps + 1) // options["accumulate"]) + 1,  # a step ends where the next begins
        limit_train_batches=steps + 1,
        max_epochs=1,
        precision=options["precision"],
        gradient_clip_val=options["gradient_clip"] if experiment["system"].get("adversarial", 0) == 0 else None,
        accumulate_grad_batches=options["accumulate"],
        accelerator=options["accelerator"],
        devices=1,
        log_every_n_steps=options["log_every"],
        limit_val_batches=0,
        logger=DummyLogger(),
        callbacks=[DivergenceGuard(folder, options["log_every"]), ProgressReporter(lambda *_: None), *callbacks],
        profiler=PhaseProfiler(timer),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )


def _device(experiment: schema.Config) -> torch.device:
    cuda = torch.cuda.is_available() and experiment["trainer"]["accelerator"] != "cpu"
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def _syncs(experiment: schema.Config, data: L.LightningDataModule) -> list[Counter[str]]:
    """Host synchronisations by step, counted on the meta device."""
    data.setup("fit")
    batches = list(islice(data.train_dataloader(), 3))
    with torch.device("meta"):
        system = untrained_system(experiment)
    return count_syncs(system, batches, experiment["trainer"]["gradient_clip"])


def _sync_record(syncs: list[Counter[str]]) -> Json:
    counts = sum(syncs, Counter[str]())
    where = {line: n / len(syncs) for line, n in counts.most_common()}
    return {"host_syncs": {"per_step": counts.total() / len(syncs), "where": where}}


def _memory_record(memory: Memory) -> Json:
    return {"peak_mib": memory.peak_mib, "weights_mib": memory.resident_mib, "memory_method": memory.method}


@contextmanager
def _isolated() -> Iterator[None]:
    """Restore threads and random state on exit, and suppress Lightning's messages about short trainings."""
    threads, logger = torch.get_num_threads(), logging.getLogger("lightning.pytorch")
    level = logger.level
    with torch.random.fork_rng(), quiet():
        warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*|.*validation_step.*")
        logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            logger.setLevel(level)
            torch.set_num_threads(threads)


def table(record: Json) -> str:
    """The record as text: a line per phase, the operators, the definitions."""
    step, whole = record["step"], record["unwatched"]
    lines = [f"{'phase':<27}{'share':>8}{'mean ms':>11}{'median ms':>11}{'quartiles':>11}"]
    lines += [_line(name, phase) for name, phase in record["phases"].items() if phase["mean_ms"]]
    lines.append(_line("step", {"share": 1.0, **step}))
    interval = f"{whole['low_ms']:.4g} to {whole['high_ms']:.4g}"
    lines.append(
        f"without phase boundaries: {whole['median_ms']:.4g} ms ({interval}) a step, the median of {record['steps']}; "
        f"peak {record['peak_mib']:.1f} MiB"
    )
    if "host_syncs" in record:
        lines.append(f"host synchronisations a step: {record['host_syncs']['per_step']:g}")
        lines += [f"  {n:g} {place}" for place, n in record["host_syncs"]["where"].items()]
    if record["operators"]:
        lines.append(f"{'operator':<47}{'share':>8}{'ms':>9}{'calls':>8}")
    lines += [f"{o['name'][:46]:<47}{o['share']:>8.1%}{o['ms']:>9.3g}{o['calls']:>8.4g}" for o in record["operators"]]
    return "\n".join([*lines, *(f"- {note}" for note in record["notes"])])


def _line(name: str, phase: Json) -> str:
    times = "".join(f"{phase[key]:>11.4g}" for key in ("mean_ms", "median_ms", "quartiles_ms"))
    return f"{name:<27}{phase['share']:>8.1%}{times}"


def _notes(device: torch.device) -> list[str]:
    clock = "the device is synchronised at every phase boundary" if device.type == "cuda" else "by the host's clock"
    return [
        f"phases: {clock}; of nested phases the innermost counts, so means add up to the mean step",
        "without phase boundaries: the same steps, timed only as a whole",
        f"operators: self time by torch.profiler, of {RECORDED_STEPS} training steps or one image",
    ]


def _training_notes(experiment: schema.Config) -> list[str]:
    accumulate = experiment["trainer"]["accumulate"]
    return [
        "host synchronisations: counted on the meta device between logging points, including blocking copies",
        "peak: of a step, with weights, gradients, optimiser state and averaged weights",
        *(["peak on the CPU: with eager blocks"] if experiment["trainer"]["compile"] else []),
        *([f"a step is one batch, of {accumulate} that are accumulated"] if accumulate > 1 else []),
    ]


def _phase_notes(record: Json, phases: dict[str, str]) -> list[str]:
    """Definitions of the phases with nonzero time."""
    return [f"{name}: {text}" for name, text in phases.items() if record["phases"][name]["mean_ms"]]
