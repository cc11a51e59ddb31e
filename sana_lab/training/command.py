"""Command `sana-lab train`: train an experiment under an MLflow run, and say how to go on from it."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from sana_lab.checkpoints import weights
from sana_lab.config import experiments, hashing, specs
from sana_lab.config.schema import Config
from sana_lab.config.specs import SpecError
from sana_lab.costs.out_of_memory import first_line
from sana_lab.tracking.store import Store
from sana_lab.training import parent, ranks
from sana_lab.training.checks import check, system_on_meta, warn_slow_precision
from sana_lab.training.points import PointEvaluation, lacking, line
from sana_lab.training.recording import recorded
from sana_lab.training.resume import latest
from sana_lab.training.terminated import interrupt_on_sigterm
from sana_lab.training.train import Reporting, as_yaml, train_alone


def main(
    name: str,
    overrides: Sequence[str],
    dry_run: bool,
    evaluation: PointEvaluation | None = None,
    more: int | None = None,
    force: bool = False,
) -> None:
    """The verb: train an experiment and those it takes weights from under MLflow runs, or print it.

    `evaluation` measures the points of `eval.at` and `eval.every`. With `more` a finished model goes on for so many
    steps, as a new one. SpecError where memory or disk clearly do not suffice, unless `force`.
    """
    if more is not None:
        overrides = [*overrides, *_onwards(name, overrides, more)]
    experiment = experiments.load(name, overrides)
    check(experiment)
    if weights.trained(experiment) is None:
        warn_slow_precision(experiment["trainer"])
    if dry_run:
        specs.build("data", experiment["data"]).check_content()
        print(as_yaml(experiment), end="")
        trained = "yes" if weights.trained(experiment) else "no"
        print(f"# hash {hashing.experiment_hash(experiment)}; trained: {trained}")
        texts = [*_cost(experiment, name), *(f"parent: {line}" for line in _ancestry(experiment)), *_stages(name)]
        print("".join(f"# {text}\n" for text in texts), end="")
        return
    ranks.check_available(experiment["trainer"])
    if not force:
        _check_fits(experiment, name)
    ranks.join(experiment["trainer"])
    for prerequisite in experiments.prerequisites(experiment):
        if ranks.first(lambda: weights.ready(experiments.load(prerequisite))) is None:  # noqa: B023  (called at once)
            main(prerequisite, [], False, evaluation, force=True)
    path = ranks.first(lambda: weights.trained(experiment))
    if path is not None:
        lacks = lacking(path, experiment)
        text = "\n".join([f"{name} is trained already: {path}", *([lacks] if lacks else []), _further(name, overrides)])
    else:
        _say_other_steps(name, overrides)
        text = f"trained: {_tracked(experiment, name, evaluation)}"
    if ranks.is_first():
        print(text)


def _stages(name: str) -> list[str]:
    """The stages of an experiment, and whether they are trained."""
    stages = {stage: experiments.load(stage) for stage in experiments.stages_of(name)}
    steps = {stage: f"{config['trainer']['max_steps']:,} steps" for stage, config in stages.items()}
    return [
        f"stage {stage}: {steps[stage]}, {'trained' if weights.trained(config) else 'not trained'}"
        for stage, config in stages.items()
    ]


def _onwards(name: str, overrides: Sequence[str], more: int) -> list[str]:
    """Overrides with which a finished model goes on for `more` steps. SpecError if it is not trained."""
    if more < 1:
        raise SpecError(f"--more is {more}; expected a number of steps from 1")
    experiment = experiments.load(name, overrides)
    path = weights.find_trained(experiment, name)
    resumes = latest(path.parent) is not None
    steps = more + (int(weights.card(path)["steps"]) if resumes else 0)
    budgets = ["trainer.max_images=null", "trainer.max_flops=null", f"trainer.max_steps={steps}"]
    return [f"parent.weights={path}", f"parent.resume={str(resumes).lower()}", *budgets]


def _ancestry(experiment: Config) -> list[str]:
    """What a training takes from its parent, in words."""
    system, _ = system_on_meta(experiment["system"])
    return parent.check(system, experiment)


def _cost(experiment: Config, name: str) -> list[str]:
    """The cost of a training in words, and whether this machine has what it takes: it may be meant for another."""
    from sana_lab.bench import training_cost, training_memory
    from sana_lab.training import fits

    try:
        cost = training_cost.training_cost(experiment, ranks.count(experiment))
    except (specs.SpecError, NotImplementedError, RuntimeError) as error:  # RuntimeError of a part of the user's own
        return [f"cost unknown: {first_line(error)}"]
    return [*cost.lines(), *training_memory.sampling_lines(experiment), *fits.lines(experiment, name)]


def _check_fits(experiment: Config, name: str) -> None:
    from sana_lab.training import fits

    fits.check(experiment, name)


def _say_other_steps(name: str, overrides: Sequence[str]) -> None:
    """Print how to go on from the same experiment with other steps, where it is trained."""
    others = [override for override in overrides if not override.startswith("trainer.max_steps=")]
    path = weights.trained(experiments.load(name, others)) if len(others) < len(overrides) else None
    if ranks.is_first() and path is not None:
        print(f"{name} is trained with other steps: {path}; this trains it anew\n{_further(name, others)}")


def _further(name: str, overrides: Sequence[str]) -> str:
    """How to train on from a finished model: another one, which names it as its parent."""
    command = shlex.join(["sana-lab", "train", name, *overrides, "--more", "N"])
    return f"to train it N steps more, as a new model: {command}"


def _tracked(experiment: Config, name: str, evaluation: PointEvaluation | None) -> Path:
    """Train under an MLflow run, which ends as FINISHED, KILLED or FAILED."""
    store = Store(weights.HOME)
    with interrupt_on_sigterm():
        path = train_alone(experiment, name, lambda: recorded(store, experiment, name), Reporting(None, evaluation))
    if ranks.is_first():
        card = weights.card(path)
        print("\n".join([json.dumps(card["measured"]), *line(card)]))
    return path
