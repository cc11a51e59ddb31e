"""What a sweep's report has beside its table: samples by training step, outcomes by prompt, the runs of its numbers."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from sana_lab.ablation import sweep_page
from sana_lab.ablation.record import THUMBNAILS, TrialRecord
from sana_lab.config.schema import Ablation, EfficiencyTable
from sana_lab.evaluation import report_files
from sana_lab.report.html import Outcomes
from sana_lab.report.page import Content
from sana_lab.report.record_page import SCORES, outcomes_of
from sana_lab.report.table import Table, short_commit
from sana_lab.tracking.store import Run, Store
from sana_lab.types import Json

MAX_STEPS = 10
"""Training steps of the slider, evenly spaced."""


def content(store: Store, options: Ablation | EfficiencyTable, trials: Sequence[TrialRecord], table: Table) -> Content:
    """Question, answer and everything of the finished runs that the report shows; pictures are of each row's first
    seed."""
    finished = [record for record in trials if record.done]
    firsts = list({record.trial.label: record for record in reversed(finished)}.values())[::-1]
    return Content(
        options.question,
        sweep_page.answer(sweep_page.rank(options, table)).replace("**", "").replace("\\", ""),
        {r.trial.label: files for r in firsts if (files := steps(store, r.run_id))},
        [each for r in firsts if (each := outcomes(store, r)) is not None],
        list(lines(trials)),
    )


def steps(store: Store, run_id: str) -> dict[int, Path]:
    """Training step -> picture of the samples that were logged at it."""
    files: dict[int, Path] = {}
    with contextlib.suppress(FileNotFoundError):
        for file in store.file(run_id, "images").glob("samples+step+*.png"):
            files[int(file.name.split("+")[2])] = file
    chosen = sorted(files)
    if len(chosen) > MAX_STEPS:
        chosen = [chosen[round(i * (len(chosen) - 1) / (MAX_STEPS - 1))] for i in range(MAX_STEPS)]
    return {step: files[step] for step in chosen}


def outcomes(store: Store, record: TrialRecord) -> Outcomes | None:
    """Outcomes by prompt of a run's evaluation; None if it has none."""
    try:
        report = report_files.read(store, record.run_id)
    except FileNotFoundError:
        return None
    pictures: Json = {}
    with contextlib.suppress(FileNotFoundError):
        pictures = json.loads(store.file(record.run_id, THUMBNAILS).read_text())
    rows = next((report[name]["outcomes"] for name in SCORES if "outcomes" in report.get(name, {})), None)
    return None if rows is None else outcomes_of(record.trial.label, rows, pictures)


def lines(trials: Sequence[TrialRecord]) -> Iterator[dict[str, str]]:
    """The runs: row, seed, state, run id, commit, machine, start and duration."""
    for record in trials:
        if record.run is not None:
            yield {"Row": record.trial.label, "Seed": str(record.trial.seed), **about(record.run)}


def about(run: Run) -> dict[str, str]:
    """Where a run's numbers come from."""
    dirty = " with changes" if run.tags.get("dirty") == "true" else ""
    device = run.tags.get("device", "")
    machine = f"{run.tags.get('cores', '?')} x {run.tags.get('cpu', '')}" if device in ("", "cpu") else device
    return {
        "State": run.status.lower(),
        "Run": run.id,
        "Commit": f"{short_commit(run.tags.get('commit', 'unknown'))}{dirty}",
        "Machine": machine,
        "torch": run.tags.get("torch", ""),
        "Started": f"{datetime.fromtimestamp(run.started, UTC):%Y-%m-%d %H:%M} UTC",
        "Seconds": "" if run.ended is None else f"{run.ended - run.started:.0f}",
    }
