"""A finished sweep of two axes and three seeds, whose runs are written directly: curves, reports, points, pictures."""

import json
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tiny
import torch

from sana_lab.ablation import durations, generations, parameters, plan, runner
from sana_lab.ablation.plan import Plan
from sana_lab.ablation.record import EVALUATED, TrialRecord
from sana_lab.ablation.trials import records
from sana_lab.checkpoints import weights
from sana_lab.evaluation.geneval import summary
from sana_lab.tracking.store import Point, Store
from sana_lab.training import callbacks

GRID = """
title: Attention and depth
question: Does linear attention lose quality, and does depth win it back?
base: tiny
axes:
  attention:
    softmax: {system.dit.attention: softmax}
    linear: {system.dit.attention: linear}
  depth:
    one: {system.dit.depth: 1}
    two: {system.dit.depth: 2}
seeds: [0, 1, 2]
baseline: softmax · one
prompts: [a red circle, three stars, a blue square left of a green star]
columns: [params_m, gmacs, latency_s, exact, geneval, val_loss, train_s]
"""
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
STEPS = 200


def write_ablation(folder: Path, name: str = "grid", text: str = GRID) -> None:
    """The ablation and its base experiment below a folder."""
    tiny.write_experiment(folder)
    tiny.write(folder, f"ablations/{name}.yaml", text)


def finish(store: Store, ablation: Plan, trials: Iterable[TrialRecord] | None = None) -> None:
    """Give each trial without a run a finished one with invented numbers, under a run of the sweep."""
    parent = runner.sweep_run(store, ablation)
    keys = parameters.differing(ablation.trials)
    rows = list(dict.fromkeys(t.label for t in ablation.trials))
    for record in trials or records(store, ablation):
        if record.run is None:
            run = runner.trial_run(store, ablation.name, parent, record, keys).id
            write(store, run, rows.index(record.trial.label), record)
    store.finish(parent)


def write(store: Store, run: str, row: int, record: TrialRecord) -> None:
    """Curves, numbers, report, points and pictures of one run."""
    seed, random = record.trial.seed, np.random.default_rng([row, record.trial.seed])
    start, quality = time.time(), 0.35 + 0.12 * row
    losses = [1.2 * np.exp(-s / 60) + 0.3 - 0.03 * row + 0.03 * random.normal() for s in range(STEPS)]
    store.log_points(run, [Point("train/loss", float(y), s, start + s) for s, y in enumerate(losses)])
    report = report_of(random, quality)
    score = report["geneval"]
    values = {"exact": score["overall"] - 0.05, "geneval": score["overall"], "val_loss": 0.4 - 0.02 * row}
    low, high = score["interval"]
    ends = {"exact_low": low - 0.05, "exact_high": high - 0.05, "geneval_low": low, "geneval_high": high}
    costs = {"params_m": 1.0 + 0.5 * row, "gmacs": 2.0 + row, "latency_s": 0.2 + 0.1 * row + 0.01 * seed, "batch": 1}
    store.log_metrics(run, {**values, **ends, **costs, "train_s": 60.0 + row})
    for share in (0.25, 0.5, 1.0):
        store.log_metrics(run, {"points/exact": share * values["exact"]}, round(share * STEPS))
    store.log_dict(run, report, "report.json")
    store.log_dict(run, points_of(values["exact"]), "points.json")
    log_pictures(store, run, row, random)
    store.set_tags(run, {EVALUATED: record.key, "commit": "c" * 40})
    store.finish(run)
    durations.add(store, run, start, start + 60 + row)


def report_of(random: np.random.Generator, quality: float) -> dict:
    """What `eval` reports of a system of shapes, with outcomes of twelve prompts."""
    prompts = [(task, f"a photo of {n} {task.replace('_', ' ')}") for task in TASKS for n in (1, 2)]
    verdicts = [[(bool(random.random() < quality), "expected 1, counted 2") for _ in range(2)] for _ in prompts]
    rows = [{"tag": task, "prompt": prompt} for task, prompt in prompts]
    outcomes = [summary.outcome(row, v) for row, v in zip(rows, verdicts, strict=True)]
    scores = {**summary.summarise(outcomes), "images_per_prompt": 2, "outcomes": outcomes}
    correct = [float(right) for each in outcomes for right in each["correct"]]
    per_image = summary.influences(correct, [each["tag"] for each in outcomes for _ in each["correct"]])
    low, high = scores["interval"]
    measured = {
        name: {
            "values": {name: {"value": scores["overall"], "low": low, "high": high, "n": 12}},
            "settings": {"title": name, "images": 24, "prompts": 12},
        }
        for name in ("exact", "geneval")
    }
    each = {name: {"values": per_image, "drawn": "same", "images_per_prompt": 2} for name in measured}
    return {"measures": measured, "per_image": each, "geneval": scores, "exact": scores, "environment": {}}


def points_of(end: float) -> dict:
    """Points of a training that ends with a quality."""
    shares = (0.25, 0.5, 1.0)
    value = [{"exact": {"value": end * s, "low": end * s - 0.05, "high": end * s + 0.05, "n": 12}} for s in shares]
    rows = [
        {"step": round(s * STEPS), "images": round(s * STEPS * 4), "seconds": 60 * s, "values": v, "per_image": {}}
        for s, v in zip(shares, value, strict=True)
    ]
    return {"points": rows, "share": 0.02, "settings": "x"}


def log_pictures(store: Store, run: str, row: int, random: np.random.Generator) -> None:
    """Samples at three steps and at the end: a square whose colour is that of the row."""
    images = torch.full((3, 3, 32, 32), 235, dtype=torch.uint8)
    for i in range(3):
        images[i, :, 6 + 4 * i : 18 + 4 * i, 8:24] = torch.tensor([40 + 60 * row, 90, 200 - 50 * row])[:, None, None]
    prompts = ["a red circle", "three stars", "a blue square left of a green star"]
    for step in (50, 100, 200):
        noise = torch.from_numpy(random.integers(0, 256, images.shape, dtype=np.uint8))
        share = step / STEPS
        mixed = (share * images + (1 - share) * noise).to(torch.uint8)
        store.log_image(run, "samples", callbacks.image_row(mixed, prompts), step)
    store.log_image(run, "final", callbacks.image_row(images, prompts))
    path = store.home / "sweeps" / run / "samples.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, images=images.numpy(), prompts=np.array(prompts))
    store.log_file(run, path)


def main() -> None:
    """Write the sweep to ./runs, for a look at it: `python tests/sweeps.py`."""
    write_ablation(Path())
    store = Store(weights.HOME)
    ablation = plan.load("grid")
    finish(store, ablation)
    generations.refresh(store, ablation)
    print(json.dumps({r.trial.label: r.run_id for r in records(store, ablation)}, indent=1))


if __name__ == "__main__":
    main()
