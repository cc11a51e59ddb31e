"""The table of an ablation of kind quality: metrics, claims, tested differences, notes, plots, same-noise samples."""

import contextlib
import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sana_lab import environment
from sana_lab.ablation import learning_table
from sana_lab.ablation.record import EXACT, SHIPPED, TrialRecord, equal_rows, tier, within_time
from sana_lab.ablation.search.measured import judges
from sana_lab.ablation.search.notes import table_notes
from sana_lab.config import experiments
from sana_lab.config.schema import Ablation, Trial
from sana_lab.config.specs import name_of
from sana_lab.costs.flops import PAIR
from sana_lab.evaluation import noise_seeds, report_files
from sana_lab.evaluation.extractors.inception import hint
from sana_lab.report import significance
from sana_lab.report.claims import verdicts
from sana_lab.report.columns import COLUMNS, PLOTTED_COSTS, SPEEDUPS, column
from sana_lab.report.table import TIER, Table, build_table, load_published, short_commit
from sana_lab.tracking.store import Store
from sana_lab.training import PICTURE
from sana_lab.types import Json

MAX_LINES = 40
"""Most rows of a plot of curves, and of the picture of samples."""


def build(store: Store, ablation: Ablation, trials: Sequence[TrialRecord]) -> Table:
    """The table of what has finished; trials of a search that were pruned are counted under it."""
    notes, trials = table_notes(ablation, trials), [record for record in trials if not record.pruned]
    records, trainings = with_tiers(trials, ablation.columns), learning_table.collect(store, trials)
    notes = [*notes, *measurement_notes(trials), *oracle_notes(trials, ablation.columns)]
    table = tabulate(ablation, records, notes, reports(store, trials))
    return learning_table.with_speedups(table, trainings, baseline_of(ablation, table))


def with_tiers(trials: Sequence[TrialRecord], columns: Sequence[str] = ()) -> list[Json]:
    """The records of trials, with their tier as a label beside those of the axes unless all are exact. Images that were
    chosen by a measure by which one of the columns is judged have a tier of their own."""
    tiers = [tier(record.trial, chooser(record.trial) in judges(columns)) for record in trials]
    records = [record.for_table() for record in trials]
    if {*tiers} == {EXACT}:
        return records
    return [{**r, "labels": {**r["labels"], TIER: name}} for r, name in zip(records, tiers, strict=True)]


def chooser(trial: Trial) -> str | None:
    """The name of the measure that chooses the best of several images of a trial; None without a choice."""
    by = (trial.config.get("sampling") or {}).get("best_by")
    return None if by is None else name_of(by)


def oracle_notes(trials: Sequence[TrialRecord], columns: Sequence[str]) -> list[str]:
    """What rows are whose images a judge of the table has chosen; empty without any."""
    measures = sorted({name for record in trials if (name := chooser(record.trial)) in judges(columns) and name})
    if not measures:
        return []
    return [
        f"Tier: images of oracle rows are chosen by what judges them in columns here ({', '.join(measures)}), an upper "
        "bound of what any choice can reach, and no method; bold is the best of the other rows."
    ]


def baseline_of(ablation: Ablation, table: Table) -> str:
    """The row that others are tested against: the first where none is named."""
    return ablation.baseline or table.rows[0].label


def reports(store: Store, trials: Sequence[TrialRecord]) -> dict[str, Json]:
    """label -> the evaluation's report of the first seed that has finished."""
    by_label: dict[str, Json] = {}
    for record in trials:
        if record.done and record.trial.label not in by_label:
            with contextlib.suppress(FileNotFoundError):
                report = report_files.read(store, record.run_id)
                by_label |= {record.trial.label: report} if report else {}
    return by_label


