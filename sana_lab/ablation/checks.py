"""Checks of an ablation while it loads: seeds, labels, metrics and other names, each with the nearest right answer."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from sana_lab.config.registry import TABLE
from sana_lab.config.schema import Ablation, Config, EfficiencyTable
from sana_lab.config.specs import SpecError, nearest
from sana_lab.report.columns import COLUMNS, column
from sana_lab.report.crossover import SCOPES, tokens_of_label

MAX_TRIALS = 1000
"""Largest number of trials of an ablation: each is composed, built without memory, and a line of the dry run."""

MAX_SEED = 2**32 - 1
"""Largest seed of Lightning and NumPy."""

OF_TRAINING = ("val_loss", "train_s", "train_steps", "train_samples")
"""Metrics of a trial whose system has no evaluation."""

GUEST = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")

MIXER_COSTS = {"layer_ms", "layer_train_ms"}
"""Metrics of the probe `mixer`."""

COSTS = ("gmacs_image", "weights_mib", "energy_j", "prompts", "images", "denoise_s", "decode_s")
"""Metrics of trials and probes that are no columns of the lab's own tables."""


def check_table(table: Ablation | EfficiencyTable, labels: Sequence[str], recipe: str, *, guest: bool) -> None:
    """SpecError for names in an ablation that its rows and metrics do not have; a guest may measure anything."""
    title = f"ablation {recipe!r}"
    check_metrics(table, None if guest else metrics_of(table), title)
    for expectation in table.expect:
        for label in expectation.order:
            _check_name(label, labels, f"{title} expects something of {label!r}, which is no row")
    if isinstance(table, Ablation):
        check_seeds(table.seeds, title)
        if table.baseline is not None:
            _check_name(table.baseline, labels, f"{title} has the baseline {table.baseline!r}, which is no row")
        if table.x is not None:
            check_numeric_axis(table, title)
        return
    _check_timing(table, title)
    first = next(iter(table.axes.values()))
    if table.over not in (None, "before"):
        _check_name(str(table.over), first, f"{title} compares with {table.over!r}, which is no row")
    if table.plot == "crossing" and (odd := next((n for n in labels if tokens_of_label(n) is None), None)):
        raise SpecError(
            f"{title} plots a crossing over tokens, and its row {odd!r} has no number, expected e.g. '1024'"
        )


def check_size(cells: int, seeds: int, recipe: str) -> None:
    """SpecError for more trials than an ablation may have."""
    trials = cells * seeds
    if trials > MAX_TRIALS:
        raise SpecError(
            f"ablation {recipe!r} has {trials} trials (the product of its axes and seeds), expected at most "
            f"{MAX_TRIALS}; split it into several files"
        )


def check_seeds(seeds: Sequence[int], title: str) -> None:
    """SpecError for no seeds, one of them twice, or one out of range."""
    if not seeds:
        raise SpecError(f"{title} has no seeds, expected at least one, such as seeds: [0]")
    if odd := next((s for s in seeds if not 0 <= s <= MAX_SEED), None):
        raise SpecError(f"{title} has the seed {odd}, expected 0 to {MAX_SEED}; the nearest is {_clamped(odd)}")
    if len(set(seeds)) < len(seeds):
        raise SpecError(
            f"{title} has seeds {seeds}, one of them twice, which is no replicate; expected seeds: "
            f"{list(dict.fromkeys(seeds))}"
        )


def check_no_seed(change: Config, words: str, seeds: Sequence[int]) -> None:
    """SpecError if overrides set the seed, which comes from `seeds:`."""
    if "seed" in change:
        value = change["seed"]
        raise SpecError(
            f"{words} sets seed {value!r}, but every row is trained with each of the ablation's seeds {list(seeds)}; "
            f"expected --seeds {value}, or seeds: [{value}] in its file"
        )


