"""Stages of an experiment: trainings after each other, each of which begins from the model of the one before.

`stages:` of an experiment is a mapping from a name to what differs in that stage from the rest of the file.
`NAME@STAGE` is an experiment of its own, with the stage before as its parent; `NAME` is the last one.
"""

from typing import Any

from sana_lab.config.validation import SpecError, nearest, opened

Config = dict[str, Any]

KEY = "stages"
SIGN = "@"


def split(name: str) -> tuple[str, str | None]:
    """The name of an experiment, and the stage that follows it, if there is one; paths may hold the sign."""
    title, sign, stage = name.rpartition(SIGN)
    in_path = "/" in stage or stage.endswith((".yaml", ".yml"))
    return (title, stage) if sign and title and stage and not in_path else (name, None)


def names(config: Config, title: str) -> list[str]:
    """The stages of a configuration in their order; [] if it has none. SpecError."""
    return list(_stages(config, title))


def choose(config: Config, title: str, stage: str | None) -> tuple[Config, Config]:
    """A configuration without its stages, and what differs in one, by default the last; {} without stages.

    SpecError with the nearest stage.
    """
    stages = _stages(config, title)
    rest = {key: value for key, value in config.items() if key != KEY}
    if not stages:
        if stage is not None:
            raise SpecError(
                f"experiment {title!r} has no stages, and {title}{SIGN}{stage} names one; expected {title!r}"
            )
        return rest, {}
    order = list(stages)
    stage = order[-1] if stage is None else stage
    if stage not in stages:
        raise SpecError(f"experiment {title!r} has no stage {stage!r}; {nearest(stage, order)}")
    changes, index = stages[stage], order.index(stage)
    if not index:
        return rest, changes
    given = opened(changes.get("parent")) or {}
    before = {"weights": f"experiment:{title}{SIGN}{order[index - 1]}"}
    return rest, {**changes, "parent": {**before, **given}}


def _stages(config: Config, title: str) -> dict[str, Config]:
    stages = opened(config.get(KEY)) or {}
    if not isinstance(stages, dict):
        raise SpecError(f"stages of {title!r} are {stages!r}; expected a mapping from a name to what differs in it")
    for name, changes in stages.items():
        if not isinstance(opened(changes), dict) or SIGN in str(name):
            raise SpecError(
                f"stage {name!r} of {title!r} is {changes!r}; expected a name without {SIGN}, and a mapping of what "
                "differs, such as {data: {size: 1024}}"
            )
    return {str(name): opened(changes) for name, changes in stages.items()}