def tabulate(
    ablation: Ablation, records: Sequence[Json], notes: Sequence[str] = (), reports: Mapping[str, Json] | None = None
) -> Table:
    """The table of records, with published numbers, verdicts on claims, and differences from the baseline (the first
    row where none is named)."""
    table = build_table(
        records,
        title=ablation.title,
        columns=[name for name in ablation.columns if name not in SPEEDUPS],
        notes=[*ablation.notes, *notes],
        machine=f"{environment.cores()} x {environment.cpu_model()}",
        published=load_published(experiments.locate("eval/published", ablation.published))
        if ablation.published
        else None,
    )
    claims = verdicts(table.rows, ablation.expect, ablation.stand_in)
    baseline = baseline_of(ablation, table)
    differences = significance.differences(table.rows, reports or {}, baseline)
    counted = [f"MACs of a guided pair: {PAIR}."] if "tmacs_pair" in {c.name for c in table.columns} else []
    lines = [
        *map(str, claims),
        *significance.note(differences, baseline),
        *counted,
        *noise_note(reports or {}),
        *table.notes,
    ]
    outcomes = [claim._asdict() for claim in claims]
    return replace(table, notes=lines, differences=significance.marked(differences), verdicts=outcomes)


def measurement_notes(trials: Sequence[TrialRecord]) -> list[str]:
    """Definitions of the numbers, from the trials' settings."""
    options = [record.trial.config["eval"] for record in trials]
    metrics = [record.run.metrics for record in trials if record.run is not None]
    notes = equal_rows(trials)
    if counts := [m for m in metrics if "prompts" in m]:
        prompts = sorted({f"{m['prompts']:.0f} prompts, {m['images']:.0f} images" for m in counts})
        seeds = "".join(sorted({noise_words(o) for o in options if o["noise_seeds"] > 1}))
        notes.append(f"Exact and GenEval on shapes: {' or '.join(prompts)} a row{seeds}; same prompts, same noise.")
    if any(o["bench_size"] for o in options):
        sizes = sorted({f"{o['bench_size']} px" for o in options})
        notes.append(
            f"Tokens, MACs, latency, throughput and memory: the row's own modules at {', '.join(sizes)} with random "
            f"input, batch {options[0]['bench_batch']}; MACs of one denoiser forward at batch 1, without guidance."
        )
    if any(tier(record.trial) != EXACT for record in trials):
        notes.append(
            "Tier: exact rows compute every block in every step in the weights' precision; the others approximate, and "
            "are compared with them, not ranked among them: bold is the best of the exact rows."
        )
    notes += shipped_notes(trials) + budget_notes(trials)
    if any("geneval" in m and "fid" not in m for m in metrics):
        notes.append(f"FID is not measured: {hint()}, eval.fid_weights=FILE.")
    return notes


def shipped_notes(trials: Sequence[TrialRecord]) -> list[str]:
    """Rows whose weights ship, grouped by how and where they were trained."""
    labels: dict[tuple[Any, ...], dict[str, None]] = {}
    for record in trials:
        if record.run is not None and SHIPPED in record.run.tags:
            facts = json.loads(record.run.tags[SHIPPED])
            origin = (facts["command"], facts["commit"], facts["date"], facts["machine"])
            labels.setdefault(origin, {})[record.trial.label] = None
    return [
        f"Weights ship with {', '.join(map(repr, rows))}: trained by {command} at commit "
        f"{short_commit(commit or 'unknown')} on {day} on {machine}, here measured only; numbers of the training are "
        "those of that machine."
        for (command, commit, day, machine), rows in labels.items()
    ]


def budget_notes(trials: Sequence[TrialRecord]) -> list[str]:
    """Rows that were trained within a time, with what came of it here."""
    notes = []
    for record in (r for r in trials if r.run is not None and r.done and within_time(r.trial)):
        seconds, metrics = record.trial.config["trainer"]["max_seconds"], record.run.metrics if record.run else {}
        steps, images = (f"{metrics.get(name, 0):,.0f}" for name in ("train_steps", "train_samples"))
        notes.append(
            f"{record.trial.label!r} was trained here within {seconds:g} s, data preparation and pictures included: "
            f"{steps} steps, {images} samples. Another machine takes another number of steps, so it does not repeat."
        )
    return notes


def noise_words(options: Json) -> str:
    """The seeds of the noise of `eval:` options, as part of a note."""
    listed = ", ".join(map(str, noise_seeds.seeds(options)))
    return f", a share of each of {options['noise_seeds']} seeds of noise ({listed})"


