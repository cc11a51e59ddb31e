"""Search `optuna`: proposals by a sampler of Optuna (`pip install sana_lab[search]`)."""

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Le

from sana_lab.ablation.checks import MAX_TRIALS
from sana_lab.ablation.samples import rounded
from sana_lab.ablation.search import Observation, Search, Space, Values
from sana_lab.config.ranges import Number, Seed
from sana_lab.config.schema import Range
from sana_lab.config.specs import Spec

if TYPE_CHECKING:
    import optuna

SAMPLED = 20
"""Attempts by the sampler, before a point is random."""


class OptunaSearch(Search):
    """A sampler of Optuna over axes and ranges. Points beside running trials differ (constant liar)."""

    def __init__(
        self,
        trials: Annotated[int, Ge(1), Le(MAX_TRIALS)] = 20,  # proposals, those that are pruned or fail included
        measure: str = "val_loss",  # metric that decides, such as val_loss, exact or geneval
        direction: Literal["higher", "lower"] | None = None,  # which values are better; null is as the table marks it
        # Tree-structured Parzen estimator, a Gaussian process, or uniform points.
        sampler: Literal["tpe", "gp", "random"] = "tpe",
        startup: Number = 10,  # uniform points before the sampler uses results
        pruner: Annotated[Spec | None, "pruner"] = None,  # what ends trainings early; null trains all to their end
        seed: Seed = 0,  # of the proposals
    ) -> None:
        self.trials, self.measure, self.direction, self.pruner = trials, measure, direction, pruner  # type: ignore[assignment]
        self.sampler, self.startup, self.seed = sampler, startup, seed

    def check(self) -> None:
        if importlib.util.find_spec("optuna") is None:
            raise ImportError("search 'optuna' needs Optuna: pip install 'sana_lab[search]'")

    def describe(self) -> str:
        return f"optuna, sampler {self.sampler} with seed {self.seed}"

    def propose(self, space: Space, history: Sequence[Observation], attempt: int, *, lower: bool) -> Values:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        distributions = {name: distribution(choices) for name, choices in space.items()}
        study = optuna.create_study(
            direction="minimize" if lower else "maximize",
            sampler=self._sampler(len(history), attempt),
            pruner=optuna.pruners.NopPruner(),
        )
        study.add_trials([frozen(each, distributions) for each in history])
        values = study.ask(distributions).params
        return {k: rounded(c, values[k]) if isinstance(c, Range) else values[k] for k, c in space.items()}

    def _sampler(self, number: int, attempt: int) -> "optuna.samplers.BaseSampler":
        """A sampler for one proposal: its random numbers are those of the number, not of proposals before it."""
        import optuna

        seed = int(np.random.SeedSequence([self.seed, number, attempt]).generate_state(1)[0])
        if self.sampler == "random" or attempt >= SAMPLED:
            return optuna.samplers.RandomSampler(seed=seed)
        if self.sampler == "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=self.startup)
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=self.startup, constant_liar=True)


def distribution(choices: Sequence[str] | Range) -> Any:
    """Optuna's form of labels or a range."""
    import optuna

    if not isinstance(choices, Range):
        return optuna.distributions.CategoricalDistribution(list(choices))
    if choices.integer:
        low, step = int(choices.low), 1 if choices.log else choices.step  # Optuna has no steps of logarithms
        high = low + (int(choices.high) - low) // step * step
        return optuna.distributions.IntDistribution(low, high, log=choices.log, step=step)
    return optuna.distributions.FloatDistribution(choices.low, choices.high, log=choices.log)


def frozen(each: Observation, distributions: dict[str, Any]) -> Any:
    """Optuna's form of a trial."""
    import optuna

    states = optuna.trial.TrialState
    state = {"finished": states.COMPLETE, "pruned": states.PRUNED, "running": states.RUNNING, "failed": states.FAIL}
    return optuna.trial.create_trial(
        state=state[each.state],
        value=each.value,
        params=each.values,
        distributions=distributions,
        intermediate_values=dict(each.rungs),
    )
