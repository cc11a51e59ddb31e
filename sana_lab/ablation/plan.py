"""The loader of `ablations/*.yaml`: a plan of trials, each with labels, a seed, a kind and a complete configuration.

A file with `base:` compares quality: a trial is an experiment, which is trained, evaluated and benchmarked. A file with
`probe:` compares efficiency: a trial is a probe, which is counted and timed.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sana_lab.ablation import cells, checks
from sana_lab.ablation.samples import AXIS, axis_of
from sana_lab.checkpoints import weights
from sana_lab.config import experiments, specs
from sana_lab.config.experiments import merge, nest
from sana_lab.config.memo import reusing
from sana_lab.config.schema import Ablation, Config, EfficiencyTable, Expectation, Match, Range, Samples, Trial
from sana_lab.config.specs import SpecError, nearest
from sana_lab.report.table import load_published

if TYPE_CHECKING:
    from sana_lab.ablation.search.space import SearchSpace

EXAMPLES = {Ablation: "{attention: {softmax: ..., ...}}", EfficiencyTable: "{model: {a: ..., b: ...}}"}
"""Example of `axes:` by kind of ablation, for error messages."""


class Plan(NamedTuple):
    """An ablation at a scale, expanded to its trials; all of them are checked."""

    name: str  # of the sweep in MLflow, and of its folders under runs/
    table: Ablation | EfficiencyTable
    trials: list[Trial]
    space: "SearchSpace | None" = None  # of a search, whose trials come as they are proposed
    elsewhere: int | None = None  # CUDA devices of a trial on another machine; None: trials run on this one
    at_seeds: "Callable[[Sequence[int]], Plan] | None" = None  # the same at other seeds; None where seeds do not vary

    @property
    def examples(self) -> list[Trial]:
        """Trials that show all settings: every trial, or the corners of the space of a search."""
        return self.trials if self.space is None else self.space.corners

    @property
    def training_devices(self) -> int | None:
        """Devices that a trial trains on, on another machine; None for those of this one."""
        return None if self.elsewhere is None else max(1, self.elsewhere)


def load(
    recipe: str,
    overrides: Sequence[str] = (),
    scale: str | None = None,
    *,
    retrain: bool = False,
    seeds: Sequence[int] | None = None,
) -> Plan:
    """Read an ablation by name or path. SpecError for anything that is wrong in the file or in any of its trials.

    With `retrain` weights that ship for rows are not used, and the name is that of a separate sweep. `seeds` are in
    place of those of the file.
    """
    with reusing():
        return _load(recipe, overrides, scale, retrain, seeds)


def parse_seeds(text: str | None) -> list[int] | None:
    """Seeds of `--seeds`: numbers and ranges with both ends, such as 0-4 or 0,2,7-9. None for None. SpecError."""
    if text is None:
        return None
    seeds: list[int] = []
    for word in text.split(","):
        if not (match := re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", word)):
            raise SpecError(f"--seeds is {text!r}, expected numbers and ranges such as 0-4 or 0,2,7-9")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < first + checks.MAX_TRIALS:
            raise SpecError(f"--seeds has the range {word.strip()}, expected from less to more, such as 0-4")
        seeds += range(first, last + 1)
    return seeds


def _load(
    recipe: str, overrides: Sequence[str], scale: str | None, retrain: bool, given_seeds: Sequence[int] | None
) -> Plan:
    raw = read(recipe)
    if given_seeds is not None and "probe" in raw:
        raise SpecError(f"--seeds is for ablations that train, and {recipe!r} has a probe, which has no seed")
    other_seeds = {} if given_seeds is None else {"seeds": list(given_seeds)}
    table = _parse({**at_scale(raw, scale, recipe), **other_seeds}, recipe)
    seeds = table.seeds if isinstance(table, Ablation) else [0]
    checks.check_size(cells.count(table), len(seeds), recipe)
    cells.check(table, f"ablation {recipe!r}")
    checks.check_labels(_labels(table), recipe)
    if isinstance(table, Ablation) and table.search is not None:
        return _search(table, raw, overrides, scale, recipe, retrain)
    trials = list(
        _probes(table, overrides) if isinstance(table, EfficiencyTable) else _experiments(table, overrides, recipe)
    )
    guest = checks.has_guest([raw, *(trial.config for trial in trials)])
    checks.check_table(table, _labels(table), recipe, guest=guest)
    _check_scales(raw, recipe, guest=guest)
    if isinstance(table, Ablation):
        if table.match is not None:
            from sana_lab.ablation import matching

            table, trials = matching.match_rows(table, trials)
        trials = with_weights(table, trials, retrain)
    at_seeds = partial(_load, recipe, overrides, scale, retrain) if isinstance(table, Ablation) else None
    return Plan(sweep_name(recipe, scale, overrides, retrain), table, trials, at_seeds=at_seeds)


def _check_scales(raw: Config, recipe: str, *, guest: bool) -> None:
    """SpecError for a mistake in any scale, also in those that are not used now."""
    for name in raw.get("scales") or {}:
        other = _parse(at_scale(raw, str(name), recipe), title := f"{recipe}, scale {name}")
        checks.check_table(other, _labels(other), title, guest=guest)


def _search(
    table: Ablation, raw: Config, overrides: Sequence[str], scale: str | None, recipe: str, retrain: bool
) -> Plan:
    """The plan of a search, without trials: `search.proposals.with_proposals` adds those so far."""
    from sana_lab.ablation.search import checks as searches
    from sana_lab.ablation.search.space import SearchSpace

    compose = _composer(table, overrides, recipe)

    def trial(labels: Mapping[str, str], changes: Sequence[Config]) -> Trial:
        return compose(labels, changes, table.seeds[0])._replace(retrain=retrain)

    title, search, space = f"ablation {recipe!r}", specs.build("search", table.search or {}), SearchSpace(table, trial)
    guest = checks.has_guest([raw, *(each.config for each in space.corners)])
    checks.check_table(table, [], recipe, guest=guest)
    _check_scales(raw, recipe, guest=guest)
    searches.check_measure(search, space, None if guest else checks.metrics_of(table), title)
    searches.check_pruner(search, space, title)
    searches.check_space(search, space, title)
    return Plan(sweep_name(recipe, scale, overrides, retrain), table, [], space)


def with_weights(table: Ablation, trials: Sequence[Trial], retrain: bool) -> list[Trial]:
    """The trials, each with the weights that ship for it, or all to be trained from nothing."""
    if retrain or table.weights is None:
        return [trial._replace(retrain=retrain) for trial in trials]
    folder = experiments.weights_folder(table.weights)
    return [trial._replace(weights=weights.shipped(trial.config, folder)) for trial in trials]


def read(recipe: str) -> Config:
    """The YAML of an ablation, unprocessed."""
    return experiments.read(experiments.locate("ablations", recipe))


def compares_efficiency(recipe: str) -> bool:
    """Whether the trials of an ablation are probes, which are not trained."""
    return "probe" in read(recipe)


def sweep_name(recipe: str, scale: str | None, overrides: Sequence[str] = (), retrain: bool = False) -> str:
    """The name of an ablation's runs: recipe, scale, a hash of the overrides, and whether rows that ship are retrained.

    Of a path, its folders below the working directory and the file's name without ending.
    """
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        path = Path(os.path.relpath(path)).with_suffix("")
    parts = [word for part in path.parts if (word := part.strip("./"))]
    changes = hashlib.sha256(json.dumps(list(overrides)).encode()).hexdigest()[:6]
    words = [scale or "", changes if overrides else "", "retrained" if retrain else ""]
    return "-".join([*parts, *filter(None, words)])


def at_scale(raw: Config, scale: str | None, recipe: str) -> Config:
    """An ablation's YAML with the keys that a scale replaces. SpecError for an unknown scale."""
    if scale is None:
        return raw
    scales = raw.get("scales") or {}
    names = {str(name): keys for name, keys in scales.items()} if isinstance(scales, dict) else {}
    if scale not in names:
        raise SpecError(f"ablation {recipe!r} has no scale {scale!r}; {nearest(scale, names)}")
    keys = names[scale] or {}
    if not isinstance(keys, dict) or "scales" in keys:
        raise SpecError(
            f"ablation {recipe!r} has the scale {scale}: {keys!r:.80}, expected keys to replace, such as axes, common, "
            "seeds"
        )
    return {**raw, **{str(key): value for key, value in keys.items()}}