def noise_note(reports: Mapping[str, Json]) -> list[str]:
    """How much the headline numbers of a row differ between its seeds of noise; empty for one seed."""
    by_seed = [r["by_noise_seed"]["values"] for r in reports.values() if "by_noise_seed" in r]
    names = [c.name for c in COLUMNS if c.interval and any(c.name in values for values in by_seed)]
    ranges = {n: max(max(v[n]) - min(v[n]) for v in by_seed if n in v) for n in names}
    if not ranges:
        return []
    listed = ", ".join(f"{column(n).heading} {column(n).text(size)}" for n, size in ranges.items())
    return [
        f"Intervals and marks are over the images of all seeds of noise, clustered by prompt. Largest range between "
        f"the seeds of one row: {listed}."
    ]


def plot(store: Store, ablation: Ablation, trials: Sequence[TrialRecord], table: Table, folder: Path) -> list[Path]:
    """Every plot that the finished trials have data for."""
    from sana_lab.report import grids, plots  # matplotlib takes half a second to import

    finished = [record for record in trials if record.done]
    paths = metric_plots(ablation, table, folder)
    if lines := curves(store, finished):
        paths += [plots.curves(lines, folder / "training_loss.png", title=ablation.title)]
    trainings = learning_table.collect(store, finished)
    paths += learning_table.plot(table, trainings, baseline_of(ablation, table), folder)
    images, prompts = samples(store, finished)
    paths += training_pictures(store, finished, folder)
    return paths + ([grids.grid(images, prompts, folder / "samples.png")] if images else [])


def training_pictures(store: Store, finished: Sequence[TrialRecord], folder: Path) -> list[Path]:
    """Copies of the pictures of rows that were trained within a time."""
    paths: list[Path] = []
    for record in finished:
        with contextlib.suppress(FileNotFoundError):
            source = store.file(record.run_id, PICTURE)
            name = source.name if not paths else f"{source.stem}_{len(paths)}{source.suffix}"
            paths.append(Path(shutil.copy(source, folder / name)))
    return paths


def metric_plots(ablation: Ablation, table: Table, folder: Path) -> list[Path]:
    """Plots of quality by row, over its cost, over reconstruction, and over the numeric axis, for measured metrics."""
    from sana_lab.report import plots  # matplotlib takes half a second to import

    measured = {name for row in table.rows for name in row.cells}
    cost = next((name for name in PLOTTED_COSTS if name in ablation.columns), "latency_s")
    paths = []
    for metric in _plotted(measured):
        paths += [plots.quality(table, metric, folder / f"{metric}.png")]
        if cost in measured:
            paths += [plots.tradeoff(table, cost, metric, folder / f"{metric}_{cost}.png")]
        if "psnr" in measured and metric != "psnr":
            paths += [plots.tradeoff(table, "psnr", metric, folder / f"{metric}_psnr.png")]
        if ablation.x:
            paths += [plots.against(table, ablation.x, metric, folder / f"{metric}_by_{ablation.x}.png")]
    return paths


def _plotted(measured: Collection[str]) -> list[str]:
    """The scores of prompts that were measured, else PSNR."""
    scores = [metric for metric in ("exact", "geneval") if metric in measured]
    return scores or [metric for metric in ("psnr",) if metric in measured]


def curves(store: Store, finished: Sequence[TrialRecord]) -> dict[str, list[tuple[int, float]]]:
    """label -> training loss by step, of the first seed of the first MAX_LINES rows that have a curve."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for record in finished:
        if record.trial.label in lines or len(lines) == MAX_LINES:
            continue
        history = store.history(record.run_id, "train/loss")
        if len(history) > 1:
            lines.setdefault(record.trial.label, history)
    return lines


def samples(store: Store, finished: Sequence[TrialRecord]) -> tuple[dict[str, Tensor], list[str]]:
    """label -> images (N, 3, H, W) uint8 of the first seed of the first MAX_LINES rows that have some, and their
    prompts."""
    images: dict[str, Tensor] = {}
    prompts: list[str] = []
    for record in finished:
        if record.trial.label in images or len(images) == MAX_LINES:
            continue
        try:
            arrays = np.load(store.file(record.run_id, "samples.npz"))
        except FileNotFoundError:
            continue
        images[record.trial.label] = torch.from_numpy(arrays["images"])
        prompts = [str(prompt) for prompt in arrays["prompts"]]
    return images, prompts
