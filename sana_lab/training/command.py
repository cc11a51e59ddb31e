"""Command `sana-lab train`: train an experiment under an MLflow run, and say how to go on from it."""

import json
import shlex
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sana_lab.checkpoints import files, weights
from sana_lab.config import experiments, hashing, specs
from sana_lab.config.registry import WEIGHTED
from sana_lab.config.schema import Config
from sana_lab.costs.out_of_memory import first_line
from sana_lab.tracking.store import Store
from sana_lab.training import ranks
from sana_lab.training.checks import check
from sana_lab.training.points import PointEvaluation, lacking, line
from sana_lab.training.recording import recorded
from sana_lab.training.train import Reporting, as_yaml, train_alone


def main(name: str, overrides: Sequence[str], dry_run: bool, evaluation: PointEvaluation | None = None) -> None:
    """The verb: train an experiment and those it takes weights from under MLflow runs, or print it.

    `evaluation` measures the points of `eval.at` and `eval.every`.
    """
    experiment = experiments.load(name, overrides)
    check(experiment)
    if dry_run:
        specs.build("data", experiment["data"]).check_content()
        print(as_yaml(experiment), end="")
        trained = "yes" if weights.trained(experiment) else "no"
        print(f"# hash {hashing.experiment_hash(experiment)}; trained: {trained}")
        print("".join(f"# {text}\n" for text in _cost(experiment, name)), end="")
        return
    ranks.check_available(experiment["trainer"])
    ranks.join(experiment["trainer"]["accelerator"])
    for prerequisite in experiments.prerequisites(experiment):
        if ranks.first(lambda: weights.ready(experiments.load(prerequisite))) is None:  # noqa: B023  (called at once)
            main(prerequisite, [], False, evaluation)
    path = ranks.first(lambda: weights.trained(experiment))
    if path is not None:
        lacks = lacking(path, experiment)
        text = "\n".join(
            [f"{name} is trained already: {path}", *([lacks] if lacks else []), _further(name, overrides, path)]
        )
    else:
        _say_other_steps(name, overrides)
        text = f"trained: {_tracked(experiment, name, evaluation)}"
    if ranks.is_first():
        print(text)


def _cost(experiment: Config, name: str) -> list[str]:
    """The cost of a training in words, and whether this machine's memory is enough: it may be meant for another."""
    from sana_lab.bench import training_cost

    try:
        cost = training_cost.training_cost(experiment, ranks.count(experiment))
    except (specs.SpecError, NotImplementedError, RuntimeError) as error:  # RuntimeError of a part of the user's own
        return [f"cost unknown: {first_line(error)}"]
    try:
        training_cost.check_fits(cost, name)
    except specs.SpecError as error:
        return [*cost.lines(), f"does not fit this machine: {error}"]
    return cost.lines()


def _say_other_steps(name: str, overrides: Sequence[str]) -> None:
    """Print how to go on from the same experiment with other steps, where it is trained."""
    if ranks.is_first() and (path := _with_other_steps(name, overrides)) is not None:
        print(f"{name} is trained with other steps: {path}; this trains it anew\n{_further(name, overrides, path)}")


def _with_other_steps(name: str, overrides: Sequence[str]) -> Path | None:
    """The weights of the same experiment without an override of its steps, where it is trained."""
    others = [override for override in overrides if not override.startswith("trainer.max_steps=")]
    return weights.trained(experiments.load(name, others)) if len(others) < len(overrides) else None


def _further(name: str, overrides: Sequence[str], path: Path) -> str:
    """How to train on from finished weights: another experiment, whose trained parts begin with them."""
    trained = {tensor.partition(".")[0] for tensor in files.tensor_names(path)}
    starts = [f"system.{kind}.weights={path}" for kind in WEIGHTED if kind in trained]
    if not starts:
        return "more steps train it anew: trainer.max_steps=N"
    others = [override for override in overrides if not override.startswith("trainer.max_steps=")]
    command = shlex.join(["sana-lab", "train", name, *others, *starts, "trainer.max_steps=N"])
    return f"to train N steps more from these weights: {command}"


def _tracked(experiment: Config, name: str, evaluation: PointEvaluation | None) -> Path:
    """Train under an MLflow run, which ends as FINISHED, KILLED or FAILED."""
    store = Store(weights.HOME)
    with interrupt_on_sigterm():
        path = train_alone(experiment, name, lambda: recorded(store, experiment, name), Reporting(None, evaluation))
    if ranks.is_first():
        card = weights.card(path)
        print("\n".join([json.dumps(card["measured"]), *line(card)]))
    return path


@contextmanager
def interrupt_on_sigterm() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM within the block, as on Ctrl-C. Signals are those of the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
