"""Trials of kind quality, inside a worker: train a model, evaluate it, measure what an image of it costs."""

import numpy as np

from sana_lab.ablation.protocol import Progress
from sana_lab.ablation.record import EVALUATED
from sana_lab.bench import bench
from sana_lab.bench.untrained import build_untrained
from sana_lab.checkpoints import weights
from sana_lab.config import experiments
from sana_lab.config.schema import Config
from sana_lab.diffusion.sampling import Sampling
from sana_lab.evaluation import evaluate as evaluation
from sana_lab.evaluation import sources
from sana_lab.evaluation.command import columns
from sana_lab.pretrained import restore
from sana_lab.systems.text2image import TextToImage
from sana_lab.tracking.logger import RunLogger
from sana_lab.tracking.store import Store
from sana_lab.training import callbacks, points, train
from sana_lab.types import Json


class StepReport:
    """Training progress as messages to the runner."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.step: int | None = None

    def __call__(self, step: int, steps: int) -> None:
        """Report progress; the first reported steps may precede a resume and are excluded from the speed."""
        text = f"{self.label}: step {step} of {steps}"
        Progress(step - (self.step or 0), text, resumed=self.step is None).send()
        self.step = step


def train_needed(name: str) -> None:
    """Train an experiment that trials take weights from."""
    _train(experiments.load(name), name)


def fit(store: Store, trial: Json) -> None:
    """Train a trial's model, unless it is trained already or shipped."""
    if weights.ready(trial["config"]) is not None:
        return
    logger = RunLogger(store, trial["run"])
    _train(trial["config"], trial["label"], logger)
    logger.finalize("success")


def _train(experiment: Config, name: str, logger: RunLogger | None = None) -> None:
    """Train with messages to the runner, and measure the points that the experiment asks for."""
    from sana_lab.evaluation.points import Evaluation

    train.train(experiment, name=name, logger=logger, progress=StepReport(name), evaluation=Evaluation())


def evaluate(store: Store, trial: Json) -> None:
    """Measures and samples of a trained trial, written to its run."""
    path = weights.find_trained(trial["config"], trial["label"])
    system = restore.restore(trial["config"], path)
    report = evaluation.evaluate(system, may_be_empty=True)
    card = weights.card(path)
    training = {"val_loss": card["measured"].get("val/loss"), "train_s": card["seconds"]}
    store.log_metrics(trial["run"], {**columns(report), **training})
    store.log_dict(trial["run"], report, "report.json")
    log_points(store, trial, card)
    if trial["config"]["prompts"] and isinstance(system, TextToImage):
        log_samples(store, trial, system)
    store.set_tags(trial["run"], {EVALUATED: trial["key"]})


def log_points(store: Store, trial: Json, card: Json) -> None:
    """The points of the training that gave the trial's model, which another run may have recorded."""
    experiment = trial["config"]
    if measured := points.read(train.folder(experiment), experiment):
        points.log(store, trial["run"], measured)
        record = {**points.as_json(experiment, measured), "share": card.get("points", {}).get("share")}
        store.log_dict(trial["run"], record, points.FILE)


def log_samples(store: Store, trial: Json, system: TextToImage) -> None:
    """Images of the experiment's prompts, sampled from the same noise in every trial."""
    prompts = trial["config"]["prompts"]
    images = sources.sampler(system.sample, trial["config"])(prompts, list(range(len(prompts))))
    store.log_image(trial["run"], "final", callbacks.image_row(images))
    path = weights.HOME / "sweeps" / trial["key"] / "samples.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, images=images.numpy(), prompts=np.array(prompts))
    store.log_file(trial["run"], path)


def measure(store: Store, trial: Json) -> None:
    """The cost of an image, measured on the trial's own modules at the bench size; then the run has finished."""
    experiment, options = trial["config"], trial["config"]["eval"]
    if experiment["system"]["name"] == "text2image":
        record = bench.bench(
            build_untrained(experiment),
            Sampling(**experiment["sampling"]),
            options["bench_size"] or experiments.image_size(experiment["data"]),
            options["bench_batch"],
            repeats=options["bench_repeats"],
            measured_steps=options["bench_steps"],
        )
        store.log_metrics(trial["run"], costs(record))
        store.log_dict(trial["run"], record, "bench.json")
    store.finish(trial["run"])


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
