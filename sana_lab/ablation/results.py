"""From an ablation's runs in MLflow to its table, plots and same-noise pictures."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sana_lab import environment
from sana_lab.ablation.trials import Item
from sana_lab.config import experiments
from sana_lab.config.schema import Ablation
from sana_lab.costs.flops import PAIR
from sana_lab.evaluation.extractors.inception import hint
from sana_lab.report import plots, render, significance
from sana_lab.report.claims import verdicts
from sana_lab.report.table import Table, build_table, load_published
from sana_lab.tracking.store import Store
from sana_lab.types import Json


def write(store: Store, name: str, ablation: Ablation, found: Sequence[Item], folder: Path) -> None:
    """table.{md,tex,csv,json}, *.png in `folder`, and the same on the sweep's run; prints the Markdown."""
    reports = {label: report for label, report in judged(store, found).items() if report}
    table = tabulate(ablation, [record(i) for i in found], measured_on(store, found), reports)
    paths = render.write(table, folder)
    paths += draw_plots(store, ablation, found, table, folder)
    for parent in store.find(name, {"sana.kind": "sweep"})[:1]:
        for path in paths:
            store.log_file(parent.id, path, "table")
    print(render.to_markdown(table))
    print("\n".join(str(path) for path in paths))


def judged(store: Store, found: Sequence[Item]) -> dict[str, Json]:
    """label -> what `eval` found of the first seed that has finished."""
    reports: dict[str, Json] = {}
    for item in found:
        if item.run is not None and item.done and item.trial.label not in reports:
            with contextlib.suppress(FileNotFoundError):
                reports[item.trial.label] = json.loads(store.file(item.run.id, "report.json").read_text())
    return reports


def tabulate(
    ablation: Ablation, records: Sequence[Json], notes: Sequence[str] = (), reports: Mapping[str, Json] | None = None
) -> Table:
    """The ablation's table, with what others published, whether what they found is found here too, and which rows
    differ from the baseline (the first row where none is named)."""
    published = ablation.published and load_published(experiments.locate("eval/published", ablation.published))
    table = build_table(
        records,
        title=ablation.title,
        columns=ablation.columns,
        notes=[*ablation.notes, *notes],
        machine=f"{environment.cores()} x {environment.cpu_model()}",
        published=published or None,
    )
    held = [str(v) for v in verdicts(table.rows, ablation.expect, ablation.stand_in)]
    baseline = ablation.baseline or table.rows[0].label
    apart = significance.differences(table.rows, reports or {}, baseline)
    counted = [f"MACs of a guided pair: {PAIR}."] if "tmacs_pair" in {c.name for c in table.columns} else []
    lines = [*held, *significance.note(apart, baseline), *counted, *table.notes]
    return replace(table, notes=lines, differences=significance.marked(apart))


def record(item: Item) -> Json:
    """A trial as `report` takes it."""
    status = {"FINISHED": "finished", "FAILED": "failed"}.get(item.run.status if item.run else "", "missing")
    base: Json = {"label": item.trial.label, "labels": item.trial.labels, "seed": item.trial.seed, "status": status}
    if item.run is None:
        return {**base, "error": None, "metrics": {}, "run_id": None, "commit": None}
    commit = item.run.tags.get("commit")
    dirty = "-dirty" if item.run.tags.get("dirty", "").lower() == "true" else ""
    return {
        **base,
        "error": item.run.tags.get("sana.error"),
        "metrics": item.run.metrics,
        "run_id": item.run.id,
        "commit": f"{commit}{dirty}" if commit else None,
    }


def measured_on(store: Store, found: Sequence[Item]) -> list[str]:
    """What the numbers mean, from the trials' own settings."""
    evals = [i.trial.experiment["eval"] for i in found]
    done = [i.run.metrics for i in found if i.run is not None and "prompts" in i.run.metrics]
    notes = []
    if done:
        prompts = sorted({f"{m['prompts']:.0f} prompts, {m['images']:.0f} images" for m in done})
        notes.append(f"GenEval on the embedded world: {' or '.join(prompts)} a row; same prompts, same noise.")
    if any(e["bench_size"] for e in evals):
        sizes = sorted({f"{e['bench_size']} px" for e in evals})
        notes.append(
            f"Tokens, MACs, latency, throughput and memory: the row's own modules at {', '.join(sizes)} with random "
            f"input, batch {evals[0]['bench_batch']}; MACs of one denoiser forward at batch 1, without guidance."
        )
    if any("geneval" in i.run.metrics and "fid" not in i.run.metrics for i in found if i.run is not None):
        notes.append(f"FID is not measured: {hint()}, eval.fid_weights=FILE.")
    return notes


def draw_plots(store: Store, ablation: Ablation, found: Sequence[Item], table: Table, folder: Path) -> list[Path]:
    """Every plot that the finished trials have data for."""
    done = [i for i in found if i.done]
    measured = {name for row in table.rows for name in row.cells}
    metric = next((m for m in ("geneval", "psnr") if m in measured), None)
    paths = []
    if metric:
        paths += [plots.quality(table, metric, folder / f"{metric}.png")]
        paths += [
            plots.tradeoff(table, c, metric, folder / f"{metric}_{c}.png") for c in ("latency_s",) if c in measured
        ]
    if metric and ablation.x:
        paths += [plots.against(table, ablation.x, metric, folder / f"{metric}_by_{ablation.x}.png")]
    if lines := curves(store, done):
        paths += [plots.curves(lines, folder / "training_loss.png", title=ablation.title)]
    images, prompts = samples(store, done)
    return paths + ([plots.grid(images, prompts, folder / "samples.png")] if images else [])


def curves(store: Store, done: Sequence[Item]) -> dict[str, list[tuple[int, float]]]:
    """label -> training loss by step, of the first seed; trials that reuse a model have none of their own."""
    found: dict[str, list[tuple[int, float]]] = {}
    for item in done:
        assert item.run is not None
        history = store.history(item.run.id, "train/loss")
        if len(history) > 1:
            found.setdefault(item.trial.label, history)
    return found


def samples(store: Store, done: Sequence[Item]) -> tuple[dict[str, Any], list[str]]:
    """label -> images (N, 3, H, W) uint8 of the first seed, and their prompts."""
    images: dict[str, Any] = {}
    prompts: list[str] = []
    for item in done:
        assert item.run is not None
        try:
            stored = np.load(store.file(item.run.id, "samples.npz"))
        except FileNotFoundError:
            continue
        images.setdefault(item.trial.label, torch.from_numpy(stored["images"]))
        prompts = [str(p) for p in stored["prompts"]]
    return images, prompts
