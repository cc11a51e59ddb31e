"""Trials of kind quality, inside a worker: train a model, evaluate it, measure what an image of it costs."""

import json
from pathlib import Path

import numpy as np

from sana_lab.ablation.protocol import Line, Progress
from sana_lab.ablation.record import EVALUATED, SHIPPED, THUMBNAILS, machine
from sana_lab.ablation.search import judging
from sana_lab.ablation.trials import is_shipped, weights_of
from sana_lab.bench import bench
from sana_lab.bench.untrained import build_untrained
from sana_lab.checkpoints import weights
from sana_lab.config import experiments
from sana_lab.config.schema import Config, Trial
from sana_lab.diffusion.sampling import Sampling
from sana_lab.environment import place
from sana_lab.evaluation import evaluate as evaluation
from sana_lab.evaluation import report_files, sources
from sana_lab.evaluation.command import columns
from sana_lab.evaluation.thumbnails import Thumbnails
from sana_lab.pretrained import restore
from sana_lab.systems.quantize import is_simulated
from sana_lab.systems.text2image import TextToImage
from sana_lab.tracking.logger import RunLogger
from sana_lab.tracking.store import Store
from sana_lab.training import PICTURE, callbacks, points, train
from sana_lab.training.checks import check_here
from sana_lab.training.pruned import Judge
from sana_lab.types import Json


class StepReport:
    """Training progress as messages to the runner."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.step: int | None = None

    def __call__(self, step: int, steps: int, text: str = "") -> None:
        """Report progress; the first reported steps may precede a resume and are excluded from the speed."""
        text = f"{self.label}: {text or f'step {step} of {steps}'}"
        Progress(step - (self.step or 0), text, resumed=self.step is None).send()
        self.step = step

    def announce(self, text: str) -> None:
        """Have the runner print a line."""
        Line(f"{self.label}: {text}").send()


def train_needed(name: str) -> None:
    """Train an experiment that trials take weights from."""
    _train(experiments.load(name), name)


def fit_elsewhere(store: Store, trial: Json) -> None:
    """`fit` on another machine than the runner's. SpecError where this one lacks what the training needs."""
    if weights_file(trial) is None:
        check_here(trial["config"])
    fit(store, trial)


def fit(store: Store, trial: Json) -> None:
    """Train a trial's model, unless it is trained already or shipped. `Pruned` where its search ends the training."""
    if weights_file(trial) is not None:
        return
    logger = RunLogger(store, trial["run"])
    _train(trial["config"], trial["label"], logger, judge_of(store, trial))
    logger.finalize("success")


def judge_of(store: Store, trial: Json) -> Judge | None:
    """What ends the training of a trial early, in a search with a pruner."""
    if (options := trial.get("pruning")) is None:
        return None
    return Judge(options["metric"], judging.RungJudge(store, trial["run"], trial["config"], options))


def _train(experiment: Config, name: str, logger: RunLogger | None = None, judge: Judge | None = None) -> None:
    """Train with messages to the runner, and measure the points that the experiment asks for."""
    from sana_lab.evaluation.points import Evaluation

    report = StepReport(name)
    options: Json = {"progress": report, "announce": report.announce, "evaluation": Evaluation(), "judge": judge}
    path = train.train(experiment, name=name, logger=logger, **options)
    if logger is not None and (picture := path.with_name(PICTURE)).is_file():
        assert logger.run_id is not None
        logger.store.log_file(logger.run_id, picture)


def weights_file(trial: Json) -> Path | None:
    """The weights to evaluate a job's trial with; None if it has to be trained."""
    path = Path(trial["weights"]) if trial.get("weights") else None
    return weights_of(Trial({}, 0, trial["config"], weights=path, retrain=trial.get("retrain", False)))


