"""Measures that an ablation asks for after its trials have finished: appended to their runs, nothing else changes."""

from pathlib import Path

from sana_lab import environment
from sana_lab.ablation import generations
from sana_lab.ablation.trials import measures_of, weights_of
from sana_lab.checkpoints import weights
from sana_lab.config import hashing, interpolation
from sana_lab.config.schema import Config, Trial
from sana_lab.evaluation import evaluate as evaluation
from sana_lab.evaluation import report_files
from sana_lab.evaluation.command import columns
from sana_lab.pretrained import restore
from sana_lab.tracking.store import CONFIG, Store
from sana_lab.types import Json


def append(store: Store, trial: Json) -> None:
    """Evaluate a finished trial with the measures that its run lacks, and write their numbers to the run.

    Numbers of other measures, costs and curves stay. The report says under `appended` on which machine and commit.
    """
    shipped = Path(trial["weights"]) if trial.get("weights") else None
    plan = Trial({}, 0, trial["config"], weights=shipped, retrain=trial.get("retrain", False))
    run, path = store.run(trial["run"]), weights_of(plan) or weights.find_trained(trial["config"], trial["label"])
    report = evaluation.evaluate(restore.restore(lacking(plan, measures_of(run)), path), may_be_empty=True)
    old = report_files.read(store, run.id)
    added = added_measures(old, report)
    store.log_metrics(run.id, columns({"measures": added}))
    report_files.write(store, run.id, merge(old, report, added))
    store.log_dict(run.id, interpolation.as_written(plan.config), CONFIG)
    store.set_tags(run.id, generations.appended_tags(trial["key"], plan, measures_of(run)))


def lacking(trial: Trial, measured: set[str]) -> Config:
    """The trial's configuration with only those of its measures that a run does not have."""
    missing = [spec for key, spec in hashing.measure_hashes(trial).items() if key not in measured]
    options = {**trial.config["eval"], **dict.fromkeys(hashing.ADDABLE), "measures": []}
    for name, value in missing:
        options[name] = [*options["measures"], value] if name == "measures" else value
    return {**trial.config, "eval": options}


def added_measures(old: Json, new: Json) -> Json:
    """The measures of a new report with columns that the old one lacks, under names that it does not have."""
    columns_of_old = {column for measure in old["measures"].values() for column in measure["values"]}
    added = {k: m for k, m in new["measures"].items() if m["values"].keys() - columns_of_old}
    count = len(old["measures"])
    return {k if k not in old["measures"] else f"{k}_{count + i}": m for i, (k, m) in enumerate(added.items())}


def merge(old: Json, new: Json, added: Json) -> Json:
    """The old report with what only the new one has."""
    appended = {**old.get("appended", {}), **dict.fromkeys(added, environment.environment())}
    per_image = {**new.get("per_image", {}), **old.get("per_image", {})}
    return {**new, **old, "measures": {**old["measures"], **added}, "per_image": per_image, "appended": appended}
