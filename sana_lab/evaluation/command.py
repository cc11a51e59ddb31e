"""The command `sana-lab eval`: print a report, write it to a file, and record it in MLflow."""

import json
from collections.abc import Sequence
from pathlib import Path

from sana_lab.checkpoints import weights
from sana_lab.config.atomic_write import write_text
from sana_lab.config.paths import check_file, check_folder
from sana_lab.evaluation import distributed, report_files
from sana_lab.evaluation.extractors.inception import hint
from sana_lab.evaluation.thumbnails import Thumbnails
from sana_lab.report import record_page
from sana_lab.tracking.store import Store
from sana_lab.types import Json

SUMMARIES = {"exact": "exact_shapes", "geneval": "geneval"}
"""Entry of a report with a summary by task -> its measure."""

FEW = 30
"""Sample size below which a number is marked as of few images, prompts or clusters."""


def main(name: str, overrides: Sequence[str], json_file: Path | None, html_file: Path | None = None) -> None:
    """`sana-lab eval NAME`: print the measures with their intervals, and write everything to `json_file`, and as a page
    with a picture of each prompt to `html_file`."""
    from sana_lab.evaluation.evaluate import evaluate

    check_file(json_file)
    check_file(html_file)
    check_folder(weights.HOME)
    with distributed.process_group() as is_first:
        thumbnails = Thumbnails()
        report = evaluate(name, overrides, thumbnails=thumbnails)
        thumbnails.gather()
        if not is_first:
            return
    print("\n".join(lines(report)))
    if json_file is not None:
        write_text(json_file, json.dumps(report, indent=2) + "\n")
    if html_file is not None:
        write_text(html_file, record_page.evaluation(name, report, thumbnails.images))
    record(name, report)


def record(name: str, report: Json) -> None:
    """Store a report as a finished run of MLflow's experiment `evaluation`."""
    store = Store(weights.HOME)
    run = store.start_run("evaluation", name, {"sana.kind": "evaluation", **report["environment"]})
    store.log_params(run, {"model": report["model"] if isinstance(report.get("model"), str) else name})
    store.log_metrics(run, {k: v for k, v in columns(report).items() if v is not None})
    report_files.write(store, run, report)
    store.finish(run)


def columns(report: Json) -> dict[str, float]:
    """A report's headline numbers under the names of table columns, with their intervals' ends."""
    numbers: dict[str, float] = {}
    for measure in report.get("measures", {}).values():
        for name, value in measure["values"].items():
            ends = {f"{name}_low": value["low"], f"{name}_high": value["high"]}
            numbers |= {name: value["value"]} | {k: v for k, v in ends.items() if v is not None}
    if "geneval" in report:
        numbers |= {k: report["geneval"][k] for k in ("prompts", "images")}
    if r := report.get("reconstruction"):
        for name in ("psnr", "ssim", "lpips", "rfid"):
            if name in r:
                low, high = r[f"{name}_interval"]
                numbers |= {name: r[name], f"{name}_low": low, f"{name}_high": high}
    return numbers


def lines(report: Json) -> list[str]:
    """A report as text."""
    out = []
    for key, name in SUMMARIES.items():
        out += _summary_lines(report[key], report["measures"][name]["settings"]["title"]) if key in report else []
    for name, measure in report.get("measures", {}).items():
        by_task = name in SUMMARIES.values()
        shown = {k: v for k, v in measure["values"].items() if not by_task or "correct" in k or "partial" in k}
        out += [_line(k, v["value"], v["low"], v["high"], v["n"]) for k, v in shown.items()]
    if reference := report.get("reference"):
        out += [_reference_line(reference, report["measures"])]
    out += [f"skipped {name}: {why}" for name, why in report.get("skipped", {}).items()]
    if r := report.get("reconstruction"):
        out += _reconstruction_lines(r)
    elif "fid" not in columns(report) and "held_out" not in report.get("measures", {}):
        out += [f"{hint()}: eval.fid_weights=FILE"]
    return out


def _summary_lines(summary: Json, title: str) -> list[str]:
    """Overall and tasks of a score of prompts by task."""
    low, high = summary["interval"]
    counts = f"{summary['prompts']} prompts, {summary['images']} images"
    name = title.replace(" (shapes)", "-shapes")
    overall = f"{name} overall {summary['overall']:.3f}  95 % [{low:.3f}, {high:.3f}]  ({counts})"
    return [overall, *(_line(task, t["value"], *t["interval"]) for task, t in summary["tasks"].items())]


def _line(name: str, value: float, low: float | None, high: float | None, n: int | None = None) -> str:
    interval = f"  [{low:z.3f}, {high:z.3f}]" if low is not None and high is not None else ""
    return f"  {name:<24}{value:z.3f}{interval}{f'  n {n}' if n else ''}{'  (few)' if n and n < FEW else ''}"


def _reference_line(reference: Json, measures: Json) -> str:
    """How the real images of distances and the judged ones were prepared, and how many of each were compared."""
    size = reference["size"]
    prepared = f"both sides squares of {size} px" if size else "both sides at their own sizes"
    extractors = (m["settings"].get("extractor") for m in measures.values())
    resizes = [
        f"resized to {e['side']} px ({e['resize']}) by {e['extractor']}"
        for e in extractors
        if isinstance(e, dict) and e.keys() >= {"side", "resize"}
    ]
    counts = _first(reference["n"], reference["of"], f"real pictures of {reference['origin']}")
    if reference.get("judged_of", 0) > reference.get("judged", 0):
        counts += f", {_first(reference['judged'], reference['judged_of'], 'judged ones')}"
    return "  " + "; ".join([f"compared with {counts}, {prepared}", *dict.fromkeys(resizes)])


def _first(n: int, total: int, what: str) -> str:
    return f"{n} {what}" if n == total else f"{n} of {total} {what} (eval.held_out)"


def _reconstruction_lines(report: Json) -> list[str]:
    """Reconstruction quality as text, one line per metric."""
    titles = {"psnr": ("PSNR", ".2f", " dB"), "ssim": ("SSIM", ".4f", ""), "lpips": ("LPIPS", ".4f", "")}
    titles["rfid"] = ("rFID", ".3f", "")
    out = []
    for name, (title, form, unit) in titles.items():
        if name in report:
            low, high = (f"{x:{form}}" for x in report[f"{name}_interval"])
            out.append(f"{title:<6}{report[name]:{form}}{unit}  95 % [{low}, {high}]  on {report['n']} images")
    return out
