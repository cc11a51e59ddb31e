"""`sana-lab profile`: where the time of a training step, or of an image, goes. Untrained, and nothing is kept."""

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
from sana_lab.config.paths import check_file
from sana_lab.costs.live_memory import Memory, module_tensors, peak_memory
from sana_lab.costs.timing import Timing
from sana_lab.diffusion.sampling import Sampling
from sana_lab.profiler.host_syncs import syncs
from sana_lab.profiler.phases import SAMPLING, TRAINING, Clock, Hooks, watched
from sana_lab.profiler.stand_ins import data_for, untrained, untrained_system
from sana_lab.systems.compile import compile_blocks
from sana_lab.training.callbacks import DivergenceGuard, ProgressReporter, silence_lightning
from sana_lab.training.checks import check
from sana_lab.types import Json

WATCHED = 3
"""So many steps are recorded operator by operator."""

Run = Callable[[Clock, int], None]
"""Takes so many steps, of which the clock is told."""


def main(options: Namespace) -> None:
    """`sana-lab profile`: a table of phases and of operators, and files where asked."""
    _check(options)
    experiment = experiments.load(options.experiment, options.overrides)
    check(experiment)
    measure = profile_sampling if options.sampling else profile_training
    steps = options.steps or (3 if options.sampling else 20)
    record = measure(experiment, steps=steps, warmup=options.warmup, top=options.top, trace=options.trace)
    print(table(record))
    if options.json is not None:
        options.json.write_text(json.dumps(record, indent=2) + "\n")


def _check(options: Namespace) -> None:
    for name, least in (("steps", 1), ("warmup", 0), ("top", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} is {value}, expected at least {least}; the nearest is {least}")
    for path in (options.json, options.trace):
        check_file(path)


def profile_training(
    experiment: schema.Config, *, steps: int = 20, warmup: int = 3, top: int = 10, trace: Path | None = None
) -> Json:
    """A training step of an experiment's untrained system, as plain data; `notes` defines every number."""
    with _alone(), tempfile.TemporaryDirectory() as folder:
        if experiment["trainer"]["threads"]:
            torch.set_num_threads(experiment["trainer"]["threads"])
        L.seed_everything(experiment["seed"], verbose=False)
        data, said = data_for(experiment, Path(folder))
        system = untrained_system(experiment)
        waits = _waits(experiment, data)

        def run(clock: Clock, count: int, *callbacks: Callback) -> None:
            _trainer(experiment, Path(folder), clock, count, *callbacks).fit(system, datamodule=data)

        def weigh() -> Memory:
            return peak_memory(lambda: run(Clock(device), 2), device, module_tensors([system]))

        device = _device(experiment)
        memory = weigh() if device.type == "cpu" else None  # followed operator by operator, which compiled blocks hide
        if experiment["trainer"]["compile"]:
            compile_blocks(system.dit)
        record = _measured(run, system, device, steps, warmup, TRAINING)
        memory = memory or weigh()
        recorder = Recorder(warmup, trace)
        run(Clock(device), warmup + WATCHED, recorder)
    return {
        "mode": "training",
        **record,
        **_counted(waits),
        **_weighed(memory),
        "operators": recorder.operators(top, device),
        "settings": {**machine(device, None, dict(system.named_children())), **experiment["trainer"]},
        "notes": [*said, *_notes(device), *_training_notes(experiment), *_named(record, TRAINING)],
    }


@torch.no_grad()
def profile_sampling(
    experiment: schema.Config, *, steps: int = 3, warmup: int = 1, top: int = 10, trace: Path | None = None
) -> Json:
    """Drawing one image with an experiment's untrained system and its `sampling:`, as plain data. SpecError for one
    that draws none."""
    name = experiment["system"]["name"]
    if not hasattr(specs.find("system", name), "sample"):
        raise specs.SpecError(
            f"--sampling is of a system that draws images, and {name!r} does not; expected text2image"
        )
    with _alone():
        if experiment["trainer"]["threads"]:
            torch.set_num_threads(experiment["trainer"]["threads"])
        system = build_untrained({**experiment, "system": untrained(experiment["system"])}).eval()
        size, how = experiments.image_size(experiment["data"]), Sampling(**{**experiment["sampling"], "graph": "never"})

        def draw() -> None:
            system.text_encoder.clear_cache()
            system.sample([PROMPT], size=size, sampling=how)

        def run(clock: Clock, count: int) -> None:
            for _ in range(count):
                clock.step()
                draw()
            clock.step()

        record = _measured(run, system, system.device, steps, warmup, SAMPLING)
        memory = peak_memory(draw, system.device, module_tensors([system]))
        recorder = Recorder(0, trace)
        recorder.begin()
        draw()
        recorder.end(1)
    return {
        "mode": "sampling",
        **record,
        **_weighed(memory),
        "operators": recorder.operators(top, system.device),
        "settings": {**machine(system.device, None, dict(system.named_children())), **experiment["sampling"]},
        "notes": [
            f"a step is one image of {size} px, {how.steps} denoising steps, the prompt as if new, no CUDA graphs",
            *_notes(system.device),
            *_named(record, SAMPLING),
        ],
    }


def _measured(
    run: Run, system: L.LightningModule, device: torch.device, steps: int, warmup: int, phases: dict[str, str]
) -> Json:
    """Steps by phase, and steps of which nothing but the end is looked at."""
    clocks = Clock(device), Clock(device, borders=False)
    with watched(system, clocks[0]):
        run(clocks[0], warmup + steps)
    run(clocks[1], warmup + steps)
    taken, alone = (clock.done[warmup:] for clock in clocks)
    totals = [sum(step.values()) for step in taken]
    return {
        "steps": steps,
        "warmup": warmup,
        "step": _spread(totals),
        "unwatched": _spread([sum(step.values()) for step in alone]),
        "phases": {name: _phase([step.get(name, 0.0) for step in taken], totals) for name in phases},
    }


def _spread(seconds: list[float]) -> Json:
    """In milliseconds: mean, median with its 95 % interval, least and distance of the quartiles."""
    timing = Timing.of(seconds)
    named = {"median": timing.median_s, "low": timing.low_s, "high": timing.high_s, "least": timing.min_s}
    spread = {"mean": sum(seconds) / len(seconds), **named, "quartiles": timing.iqr_s}
    return {f"{name}_ms": 1e3 * value for name, value in spread.items()}


def _phase(seconds: list[float], totals: list[float]) -> Json:
    return {"share": sum(seconds) / sum(totals), **_spread(seconds)}


class Recorder(Callback):
    """Records operators by torch.profiler, from the batch `first` on, and writes a Chrome trace where asked."""

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
        if batch_idx == self.first + WATCHED - 1:
            self.end(WATCHED)

    def begin(self) -> None:
        self.profiler.start()

    def end(self, steps: int) -> None:
        self.steps = steps
        self.profiler.stop()
        if self.trace is not None:
            self.profiler.export_chrome_trace(str(self.trace))

    def operators(self, top: int, device: torch.device) -> list[Json]:
        """Those that take most, without what they call: of the device's time on CUDA, else of the processor's."""
        which = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
        events = [e for e in self.profiler.key_averages() if "#" not in e.key]  # marks around an optimiser's step
        whole = sum(getattr(e, which) for e in events) or 1.0
        ordered = sorted(events, key=lambda e: getattr(e, which), reverse=True)[:top]
        return [
            {
                "name": e.key,
                "calls": e.count / self.steps,
                "ms": getattr(e, which) / 1e3 / self.steps,
                "share": getattr(e, which) / whole,
            }
            for e in ordered
        ]


def _trainer(experiment: schema.Config, folder: Path, clock: Clock, steps: int, *callbacks: Callback) -> L.Trainer:
    """As `train` has it, but for what it would write."""
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
        profiler=Hooks(clock),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )


def _device(experiment: schema.Config) -> torch.device:
    cuda = torch.cuda.is_available() and experiment["trainer"]["accelerator"] != "cpu"
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def _waits(experiment: schema.Config, data: L.LightningDataModule) -> list[Counter[str]]:
    """What steps wait for, counted on the meta device."""
    data.setup("fit")
    batches = list(islice(data.train_dataloader(), 3))
    with torch.device("meta"):
        bare = untrained_system(experiment)
    return syncs(bare, batches, experiment["trainer"]["gradient_clip"])


def _counted(waits: list[Counter[str]]) -> Json:
    found = sum(waits, Counter[str]())
    where = {place: n / len(waits) for place, n in found.most_common()}
    return {"host_syncs": {"per_step": found.total() / len(waits), "where": where}}


def _weighed(memory: Memory) -> Json:
    return {"peak_mib": memory.peak_mib, "weights_mib": memory.resident_mib, "memory_method": memory.method}


@contextmanager
def _alone() -> Iterator[None]:
    """The threads and random numbers of others as they were, and silence of what Lightning says of such a training."""
    threads, said = torch.get_num_threads(), logging.getLogger("lightning.pytorch")
    level = said.level
    with torch.random.fork_rng(), warnings.catch_warnings():
        silence_lightning()
        warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*|.*validation_step.*")
        said.setLevel(logging.WARNING)
        try:
            yield
        finally:
            said.setLevel(level)
            torch.set_num_threads(threads)


def table(record: Json) -> str:
    """The record for a reader: a line a phase, the operators, the definitions."""
    step, free = record["step"], record["unwatched"]
    lines = [f"{'phase':<27}{'share':>8}{'mean ms':>11}{'median ms':>11}{'quartiles':>11}"]
    lines += [_line(name, phase) for name, phase in record["phases"].items() if phase["mean_ms"]]
    lines.append(_line("step", {"share": 1.0, **step}))
    lines.append(
        f"unwatched: {free['median_ms']:.4g} ms ({free['low_ms']:.4g} to {free['high_ms']:.4g}) a step, the median of "
        f"{record['steps']}; peak {record['peak_mib']:.1f} MiB"
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
    waited = "the device is waited for at every border of a phase" if device.type == "cuda" else "on the host's clock"
    return [
        f"phases: {waited}; of nested ones the innermost counts, so means add up to the mean step",
        "unwatched: the same steps without borders of phases",
        f"operators: self time by torch.profiler, of {WATCHED} training steps or one image",
    ]


def _training_notes(experiment: schema.Config) -> list[str]:
    """The rest of the definitions."""
    many = experiment["trainer"]["accumulate"]
    return [
        "host synchronisations: counted on the meta device between logging points; transfers that block count too",
        "peak: of a step, with weights, gradients, optimiser and average",
        *(["peak on the CPU: of blocks that are not compiled"] if experiment["trainer"]["compile"] else []),
        *([f"a step is one batch, of {many} that are accumulated"] if many > 1 else []),
    ]


def _named(record: Json, phases: dict[str, str]) -> list[str]:
    """What the phases are that took any time."""
    return [f"{name}: {what}" for name, what in phases.items() if record["phases"][name]["mean_ms"]]
