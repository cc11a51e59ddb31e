"""Train the rows of `quickstart` and of the paper's ablations on one CUDA device: python benchmarks/train_on_gpu.py

Several processes share the device, each taking the next model of a list by priority (`trainings.py`): quickstart
first, then autoencoders that rows need, then the nine ablations under ablations/paper at toy size, with three seeds.
Latents are encoded once for each world, by all processes that wait for them. A model has a budget of seconds; one
that crashes, hangs or runs out of it costs none of the others (`sections.py`). Weights go to runs/models/HASH, where
`ablate` and `ship` look for them, and as fp16 with cards to `--out`; each end is a line of results.jsonl there, the
last output a table.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import archives
import sections
import torch
import trainings
from sections import Section
from trainings import Board, Model

from sana_lab.ablation import shipping
from sana_lab.checkpoints import weights
from sana_lab.config import hashing
from sana_lab.config.schema import Config
from sana_lab.types import Json

FOLDER = Path(__file__).parent
COMPILED_STEPS = 5000  # a model of as many steps or more earns back the time of compiling its blocks
RATE = 25.0  # steps per second of a process that shares the device, for --dry-run: assumed, not measured
PREPARATION_S = 120.0  # of the hard limit of a model, beside its budget: data, compiling
MARGIN_S = 25.0  # of --seconds, for writing archives


def main(given: Sequence[str] | None = None) -> int:
    options, start = arguments(given), time.time()
    if options.take:
        return archives.take(options.take)
    if not (options.dry_run or options.rehearse or torch.cuda.is_available()):
        print(
            "no CUDA device here: nothing was trained (--dry-run lists the models, --rehearse 10 tries them on the CPU)"
        )
        return 0
    models = trainings.listed(options.seeds, options.only)
    if options.dry_run:
        print(listing(models, options.budget))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        lines = _drive(models, options, Path(work), start + options.seconds - MARGIN_S)
    for line in archives.pack(models, options.out, options.pack) if options.pack else []:
        print(line)
    print(table(models, lines))
    return 0 if all(_status(m, lines) == "trained" for m in models) else 1


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=480, help="in all, with the time to write out")
    parser.add_argument("--budget", type=float, default=300, help="seconds of training of one model")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="processes at a time")
    parser.add_argument("--out", type=Path, default=Path("runs", "gpu"), help="folder of weights and results.jsonl")
    parser.add_argument("--pack", type=Path, help=f"folder of archives, {archives.ALL_MIB:g} MiB in all")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(trainings.SEEDS), help="of the rows")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="models whose name has one of these")
    parser.add_argument("--dry-run", action="store_true", help="list models, hashes and seconds")
    parser.add_argument("--rehearse", type=int, metavar="STEPS", help="few steps of each model, on any device")
    parser.add_argument("--take", type=Path, metavar="FOLDER", help="move archives of --pack to runs/models/HASH")
    return parser.parse_args(given)


def listing(models: Sequence[Model], budget: float) -> str:
    """A line for each model: hash, steps, seconds at `RATE`, at most the budget, and rows."""
    lines = [f"{'model':<18}{'steps':>7}{'seconds':>9}  row"]
    for model in models:
        seconds = min(budget, model.steps / RATE)
        state = " (trained)" if weights.trained(model.config) else ""
        rows = "; also ".join([model.name, *model.others])
        lines.append(f"{model.hash:<18}{model.steps:>7}{seconds:>9.0f}  {rows}{state}")
    total = sum(min(budget, m.steps / RATE) for m in models)
    each = f"at {RATE:g} steps/s a process, assumed; a model has at most {budget:g} s"
    return "\n".join([*lines, f"{len(models)} models, {total:.0f} s of processes ({each})"])


def _drive(models: Sequence[Model], options: argparse.Namespace, work: Path, end: float) -> list[Json]:
    """Start the worker processes and return the lines of their results; nothing runs after `end`."""
    trainings.write(work / "models.json", models)
    settings = {"budget": options.budget, "end": end, "rehearse": options.rehearse, "out": str(options.out.absolute())}
    (work / "settings.json").write_text(json.dumps(settings))
    paths = os.pathsep.join([str(FOLDER), str(FOLDER.parent), os.environ.get("PYTHONPATH", "")])
    environment = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    place = sections.Place("train_on_gpu", options.out / "results.jsonl", [f"--work={work}"], environment)
    limit = max(0.0, end - time.time())
    names = [f"worker {i}" for i in range(min(options.workers, len(models)))]
    return sections.drive_together([Section(n, limit, options.budget + PREPARATION_S) for n in names], place)


# A worker's process, called by `sections.child`


class Context(NamedTuple):
    """Settings of a worker's process."""

    board: Board
    budget: float  # seconds of training of one model
    end: float  # time.time() after which nothing is begun
    rehearse: int | None  # steps of each model, where they are not trained in full
    out: Path
    device: str


class Turn:
    """The worker's next model, claimed when its turn comes."""

    def __init__(self, worker: str, board: Board) -> None:
        self.worker, self.board = worker, board
        self.model: Model | None = None


class BudgetUsed(Exception):
    """A model's training was stopped by its budget."""