def check_labels(labels: Sequence[str], recipe: str) -> None:
    """SpecError if two cells of the axes have the same label, because the table would treat them as replicates."""
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise SpecError(f"ablation {recipe!r} has two rows with the label {twice!r}, expected a label for each")


def check_metrics(table: Ablation | EfficiencyTable, known: set[str] | None, title: str) -> None:
    """SpecError for columns and claims in metrics that are not measured or have no better direction."""
    stand_in = table.stand_in if isinstance(table, Ablation) else {}
    claimed = {expectation.metric for expectation in table.expect}
    for metric in [*table.columns, *claimed, *stand_in.values()] if known is not None else []:
        _check_name(metric, known or (), f"{title} names {metric!r}, which is no metric")
    for metric in stand_in:
        _check_name(metric, claimed, f"{title} has a stand-in for {metric!r}, in which nothing is expected")
    for expectation in table.expect:
        metric = stand_in.get(expectation.metric, expectation.metric)
        if column(metric).better is None:
            raise SpecError(f"{title} expects an order in {metric!r}, of which neither more nor less is better")
        if len(set(expectation.order)) < max(2, len(expectation.order)):
            raise SpecError(f"{title} expects the order {expectation.order}, expected two different rows or more")


def check_evaluates(table: Ablation | EfficiencyTable, system: Any, recipe: str) -> None:
    """SpecError for columns and claims in what only an evaluation measures, where a row's `System` has none."""
    if system.evaluates or not isinstance(table, Ablation):
        return
    claimed = [table.stand_in.get(expectation.metric, expectation.metric) for expectation in table.expect]
    measured = [metric for metric in (*table.columns, *claimed) if metric not in OF_TRAINING and "/" not in metric]
    if measured:
        raise SpecError(
            f"ablation {recipe!r} shows {measured[0]!r}, and its system {type(system).__name__} has no method "
            f"`evaluate`, or encoders without weights, so that only its training is measured; expected columns such as "
            f"{', '.join(OF_TRAINING)}"
        )


def check_numeric_axis(table: Ablation, title: str) -> None:
    """SpecError if `x` is not an axis, or its labels are not finite numbers."""
    assert table.x is not None
    _check_name(table.x, table.axes, f"{title} plots over {table.x!r}, which is no axis")
    for label in table.axes[table.x]:
        try:
            finite = math.isfinite(float(label))
        except ValueError:
            finite = False
        if not finite:
            raise SpecError(f"{title} plots over the axis {table.x!r}, whose label {label!r} is no number")


def metrics_of(table: Ablation | EfficiencyTable) -> set[str]:
    """Names of the metrics that the lab's own measures and probes give."""
    names = {c.name for c in COLUMNS} | set(COSTS)
    if isinstance(table, EfficiencyTable):
        names |= {f"{scope}_{what}" for scope in SCOPES for what in ("ratio", "noise")} | MIXER_COSTS
        names |= {f"{a}_{scope}_{unit}" for a in TABLE["attention"] for scope in SCOPES for unit in ("ms", "gmacs")}
    return names


def has_guest(value: Any) -> bool:
    """Whether plain data name a user's own `module:attribute`, whose metrics are not known."""
    if isinstance(value, dict):
        return any(map(has_guest, value.values()))
    if isinstance(value, list | tuple):
        return any(map(has_guest, value))
    return isinstance(value, str) and GUEST.fullmatch(value) is not None and not value.startswith("experiment:")


def _check_timing(table: EfficiencyTable, title: str) -> None:
    for key, least in (("repeats", 1), ("warmup", 0)):
        if getattr(table, key) < least:
            raise SpecError(f"{title} has {key} {getattr(table, key)}, expected at least {least}")


def _check_name(name: str, names: Iterable[str], words: str) -> None:
    if name not in (all_names := list(names)):
        raise SpecError(f"{words}; {nearest(name, all_names)}")


def _clamped(seed: int) -> int:
    return min(max(seed, 0), MAX_SEED)
