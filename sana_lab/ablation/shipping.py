"""Weights of an ablation's rows: the command `ship`, which writes them to be shipped, and what a sweep says of them."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from sana_lab.ablation import plan
from sana_lab.ablation.plan import Plan
from sana_lab.ablation.progress import SETTLE, clock
from sana_lab.ablation.record import SHIPPED, TrialRecord, machine, within_time
from sana_lab.ablation.search.proposals import with_proposals
from sana_lab.ablation.trials import is_shipped, records, weights_of
from sana_lab.checkpoints import mismatch, weights
from sana_lab.config import experiments, hashing
from sana_lab.config.atomic_write import write_text
from sana_lab.config.paths import check_folder
from sana_lab.config.schema import Ablation, Trial
from sana_lab.config.specs import SpecError
from sana_lab.evaluation import report_files
from sana_lab.evaluation.command import columns
from sana_lab.tracking.store import Store
from sana_lab.training import points
from sana_lab.types import Json


def main(
    recipe: str,
    overrides: Sequence[str] = (),
    scale: str | None = None,
    out: Path | None = None,
    *,
    seeds: str | None = None,
) -> int:
    """Write the weights of the rows that are trained here; exit status 1 if some row is not.

    Each model is one fp16 safetensors file of its averaged weights, without frozen parts, with a card.
    """
    fresh = plan.load(recipe, overrides, scale, retrain=True, seeds=plan.parse_seeds(seeds))
    if not isinstance(fresh.table, Ablation):
        raise SpecError(f"ablation {recipe!r} compares probes, which have no weights to ship")
    folder = out or _folder(fresh.table, recipe)
    check_folder(folder)
    store = Store(weights.HOME)
    fresh = with_proposals(store, fresh)
    names = (fresh.name, plan.sweep_name(recipe, scale, overrides))
    trained = [r for r in records(store, fresh) if is_shippable(r.trial)]
    lines, missing = [], [r.trial.label for r in trained if weights.trained(r.trial.config) is None]
    for label, group in by_file(trained).items():
        if (source := weights.trained(group[0].trial.config)) is not None:
            card = {**weights.card(source), **about(store, names, group, command(recipe, overrides, scale, seeds))}
            lines.append(write(folder / f"{label}.safetensors", source, card))
    used = {record.model for record in trained} | models_of_other_seeds(fresh, folder)
    print("\n".join([*lines, *summary(folder, used, missing, command(recipe, overrides, scale, seeds))]))
    return 1 if missing else 0


def _folder(table: Ablation, recipe: str) -> Path:
    """The folder that the ablation names, which need not exist yet."""
    if table.weights is None:
        raise SpecError(f"ablation {recipe!r} names no folder of weights; expected weights: NAME in its file, or --out")
    try:
        return experiments.weights_folder(table.weights)
    except SpecError:
        return experiments.roots("experiments")[0] / "weights" / table.weights


def is_shippable(trial: Trial) -> bool:
    """Whether a trial is trained for a number of steps: not untrained, and not within a time before the user's eyes."""
    return is_trained(trial) and not within_time(trial)


def by_file(trained: Iterable[TrialRecord]) -> dict[str, list[TrialRecord]]:
    """Name of the weights file, from the first label of its model and the seed, to the trials that share it."""
    groups: dict[str, list[TrialRecord]] = {}
    for record in trained:
        groups.setdefault(record.model, []).append(record)
    files: dict[str, list[TrialRecord]] = {}
    for model, group in groups.items():
        name = file_name(group[0].trial)
        files[name if name not in files else f"{name}_{model[:6]}"] = group
    return files


def file_name(trial: Trial) -> str:
    """Lower-case words of a label joined by _, with the seed where it is not 0."""
    name = re.sub(r"[^a-z0-9]+", "_", trial.label.lower()).strip("_")
    return name if trial.seed == 0 else f"{name}_seed{trial.seed}"


def command(recipe: str, overrides: Sequence[str], scale: str | None, seeds: str | None) -> str:
    """The command that trains the rows."""
    options = [*(["--scale", scale] if scale else []), *(["--seeds", seeds] if seeds else []), "--retrain"]
    return " ".join(["sana-lab ablate", recipe, *overrides, *options])


def about(store: Store, sweeps: Sequence[str], group: Sequence[TrialRecord], trained_by: str) -> Json:
    """Entries of the card beside those of training: the command, the rows, and what they measured in float32."""
    return {
        "command": trained_by,
        "dtype": "float16",
        "rows": {r.trial.label: judged(store, sweeps, r) for r in group},
    }