def context(rest: Sequence[str]) -> Context:
    """The board, and the place of weights; a rehearsal has its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path)
    work: Path = parser.parse_args(rest).work
    settings = json.loads((work / "settings.json").read_text())
    out = Path(settings.pop("out"))
    if settings["rehearse"]:
        weights.HOME = out / "rehearsal"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Context(Board(work, trainings.read(work / "models.json")), out=out, device=device, **settings)


def builders(section: str, context: Context) -> Iterator[Turn]:
    """A turn for as long as there are models; waits for those that rows need."""
    context.board.close(section)
    while context.board.unclaimed() and time.time() < context.end:
        if context.board.can_claim():
            yield Turn(section, context.board)
        else:
            time.sleep(0.2)


def label(turn: Turn) -> str:
    """Claim a model: its name."""
    turn.model = turn.board.claim(turn.worker)
    return "no model is left" if turn.model is None else turn.model.name


def run(turn: Turn, context: Context) -> Iterator[Json]:
    """Train the turn's model, write its weights to `out`, and print the record."""
    if (model := turn.model) is None:
        return
    trained = False
    try:
        record = {"model": model.hash, "case": model.name, **_trained(model, context)}
        trained = "file" in record
        print(json.dumps(record), flush=True)
        yield record
    finally:
        context.board.end(model, trained)


def is_usable(context: Context) -> bool:
    """Whether the device still answers after an error."""
    try:
        return bool((torch.ones(8, device=context.device) * 2).sum().item() == 16)
    except RuntimeError:
        return False


def _trained(model: Model, context: Context) -> Json:
    """The record of a model's training: its file and speed, or why there is none."""
    lacks = [m.name for m in context.board.models if m.hash in model.needs and not context.board.is_trained(m.hash)]
    if lacks:
        return {"why": f"needs {', '.join(lacks)}, which was not trained"}
    pace = Pace(context.budget, context.end)
    try:
        source, compiled = _train(model, context, pace)
    except BudgetUsed as error:
        return {"why": str(error), "step": pace.step, "steps_per_s": pace.rate}
    file, card = context.out / f"{model.hash}.safetensors", weights.card(source)
    shipping.write(file, source, {**card, "command": "python benchmarks/train_on_gpu.py", "dtype": "float16"})
    numbers = {"steps": card["steps"], "seconds": card["seconds"], "steps_per_s": pace.rate, "compiled": compiled}
    return {"file": file.name, "seed": model.seed, **numbers, "val_loss": card["measured"].get("val/loss")}


def _train(model: Model, context: Context, pace: "Pace") -> tuple[Path, bool]:
    """The weights of a model, and whether its blocks were compiled; where compiling fails, they are not."""
    from sana_lab.training import train

    config = model.config
    if context.rehearse:
        config = trainings.rehearsed(config, context.rehearse, weights.HOME)
    if context.device == "cuda" and "dit" in config["system"] and model.steps >= COMPILED_STEPS:
        try:
            return train.train(_placed(config, context, True), name=model.name, progress=pace), True
        except BudgetUsed:
            raise
        except Exception as error:
            print(f"{model.name}: trained without compiling, since {type(error).__name__}: {error}"[:500], flush=True)
    path = train.train(_placed(config, context, False), name=model.name, progress=pace)
    if context.rehearse:  # models that need it look for it under its own hash
        path = archives.copied(path, weights.HOME / "models" / model.hash / path.name)
    return path, False


def _placed(config: Config, context: Context, compiled: bool) -> Config:
    """The experiment with options for this device; its hash is the same. ValueError if it is not."""
    experiment = trainings.placed(config, context.device, compiled)
    if hashing.experiment_hash(experiment) != hashing.experiment_hash(config):
        raise ValueError("options for this device change the hash of the model")
    return experiment


class Pace:
    """Progress of a training: step and speed. BudgetUsed where the budget, or the time of all, ends before it."""

    def __init__(self, budget: float, end: float) -> None:
        self.budget, self.end = budget, end
        self.first: tuple[int, float] | None = None  # step and time of the first report
        self.step, self.seconds = 0, 0.0

    def __call__(self, step: int, steps: int, text: str = "") -> None:
        now = time.time()
        self.first = self.first or (step, now)
        self.step, self.seconds = step, now - self.first[1]
        if step < steps and (self.seconds > self.budget or now > self.end):
            raise BudgetUsed(f"stopped at step {step} of {steps}, after {self.seconds:.0f} s of training")

    @property
    def rate(self) -> float | None:
        """Steps per second since the first report; None before the second."""
        return None if self.first is None or not self.seconds else round((self.step - self.first[0]) / self.seconds, 1)


# What comes back


def _status(model: Model, lines: Sequence[Json]) -> str:
    """`trained`, or why a model is not."""
    own = [line for line in lines if line.get("case") == model.name]
    if any("file" in line for line in own):
        return "trained"
    reasons = [line.get("error") or line.get("why") for line in own]
    return next(filter(None, reversed(reasons)), "stopped at the end" if own else "not begun")


def table(models: Sequence[Model], lines: Sequence[Json]) -> str:
    """A row for each model, and how many are trained."""
    rows = [f"{'model':<18}{'steps':>7}{'seconds':>9}{'steps/s':>9}{'val loss':>10}  row"]
    ends = {line["model"]: line for line in lines if "file" in line}
    for model in models:
        line, status = ends.get(model.hash, {}), _status(model, lines)
        cells = [_cell(line, "steps", "d", 7), _cell(line, "seconds", ".0f", 9), _cell(line, "steps_per_s", ".1f", 9)]
        why = "" if line else f": {status}"
        rows.append(f"{model.hash:<18}{''.join(cells)}{_cell(line, 'val_loss', '.4f', 10)}  {model.name}{why}")
    return "\n".join([*rows, f"{len(ends)} of {len(models)} models trained"])


def _cell(line: Json, key: str, form: str, width: int) -> str:
    value = line.get(key)
    return ("-" if value is None else format(value, form)).rjust(width)


if __name__ == "__main__":
    sys.exit(main())
