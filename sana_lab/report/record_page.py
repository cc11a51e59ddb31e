"""Reports of one evaluation and of one benchmark as HTML files, in the form of a sweep's report."""

from collections.abc import Mapping, Sequence
from typing import Any

from sana_lab.report import html
from sana_lab.report.columns import column
from sana_lab.report.html import Cell, Outcomes

Record = Mapping[str, Any]

SCORES = ("exact", "geneval")
"""Entries of an evaluation's report with tasks and outcomes by prompt."""


def evaluation(name: str, report: Record, pictures: Mapping[str, str] | None = None) -> str:
    """The page of an evaluation: measures with intervals, tasks, outcomes by prompt, settings and environment.

    `pictures` maps prompts to a WebP in base64.
    """
    parts = {
        "Measures": [_measures(report)],
        **{f"{column(key).heading} by task": [_tasks(report[key])] for key in SCORES if key in report},
        "Outcomes by prompt": [_outcomes(name, report, pictures or {})],
        "Not measured": [html.notes([f"{k}: {why}" for k, why in report.get("skipped", {}).items()])],
        "Settings": [
            html.details("settings of each measure", {k: m["settings"] for k, m in report.get("measures", {}).items()}),
            html.details("settings of the evaluation", report.get("settings", {})),
        ],
        "Origin": [_facts({"model": report.get("model"), **report["environment"], "seconds": report.get("seconds")})],
    }
    return _page(f"Evaluation of {name}", parts)


def benchmark(name: str, record: Record) -> str:
    """The page of a benchmark: costs by stage, the whole record, definitions of the numbers."""
    totals = {k: v for k, v in record.items() if isinstance(v, int | float)}
    rows = [[Cell(column(k).heading), Cell(column(k).text(v), v), Cell(column(k).unit)] for k, v in totals.items()]
    parts = {
        "By stage": [_stages(record.get("stages", {}))],
        "An image": [html.table(["What", "Value", "Unit"], rows, 1)],
        "Settings": [_facts(record.get("settings", {}))],
        "Definitions": [html.notes(list(map(str, record.get("notes", []))))],
        "Record": [html.details("everything that was measured", record)],
    }
    return _page(f"Costs of {name}", parts)


def _page(title: str, parts: Mapping[str, Sequence[str]]) -> str:
    sections = {head: text for head, inner in parts.items() if (text := html.section(head, *inner))}
    return html.document(title, [html.heading(title), html.contents(list(sections)), *sections.values()])


def _measures(report: Record) -> str:
    rows = [
        [Cell(column(name).title), *_estimate(v["value"], v["low"], v["high"]), Cell(str(v["n"] or ""), v["n"] or "")]
        for measure in report.get("measures", {}).values()
        for name, v in measure["values"].items()
    ]
    if reconstruction := report.get("reconstruction"):
        names = [name for name in ("psnr", "ssim", "lpips", "rfid") if name in reconstruction]
        count = str(reconstruction["n"])
        ends = {name: reconstruction[f"{name}_interval"] for name in names}
        rows += [[Cell(column(n).title), *_estimate(reconstruction[n], *ends[n]), Cell(count)] for n in names]
    return html.table(["Measure", "Value", "95 % from", "to", "n"], rows, 1) if rows else ""


def _estimate(*values: float | None) -> list[Cell]:
    """Value and ends of an interval."""
    return [Cell("" if value is None else f"{value:.4g}", "" if value is None else value) for value in values]


def _tasks(summary: Record) -> str:
    rows = [
        [
            Cell(task.replace("_", " ")),
            *_estimate(t["value"], *t["interval"]),
            Cell(str(t["prompts"])),
            Cell(str(t["images"])),
        ]
        for task, t in summary["tasks"].items()
    ]
    return html.table(["Task", "Value", "95 % from", "to", "Prompts", "Images"], rows, 1)


def _outcomes(name: str, report: Record, pictures: Mapping[str, str]) -> str:
    rows: Sequence[Record] = next((report[key]["outcomes"] for key in SCORES if "outcomes" in report.get(key, {})), [])
    return html.outcomes([outcomes_of(name, rows, pictures)]) if rows else ""


def outcomes_of(label: str, rows: Sequence[Record], pictures: Mapping[str, str]) -> Outcomes:
    """Outcomes of an evaluation's report: rows of {tag, prompt, correct, reasons}."""
    return Outcomes(
        label,
        {row["prompt"]: sum(row["correct"]) / len(row["correct"]) for row in rows},
        {row["prompt"]: row["tag"].replace("_", " ") for row in rows},
        {row["prompt"]: "; ".join(dict.fromkeys(reason for reason in row["reasons"] if reason)) for row in rows},
        pictures,
    )


def _stages(stages: Mapping[str, Record]) -> str:
    names = list(dict.fromkeys(k for row in stages.values() for k, v in row.items() if isinstance(v, int | float)))
    rows = [
        [Cell(stage), *(Cell("" if row.get(n) is None else column(n).text(row[n]), row.get(n) or "") for n in names)]
        for stage, row in stages.items()
    ]
    return html.table(["Stage", *(column(name).title for name in names)], rows, 1) if rows else ""


def _facts(facts: Mapping[str, Any]) -> str:
    rows = [[Cell(str(k)), Cell(v if isinstance(v, str) else str(v))] for k, v in facts.items() if v is not None]
    return html.table(["What", "Value"], rows, 2) if rows else ""