def _parse(raw: Config, recipe: str) -> Ablation | EfficiencyTable:
    schema = EfficiencyTable if "probe" in raw else Ablation
    raw = {"axes": {}, **raw} if raw.get("search") else raw  # its ranges may be all
    options = specs.complete(specs.fields(schema), raw, f"ablation {recipe!r}", recipe)
    written = {k: raw[k] for k in ("axes", "common", "probe") if raw.get(k) is not None}  # types are those of parts
    options = {**options, **written}
    axes = _with_text_labels(options["axes"], recipe)
    for change in (options.get("common"), options.get("probe"), *(c for axis in axes.values() for c in axis.values())):
        _check_keys(change or {}, recipe)
    if options["published"] is not None:
        load_published(experiments.locate("eval/published", options["published"]))
    records: dict[str, Any] = {"axes": axes, "expect": [Expectation(**e) for e in options["expect"]]}
    if options.get("samples"):
        samples = Samples(**{**options["samples"], "ranges": _ranges(options["samples"]["ranges"])})
        records |= {"samples": samples, "axes": {**axes, AXIS: axis_of(samples, f"ablation {recipe!r}")}}
    if options.get("match"):
        records["match"] = Match(**options["match"])
    if options.get("ranges"):
        records["ranges"] = _ranges(options["ranges"])
    table = schema(**{**options, **records})
    if isinstance(table, Ablation):
        from sana_lab.ablation.search.checks import check_options

        check_options(table, f"ablation {recipe!r}")
        if table.search is not None:
            return table
    if not table.axes or not all(table.axes.values()):
        raise SpecError(f"ablation {recipe!r} has no axes with labels; expected axes: {EXAMPLES[schema]}")
    return table