def evaluate(store: Store, trial: Json) -> None:
    """Measures and samples of a trained trial, written to its run."""
    path = weights_file(trial) or weights.find_trained(trial["config"], trial["label"])
    system = restore.restore(trial["config"], path)
    thumbnails = Thumbnails()
    report = evaluation.evaluate(system, may_be_empty=True, thumbnails=thumbnails)
    card = weights.card(path)
    store.log_metrics(trial["run"], {**columns(report), **training_metrics(card)})
    report_files.write(store, trial["run"], report)
    store.log_dict(trial["run"], thumbnails.images, THUMBNAILS)
    log_points(store, trial, path)
    if trial["config"]["prompts"] and isinstance(system, TextToImage):
        log_samples(store, trial, system)
    origin = {SHIPPED: json.dumps(origin_of(card))} if is_shipped(path) else {}
    store.set_tags(trial["run"], {EVALUATED: trial["key"], **origin})


def training_metrics(card: Json) -> dict[str, float | None]:
    """Numbers of a training for the table, from the card of its weights."""
    numbers = {"val_loss": card.get("measured", {}).get("val/loss"), "train_s": card.get("seconds")}
    return {**numbers, "train_steps": card.get("steps"), "train_samples": card.get("samples")}


def origin_of(card: Json) -> Json:
    """Where and how weights that ship were trained, for the notes of a table."""
    where = card.get("environment", {})
    facts = {key: card.get(key) for key in ("command", "date", "seconds")}
    return {**facts, "commit": where.get("commit"), "machine": machine(where)}


def log_points(store: Store, trial: Json, path: Path) -> None:
    """The points of the training that gave the trial's weights, which another run or machine may have recorded."""
    experiment, share = trial["config"], weights.card(path).get("points", {}).get("share")
    if measured := points.read(points.beside(path), experiment):
        points.log(store, trial["run"], measured)
        record = {**points.as_json(experiment, measured), "share": share}
        store.log_dict(trial["run"], record, points.FILE)


def log_samples(store: Store, trial: Json, system: TextToImage) -> None:
    """Images of the experiment's prompts, sampled from the same noise in every trial."""
    prompts = trial["config"]["prompts"]
    images = sources.sampler(system.sample, trial["config"])(prompts, list(range(len(prompts))))
    store.log_image(trial["run"], "final", callbacks.image_row(images, prompts))
    path = weights.HOME / "sweeps" / trial["key"] / "samples.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, images=images.numpy(), prompts=np.array(prompts))
    store.log_file(trial["run"], path)


def measure(store: Store, trial: Json) -> None:
    """The cost of an image, measured on the trial's own modules at the bench size; then the run has finished."""
    experiment, options = trial["config"], trial["config"]["eval"]
    if experiment["system"]["name"] == "text2image" and not is_simulated(experiment["sampling"]["quantize"]):
        record = bench.bench(
            build_untrained(experiment) if experiment["sampling"]["cache"] is None else trained_system(trial),
            Sampling(**experiment["sampling"]),
            options["bench_size"] or experiments.image_size(experiment["data"]),
            options["bench_batch"],
            repeats=options["bench_repeats"],
            measured_steps=options["bench_steps"],
        )
        store.log_metrics(trial["run"], costs(record))
        store.log_dict(trial["run"], record, "bench.json")
    store.finish(trial["run"])


def trained_system(trial: Json) -> TextToImage:
    """A trial's trained system on the fastest device, for costs that depend on the weights."""
    path = weights_file(trial) or weights.find_trained(trial["config"], trial["label"])
    return restore.restore(trial["config"], path).to(place("auto"))


def costs(record: Json) -> dict[str, float]:
    """The numbers of a bench record, and those of single networks that papers print: parameters of the DiT and of the
    text encoder, and the time of encoding text."""
    text, dit = record["stages"]["text"], record["stages"]["denoise"]
    networks = {
        "dit_params_m": dit["params_m"],
        "dit_params_b": dit["params_m"] / 1000,
        "text_params_m": text["params_m"],
        "text_s": text["latency_s"],
    }
    return {**{k: v for k, v in record.items() if isinstance(v, int | float)}, **networks}
