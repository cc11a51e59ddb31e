"""Parameters of a trial's run in MLflow: labels on the axes, seed, and the options in which trials differ."""

from collections.abc import Collection, Sequence

from sana_lab.config import interpolation
from sana_lab.config.schema import Trial
from sana_lab.tracking.store import clean, flatten

AXIS = "axis."
"""Beginning of the parameters that hold a trial's labels, so that charts can group by them."""


def differing(trials: Sequence[Trial]) -> list[str]:
    """Options, as flat keys, in which trials of one seed differ; those that only some have count as different."""
    flat = [flatten(interpolation.as_written(t.config)) for t in trials if t.seed == trials[0].seed]
    keys = dict.fromkeys(key for config in flat for key in config)
    return [key for key in keys if key != "seed" and len({config.get(key) for config in flat}) > 1]


def of_trial(trial: Trial, keys: Collection[str]) -> dict[str, str]:
    """The parameters of a trial; `keys` are those of `differing`."""
    flat = flatten(interpolation.as_written(trial.config))
    labels = {f"{AXIS}{axis}": label for axis, label in trial.labels.items()}
    return {**labels, "seed": str(trial.seed), **{key: flat[key] for key in keys if key in flat}}


def axes_of(trial: Trial) -> dict[str, str]:
    """The parameters that hold the labels of a trial, under MLflow's keys."""
    return {clean(f"{AXIS}{axis}"): label for axis, label in trial.labels.items()}