def _ranges(given: Mapping[str, Config]) -> dict[str, Range]:
    return {str(path): Range(**limits) for path, limits in given.items()}


def _with_text_labels(axes: Mapping[Any, Mapping[Any, Any]], recipe: str) -> dict[str, dict[str, Any]]:
    """Axes with numeric labels converted to text. SpecError for YAML booleans, and for both 1 and '1'."""
    for axis, changes in axes.items():
        for label in (axis, *changes):
            if isinstance(label, bool) or not isinstance(label, str | int | float):
                raise SpecError(
                    f"{recipe}.axes.{axis} has the label {label!r} ({type(label).__name__}), expected text; write it "
                    "in quotes, such as 'on'"
                )
        checks.check_labels([str(label) for label in changes], recipe)
    return {str(axis): {str(label): change for label, change in changes.items()} for axis, changes in axes.items()}


def _check_keys(change: Mapping[Any, Any], recipe: str) -> None:
    """SpecError for a key of overrides that is no dotted path."""
    for key in change:
        if not isinstance(key, str) or not all(key.split(".")):
            raise SpecError(
                f"ablation {recipe!r} has an override {key!r}, expected a path such as system.dit.attention"
            )


def _combinations(table: Ablation | EfficiencyTable) -> Iterator[tuple[dict[str, str], list[Config]]]:
    """Each cell of the axes: its label on each axis, and the overrides of these labels."""
    for cell in cells.cells(table):
        yield cell, [nest(change) for change in cells.changes_of(table, cell)]


def _experiments(table: Ablation, overrides: Sequence[str], recipe: str) -> Iterable[Trial]:
    compose = _composer(table, overrides, recipe)
    for seed in table.seeds:
        for labels, changes in _combinations(table):
            yield compose(labels, changes, seed)


def _composer(
    table: Ablation, overrides: Sequence[str], recipe: str
) -> Callable[[Mapping[str, str], Sequence[Config], int], Trial]:
    """The trial of labels, their overrides and a seed. SpecError for a seed among overrides."""
    checks.check_seeds(table.seeds, f"ablation {recipe!r}")
    given = [item for item in overrides if item.partition("=")[0] == "seed"]
    checks.check_no_seed(experiments.apply({}, given), f"{' '.join(given)} of ablation {recipe!r}", table.seeds)
    common, base = nest(table.common), experiments.compose(table.base)
    checks.check_no_seed(common, f"common: of ablation {recipe!r}", table.seeds)

    def compose(labels: Mapping[str, str], changes: Sequence[Config], seed: int) -> Trial:
        config = base
        for change in (common, *changes):
            checks.check_no_seed(change, f"{_label(labels)!r} of ablation {recipe!r}", table.seeds)
            config = merge(config, experiments.with_suite(change))
        prompts = {"prompts": table.prompts} if table.prompts else {}
        config = experiments.apply({**config, **prompts, "seed": seed}, overrides)
        return Trial(dict(labels), seed, experiments.complete(config, _title(table, labels)))

    return compose


def _probes(table: EfficiencyTable, overrides: Sequence[str]) -> Iterable[Trial]:
    """Build each probe once, without allocation, to raise errors of options early."""
    for labels, changes in _combinations(table):
        spec: dict[str, Any] = nest(table.probe)
        for change in changes:
            spec = merge(spec, change)
        resolved = specs.resolve("probe", experiments.apply(spec, overrides), _title(table, labels))
        specs.build("probe", resolved)
        config = {"probe": resolved, "repeats": table.repeats, "warmup": table.warmup}
        yield Trial(labels, 0, config, "efficiency")


def _title(table: Ablation | EfficiencyTable, labels: Mapping[str, str]) -> str:
    return f"{table.title}: {_label(labels)}"


def _labels(table: Ablation | EfficiencyTable) -> list[str]:
    """The labels of the rows."""
    return [_label(labels) for labels, _ in _combinations(table)]


def _label(labels: Mapping[str, str]) -> str:
    return " · ".join(labels.values())
