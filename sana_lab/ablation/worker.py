"""A worker process of an ablation: `python -m sana_lab.ablation.worker JOB.json`.

It prints `@ steps text` for the progress bar.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sana_lab.ablation.runner import BENCHED, JUDGED, watch
from sana_lab.bench import bench
from sana_lab.checkpoints import weights
from sana_lab.config import experiments
from sana_lab.diffusion.sampling import Sampling
from sana_lab.evaluation import evaluate
from sana_lab.pretrained import restore
from sana_lab.systems.text2image import TextToImage
from sana_lab.tracking.logger import Tracker
from sana_lab.tracking.store import Store
from sana_lab.training import callbacks, train
from sana_lab.types import Json


def main(path: Path) -> int:
    job = json.loads(path.read_text())
    watch(os.getppid())
    torch.set_num_threads(job["threads"])
    store = Store(job["store"])
    if job["kind"] == "train":
        train.train(experiments.load(job["name"]), name=job["name"], progress=Steps(job["name"]))
    elif job["kind"] == "judge":
        judge(store, job["trials"], job["threads"])
    else:
        for trial in job["trials"]:
            guarded(store, [trial], lambda trial=trial: cost(store, trial))
    return 0


def guarded(store: Store, trials: list[Json], work: Any) -> bool:
    """Do the work; where it raises, the trials' runs fail with the error, and others go on."""
    try:
        work()
    except Exception as error:
        traceback.print_exc()
        for trial in trials:
            store.set_tags(trial["run"], {"sana.error": f"{type(error).__name__}: {error}"})
            store.finish(trial["run"], "FAILED")
        return False
    return True


def judge(store: Store, trials: list[Json], threads: int) -> None:
    """Train the model that these trials share, then judge each of them."""
    first = trials[0]
    if guarded(store, trials, lambda: fit(store, first)):
        torch.set_num_threads(threads)
        for trial in trials:
            tell(0, f"judging {trial['label']}")
            guarded(store, [trial], lambda trial=trial: quality(store, trial))
            tell(JUDGED, trial["label"])


def fit(store: Store, trial: Json) -> None:
    """Train the model, unless it is there already: trained before, or shipped."""
    if weights.ready(trial["experiment"]) is not None:
        return
    tracker = Tracker(store, trial["run"])
    train.train(trial["experiment"], name=trial["label"], logger=tracker, progress=Steps(trial["label"]))
    tracker.finalize("success")


def quality(store: Store, trial: Json) -> None:
    """Measures and pictures of one trained trial."""
    path = weights.find_trained(trial["experiment"], trial["label"])
    system = restore.restore(trial["experiment"], path)
    report = evaluate.evaluate(system)
    card = weights.card(path)
    measured = {"val_loss": card["measured"].get("val/loss"), "train_s": card["seconds"]}
    store.log_metrics(trial["run"], {**evaluate.flat(report), **{k: v for k, v in measured.items() if v is not None}})
    store.log_dict(trial["run"], report, "report.json")
    if trial["experiment"]["prompts"] and isinstance(system, TextToImage):
        pictures(store, trial, system)
    store.set_tags(trial["run"], {"sana.judged": trial["key"]})


def pictures(store: Store, trial: Json, system: TextToImage) -> None:
    """The experiment's prompts, drawn from the same noise in every trial."""
    prompts = trial["experiment"]["prompts"]
    images = evaluate.sampler(system)(prompts, list(range(len(prompts))))
    store.log_image(trial["run"], "final", callbacks.side_by_side(images))
    path = weights.HOME / "sweeps" / trial["key"] / "samples.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, images=images.numpy(), prompts=np.array(prompts))
    store.log_file(trial["run"], path)


def cost(store: Store, trial: Json) -> None:
    """What an image costs, measured on the trial's own modules at the bench size; then the run has finished."""
    experiment, options = trial["experiment"], trial["experiment"]["eval"]
    if experiment["system"]["name"] == "text2image":
        record = bench.bench(
            bench.build_untrained(experiment),
            Sampling(**experiment["sampling"]),
            options["bench_size"] or experiments.image_size(experiment["data"]),
            options["bench_batch"],
            repeats=options["bench_repeats"],
            measured_steps=options["bench_steps"],
        )
        store.log_metrics(trial["run"], costs(record))
        store.log_dict(trial["run"], record, "bench.json")
    store.finish(trial["run"])
    tell(BENCHED, f"measured {trial['label']}")


def costs(record: Json) -> dict[str, float]:
    """The numbers of a bench record, with those of single networks that papers print: the DiT's and the text encoder's
    parameters, and the time of text."""
    text, dit = record["stages"]["text"], record["stages"]["denoise"]
    alone = {
        "dit_params_m": dit["params_m"],
        "dit_params_b": dit["params_m"] / 1000,
        "text_params_m": text["params_m"],
        "text_s": text["latency_s"],
    }
    return {**{k: v for k, v in record.items() if isinstance(v, int | float)}, **alone}


class Steps:
    """Training progress as lines for the sweep's bar."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.told: int | None = None

    def __call__(self, step: int, steps: int) -> None:
        """The first steps told of may have been done before a resume: they say nothing of the speed."""
        mark = "+" if self.told is None else "@"
        tell(step - (self.told or 0), f"{self.label}: step {step} of {steps}", mark)
        self.told = step


def tell(steps: int, text: str, mark: str = "@") -> None:
    """A line for the sweep. Where nobody listens it was killed: that is no failure of the trial, and work ends here."""
    try:
        print(f"{mark} {steps} {text}", flush=True)
    except BrokenPipeError:
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
