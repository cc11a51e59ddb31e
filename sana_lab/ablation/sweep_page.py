"""The page of a sweep in MLflow: its run's name, description, numbers and tags answer the question of the ablation."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from sana_lab.ablation.record import TrialRecord
from sana_lab.ablation.samples import AXIS
from sana_lab.config.schema import Ablation, EfficiencyTable
from sana_lab.report import render
from sana_lab.report.columns import PLOTTED_COSTS, column, cost_of, is_quality, quality_of
from sana_lab.report.table import Row, Table
from sana_lab.tracking.store import MAX_TAG, Run, Store, artifact_link
from sana_lab.tracking.view import TABLE_AXES, TABLE_COLUMNS

DESCRIPTION = "mlflow.note.content"
"""MLflow's tag with the description of a run, in Markdown."""

SHOWN = 7
"""Most columns of the table in a description."""


class Best(NamedTuple):
    """The rows that the sweep's own numbers come from."""

    metric: str | None  # measure of quality that decides; None if there is none
    best: Row | None
    baseline: Row | None


def write(
    store: Store,
    sweep: str,
    options: Ablation | EfficiencyTable,
    trials: Sequence[TrialRecord],
    table: Table,
    plots: Sequence[Path],
) -> None:
    """Write the answer to the run of the sweep; `plots` are among its artifacts under `table/`."""
    run = store.run(sweep)
    ranking = rank(options, table)
    store.rename(sweep, heading(options))
    names = [c.name for c in table.columns]
    tags: dict[str, object] = {**tags_of(options), TABLE_COLUMNS: json.dumps(names)}
    for role, row in (("best", ranking.best), ("baseline", ranking.baseline)):
        tags |= {f"sana.{role}": row.label if row else None}
    store.set_tags(sweep, {**tags, DESCRIPTION: describe(run, trials, table, plots, ranking)})
    store.log_metrics(sweep, numbers(ranking, names))


def tags_of(options: Ablation | EfficiencyTable) -> dict[str, str | None]:
    """Title, question, columns and axes of an ablation, which the view and tables of several sweeps read."""
    axes = [*options.axes, *([AXIS] if isinstance(options, Ablation) and options.ranges else [])]
    lists = {TABLE_COLUMNS: json.dumps(options.columns), TABLE_AXES: json.dumps(axes)}
    return {"sana.title": options.title, "sana.question": options.question, **lists}


def heading(options: Ablation | EfficiencyTable) -> str:
    """Title and question of an ablation."""
    return f"{options.title}: {options.question}" if options.question else options.title


def rank(options: Ablation | EfficiencyTable, table: Table) -> Best:
    """The best row in the first measure of quality, and the baseline."""
    measured = {name for row in table.rows for name in row.cells}
    metric = quality_of([c.name for c in table.columns], measured)
    label = options.baseline if isinstance(options, Ablation) else None
    baseline = next((row for row in table.rows if row.label == label), table.rows[0] if table.rows else None)
    rows = [row for row in table.rows if metric in row.cells]
    if metric is None or not rows:
        return Best(None, None, baseline)
    sign = -1 if column(metric).better == "lower" else 1
    return Best(metric, max(rows, key=lambda row: sign * row.cells[metric].mean), baseline)


def numbers(ranking: Best, names: Sequence[str]) -> dict[str, float]:
    """The means of the best row and of the baseline in the table's columns."""
    roles = {"best": ranking.best, "baseline": ranking.baseline}
    return {
        f"{role}/{name}": row.cells[name].mean
        for role, row in roles.items()
        if row is not None
        for name in names
        if name in row.cells
    }


def describe(
    run: Run,
    trials: Sequence[TrialRecord],
    table: Table,
    plots: Sequence[Path],
    ranking: Best,
) -> str:
    """The description: answer, table with marks, pictures, links to trials, notes; what does not fit into
    MLflow's limit is in the report."""
    report = artifact_link(run.experiment, run.id, "table/report.html")
    blocks = [
        answer(ranking),
        *(render.markdown_block(part, marked=True) for part in fitting(table, ranking.metric)),
        f"[report.html]({report}) has the same with sortable tables, curves and outcomes by prompt.",
        *pictures(run.id, plots, ranking.metric),
        "\n".join(["Trials, by seed:", *links(run.experiment, trials)]),
        "\n".join(f"- {render.markdown_text(note)}" for note in render.all_notes(table)),
    ]
    return cut([block for block in blocks if block])


def answer(ranking: Best) -> str:
    """One sentence: which row is the best, and what the baseline has."""
    metric, best, baseline = ranking
    if metric is None or best is None:
        return "No trial has finished yet."
    head, text = column(metric).heading, column(metric).text
    words = f"Best {head}: **{render.markdown_text(best.label)}** with {text(best.cells[metric].mean)}"
    if baseline is None or baseline.label == best.label or metric not in baseline.cells:
        return f"{words}."
    return f"{words}; baseline {render.markdown_text(baseline.label)} has {text(baseline.cells[metric].mean)}."


def fitting(table: Table, metric: str | None) -> Iterator[Table]:
    """The table with so many columns as a page of 1,280 pixels shows, quality and cost first in line; rows as fit."""
    names = [c.name for c in table.columns]
    measured = {name for row in table.rows for name in row.cells}
    first = [metric, cost_of(names, measured), *(n for n in names if is_quality(n, measured)), *names]
    chosen = [name for name in dict.fromkeys(first) if name][:SHOWN]
    yield replace(table, columns=[c for c in table.columns if c.name in chosen], rows=table.rows[:40])


def pictures(run_id: str, plots: Sequence[Path], metric: str | None) -> Iterator[str]:
    """The interval plot, quality over cost, and samples from the same prompts and noise, with captions."""
    captions = {"samples.png": "Same prompts, same noise: a row of the table beside each line of pictures."}
    if metric is not None:
        head = column(metric).heading
        over = {f"{metric}_{cost}.png": f"{head} over {words}." for cost, words in PLOTTED_COSTS.items()}
        captions = {f"{metric}.png": f"{head} by row.", **over, **captions}
    names = {path.name for path in plots}
    for name, caption in captions.items():
        if name in names:
            yield f"![{caption}]({artifact(run_id, name)})\n\n*{caption}*"


def artifact(run_id: str, name: str) -> str:
    """The address of a file of the table, relative to that of MLflow's server."""
    return f"get-artifact?path=table%2F{name}&run_uuid={run_id}"


def links(experiment: str, trials: Sequence[TrialRecord]) -> Iterator[str]:
    """A line for each row with a link to the run of each seed."""
    rows: dict[str, dict[str, int]] = {}
    for record in trials:
        if record.run is not None:
            rows.setdefault(record.trial.label, {})[record.run_id] = record.trial.seed
    for label, runs in rows.items():
        seeds = " ".join(f"[{seed}](#/experiments/{experiment}/runs/{run})" for run, seed in runs.items())
        yield f"- {render.markdown_text(label)}: {seeds}"


def cut(blocks: Sequence[str]) -> str:
    """Blocks until MLflow's limit of a description; of the first that does not fit, whole lines."""
    rest, text = "\n\n*More is in report.html.*", ""
    for block in blocks:
        if len(text) + len(block) + 2 > MAX_TAG - len(rest):
            room = block[: MAX_TAG - len(rest) - len(text) - 2]
            return f"{text}\n\n{room[: room.rfind(chr(10)) + 1]}".rstrip() + rest
        text = f"{text}\n\n{block}" if text else block
    return text