def judged(store: Store, sweeps: Sequence[str], record: TrialRecord) -> Mapping[str, float]:
    """The measures of a finished run of this trial's own training; empty if it was not evaluated."""
    for sweep in sweeps:
        for run in store.find(sweep, {"sana.model": record.model, "sana.label": record.trial.label}):
            if run.status == "FINISHED" and SHIPPED not in run.tags:
                return columns(report_files.read(store, run.id))
    return {}


def write(path: Path, source: Path, card: Json) -> str:
    """Copy a weights file as fp16 with a card, and the points of its training; the line to print. SpecError for weights
    beyond fp16."""
    state = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in weights.read(source).items()
    }
    mismatch.check_finite(state, f"{source} as fp16")
    weights.write(path, state, card, torch.float16)
    if (measured := points.beside(source)).is_file():
        write_text(points.beside(path), measured.read_text())
    return f"{path}: {_megabytes([path])}, {card.get('samples')} samples in {card['seconds']:.0f} s"


def models_of_other_seeds(ablation: Plan, folder: Path) -> set[str]:
    """Models of the ablation at the seeds on cards in a folder, which other commands have written there."""
    seeds = {weights.card(path).get("seed") for path in folder.glob("*.safetensors")}
    others = sorted({seed for seed in seeds if isinstance(seed, int)} - {trial.seed for trial in ablation.trials})
    if ablation.at_seeds is None:
        return set()
    return {hashing.experiment_hash(trial.config) for seed in others for trial in ablation.at_seeds([seed]).trials}


def summary(folder: Path, used: Collection[str], missing: Sequence[str], trained_by: str) -> list[str]:
    """Total size, files that no row of the ablation uses, rows that are not trained here."""
    paths = sorted(folder.glob("*.safetensors"))
    lines = [f"{folder}: {len(paths)} files, {_megabytes(paths)}"]
    lines += [f"no row uses {path}; delete it" for path in paths if weights.card(path).get("hash") not in used]
    if missing:
        rows = ", ".join(dict.fromkeys(map(repr, missing)))
        lines.append(f"not trained here, not written: {rows}; run: {trained_by}")
    return lines


def _megabytes(paths: Iterable[Path]) -> str:
    return f"{sum(path.stat().st_size for path in paths) / 1e6:.1f} MB"


# what a sweep says beforehand


def announce(ablation: Plan, trials: Sequence[TrialRecord], workers: int) -> list[str]:
    """How many models ship or have to be trained, and how long training takes; empty where nothing is missing."""
    models = {r.model: r.trial for r in trials if not r.done and not r.evaluated}
    paths = {model: weights_of(trial) for model, trial in models.items()}
    untrained = [trial for model, trial in models.items() if paths[model] is None and is_trained(trial)]
    shipped = sum(path is not None and is_shipped(path) for path in paths.values())
    if not models:
        return []
    head = f"{ablation.name}: {len(models)} models to measure; weights of {shipped} ship, {len(untrained)} to train"
    return [f"{head} from nothing.", *durations(ablation, untrained, workers)]


def is_trained(trial: Trial) -> bool:
    """Whether a trial's model is trained at all."""
    return trial.config["trainer"]["max_steps"] > 0


def durations(ablation: Plan, untrained: Sequence[Trial], workers: int) -> list[str]:
    """How long each kind of training takes: by the cards of weights that ship, within a budget, or unknown."""
    steps = [trial for trial in untrained if is_shippable(trial)]
    cards = [card for trial in steps if (card := shipped_card(ablation, trial)) is not None]
    budgets = [trial.config["trainer"]["max_seconds"] for trial in untrained if not is_shippable(trial)]
    lines = []
    if cards:
        total = sum(card["seconds"] for card in cards)
        machines = ", ".join(dict.fromkeys(machine(card["environment"]) for card in cards))
        lines.append(
            f"{len(cards)} of them took {clock(total)} of training on {machines}, by the cards of the weights that "
            f"ship: about {clock(total / min(workers, len(cards)))} there with {workers} at a time."
        )
    if unknown := len(steps) - len(cards):
        lines.append(f"The training time of {unknown} is not known; it is shown after {SETTLE:.0f} s of training.")
    return lines + ([f"{len(budgets)} within a budget, {clock(sum(budgets))} in all."] if budgets else [])


def shipped_card(ablation: Plan, trial: Trial) -> Json | None:
    """The card of the weights that ship for a trial, with its seconds; None without any."""
    assert isinstance(ablation.table, Ablation)
    try:
        folder = experiments.weights_folder(ablation.table.weights) if ablation.table.weights else None
    except SpecError:  # to be retrained before any are shipped
        return None
    path = weights.shipped(trial.config, folder)
    card = weights.card(path) if path else {}
    return card if card.get("seconds") else None
