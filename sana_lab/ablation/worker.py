"""A worker process of an ablation: `python -m sana_lab.ablation.worker JOB.json PID` does one job and prints progress.

Imports take seconds, in which the runner may be killed: this module imports what reads the job and watches the runner,
each job what it needs. A job of probes does not wait for Lightning and all measures.
"""

import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sana_lab.ablation.protocol import EVALUATION, MEASUREMENT, Job, Progress, exit_with_parent
from sana_lab.tracking.store import Store

if TYPE_CHECKING:
    import torch

    from sana_lab.types import Json


def main(path: Path, runner: int) -> int:
    """Do the job; `runner` is the process id of the runner, with which this process ends."""
    exit_with_parent(runner)
    job = Job.read(path)
    path.unlink()  # it holds configurations with the values of environment variables, which are not stored
    import torch

    torch.set_num_threads(job.threads)
    store = Store(job.store)
    if job.kind == "train":
        train(job)
    elif job.kind == "evaluate":
        evaluate(store, job.trials, job.threads)
    else:
        for trial in job.trials:
            measure(store, trial, job.device)
    return 0


def train(job: Job) -> None:
    """Train an experiment that trials take weights from."""
    from sana_lab.ablation import quality

    assert job.experiment is not None
    quality.train_needed(job.experiment)


def evaluate(store: Store, trials: "Sequence[Json]", threads: int) -> None:
    """Train the model that these trials share, then evaluate each of them."""
    import torch

    from sana_lab.ablation import quality

    if guarded(store, trials, partial(quality.fit, store, trials[0])):
        torch.set_num_threads(threads)
        for trial in trials:
            Progress(0, f"evaluating {trial['label']}").send()
            guarded(store, [trial], partial(quality.evaluate, store, trial))
            Progress(EVALUATION, trial["label"]).send()


def measure(store: Store, trial: "Json", device: str | None) -> None:
    """Measure a trial's costs; then its run has finished."""
    Progress(0, f"measuring {trial['label']}").send()
    if trial["kind"] == "efficiency":
        import torch

        guarded(store, [trial], partial(probe, store, trial, None if device is None else torch.device(device)))
    else:
        from sana_lab.ablation import quality

        guarded(store, [trial], partial(quality.measure, store, trial))
    Progress(MEASUREMENT, f"measured {trial['label']}").send()


def probe(store: Store, trial: "Json", device: "torch.device | None") -> None:
    """Count and time a trial's probe; then its run has finished."""
    from sana_lab.ablation import efficiency

    metrics, reason = efficiency.run_probe(trial["config"], device)
    store.log_metrics(trial["run"], metrics)
    store.set_tags(trial["run"], {efficiency.UNMEASURED: reason})
    store.finish(trial["run"])


def guarded(store: Store, trials: "Sequence[Json]", work: Callable[[], None]) -> bool:
    """Run the job; if it raises, its trials' runs fail with the error and the others continue."""
    try:
        work()
    except Exception as error:
        traceback.print_exc()
        for trial in trials:
            store.set_tags(trial["run"], {"sana.error": f"{type(error).__name__}: {error}"})
            store.finish(trial["run"], "FAILED")
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
