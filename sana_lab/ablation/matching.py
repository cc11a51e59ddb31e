"""Rows that are matched at equal parameters, MACs, images or seconds: an option of each row is chosen to that end."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from sana_lab.config import experiments
from sana_lab.config.experiments import merge, nest
from sana_lab.config.memo import reuse
from sana_lab.config.schema import Ablation, Config, Match, Trial
from sana_lab.config.specs import SpecError, nearest
from sana_lab.costs.flops import count_pair_macs, count_parameters
from sana_lab.systems import System

MOST = 4096
"""Largest multiple of `step` that is tried."""


class Matched(NamedTuple):
    """A row's configuration, the value of its option, and the quantity that it has with it."""

    config: Config
    value: int | float
    quantity: float
    target: float

    @property
    def off(self) -> float:
        """Relative difference from the target."""
        return self.quantity / self.target - 1


def matched(config: Config, target: float, match: Match, title: str) -> Matched:
    """The row with its option at the value that comes nearest to the target. SpecError if none is within the share."""
    if match.equal == "seconds":
        seconds = {"trainer": {"max_seconds": target}}
        return Matched(experiments.complete(merge(config, seconds), title), target, target, target)
    assert match.by is not None

    def at(multiple: int) -> Matched:
        value = multiple * match.step
        changed = experiments.complete(merge(config, nest({str(match.by): value})), title)
        return Matched(changed, value, quantity(changed, match), target)

    best = nearest_of(at, target)
    if abs(best.off) > match.within:
        raise SpecError(
            f"{title} cannot be matched at equal {match.equal}: {match.by} {best.value} has {best.quantity:,.0f}, "
            f"and the target is {target:,.0f} ({best.off:+.1%}), expected within {match.within:.0%}; choose a smaller "
            "match.step"
        )
    return best


def nearest_of(at: Callable[[int], Matched], target: float) -> Matched:
    """The nearest of a quantity that grows with the multiple, by bisection; multiples that cannot be built, such as
    widths that the heads do not divide, are skipped towards larger ones."""
    below = above = _first(at, 1)
    tried = [above.row]
    while above.multiple < MOST and above.row.quantity < target:
        below, above = above, _first(at, 2 * above.multiple)
        tried.append(above.row)
    while above.multiple - below.multiple > 1:
        middle = _first(at, (below.multiple + above.multiple) // 2)
        if middle.multiple >= above.multiple:
            break
        tried.append(middle.row)
        below, above = (middle, above) if middle.row.quantity < target else (below, middle)
    return min(tried, key=lambda row: abs(row.off))


class _Step(NamedTuple):
    multiple: int
    row: Matched


def _first(at: Callable[[int], Matched], multiple: int) -> _Step:
    """The first multiple from this one on that can be built, such as a width that the heads divide."""
    for candidate in range(multiple, multiple + 64):
        try:
            return _Step(candidate, at(candidate))
        except SpecError as error:
            reason = error
    raise reason


def quantity(config: Config, match: Match) -> float:
    """What is held equal: parameters or MACs of the denoiser (else of the system), or images of the training."""
    if match.equal == "images":
        trainer, source = config["trainer"], experiments.source_of(config["data"])
        return float(trainer["max_steps"] * trainer["accumulate"] * source["batch"])
    from sana_lab.training.checks import system_on_meta  # here, as plans are read without the networks

    try:
        system, _ = reuse(("on meta", config["system"]), lambda: system_on_meta(config["system"]))
    except ValueError as error:
        raise SpecError(str(error)) from error
    if match.equal == "parameters":
        return float(count_parameters(system.part("dit") or system)["total"])
    return reuse(("pair macs", config["system"], config["data"]), lambda: _macs(system, config))


def _macs(system: System, config: Config) -> float:
    dit, size = system.part("dit"), experiments.image_size(config["data"])
    if dit is None:
        raise SpecError("rows are matched at equal MACs of their denoiser, and this system has none")
    latent = system.latent_shape(size)  # type: ignore[operator]
    return float(count_pair_macs(dit, latent, system.part("text_encoder").dim))


def match_rows(table: Ablation, trials: Sequence[Trial]) -> tuple[Ablation, list[Trial]]:
    """The ablation with a note on its match, and its trials matched. SpecError."""
    if (match := table.match) is None:
        return table, list(trials)
    check(match, table, trials)
    reference = next((t for t in trials if t.label == match.reference), trials[0])
    target = match.seconds or quantity(reference.config, match)
    rows: dict[str, Matched] = {}
    changed = []
    for trial in trials:
        if trial.label == reference.label and match.equal != "seconds":
            changed.append(trial)
            continue
        title = f"{table.title}: {trial.label}"
        rows[trial.label] = matched(trial.config, target, match, title)
        changed.append(trial._replace(config=rows[trial.label].config))
    return replace(table, notes=[*table.notes, note(match, rows, reference.label)]), changed


def check(match: Match, table: Ablation, trials: Sequence[Trial]) -> None:
    """SpecError for a match without its option or seconds, or with a reference that is no row."""
    title, labels = f"{table.title}: match", [trial.label for trial in trials]
    if match.equal == "seconds" and match.seconds is None:
        raise SpecError(f"{title} is at equal seconds, and says not how many; expected match.seconds")
    if match.equal != "seconds" and match.by is None:
        example = "trainer.max_steps" if match.equal == "images" else "system.dit.dim"
        raise SpecError(f"{title} at equal {match.equal} needs the option that is chosen; expected match.by {example}")
    if match.reference is not None and match.reference not in labels:
        raise SpecError(
            f"{title}.reference is {match.reference!r}, which is no row; {nearest(match.reference, labels)}"
        )


def note(match: Match, rows: Mapping[str, Matched], reference: str) -> str:
    """The line of the table on how rows were matched."""
    if match.equal == "seconds":
        return f"Every row is trained for {match.seconds:g} s."
    name = str(match.by).rpartition(".")[2]
    listed = ", ".join(f"{label!r} {name} {row.value:g} ({row.off:+.1%})" for label, row in rows.items())
    return f"Matched at the {match.equal} of {reference!r} within {match.within:.0%}: {listed}."
