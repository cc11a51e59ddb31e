"""A worker process of an ablation: `python -m sana_lab.ablation.worker PID` does jobs and prints progress.

A line of stdin is a job: {job: its file, log: file for stderr, keep: whether the job's file stays}. Imports take
seconds, in which the runner may be killed: this module imports what reads jobs and watches the runner, each job what it
needs. A job of probes does not wait for Lightning and all measures.
"""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sana_lab.ablation import durations
from sana_lab.ablation.heartbeat import Heartbeat
from sana_lab.ablation.protocol import EVALUATION, MEASUREMENT, End, Job, Line, Progress, exit_with_parent
from sana_lab.environment import environment
from sana_lab.tracking.store import Store
from sana_lab.training.startup import defer_torchmetrics
from sana_lab.training.terminated import Terminated, interrupt_on_sigterm

if TYPE_CHECKING:
    from sana_lab.types import Json


def main(runner: int) -> int:
    """Do the jobs of stdin until it ends, or until a trial fails; `runner` is the process id of the process with which
    this one ends.

    On SIGTERM, and on SIGUSR2 that Slurm sends before a time limit, a training ends after its step with a checkpoint,
    anything else at once; the status is 143, and the job may be done again.
    """
    exit_with_parent(runner)
    defer_torchmetrics()
    try:
        with interrupt_on_sigterm(signal.SIGUSR2):
            return do_jobs()
    except Terminated:
        return Terminated.status


def do_jobs() -> int:
    """Do the jobs of stdin; the exit status."""
    for line in sys.stdin:
        message = json.loads(line)
        with Path(message["log"]).open("a") as log:
            os.dup2(log.fileno(), sys.stderr.fileno())
        path = Path(message["job"])
        job = Job.read(path)
        if not message["keep"]:
            path.unlink()  # it holds configurations with the values of environment variables, which are not stored
        failures = do(job)
        End(0, retires=failures > 0).send()
        if failures:  # it may have left a CUDA context that is unusable
            break
    return 0


def do(job: Job) -> int:
    """Do a job; the number of trials that failed."""
    import torch

    torch.set_num_threads(job.threads)
    store = Store(job.store)
    if job.kind == "append":  # to finished runs, which need no sign of life
        return append(store, job.trials)
    if job.elsewhere:  # the runner's environment is that of another machine
        here = environment()
        for trial in job.trials:
            store.set_tags(trial["run"], here)
    with Heartbeat(store, [trial["run"] for trial in job.trials]):
        if job.kind == "train":
            train(job)
        elif job.kind == "evaluate":
            return evaluate(store, job.trials, job.threads, elsewhere=job.elsewhere)
        return sum(not measure(store, trial, job.device) for trial in job.trials)


def train(job: Job) -> None:
    """Train an experiment that trials take weights from."""
    from sana_lab.ablation import quality
    from sana_lab.config import experiments

    assert job.experiment is not None
    if job.elsewhere:
        quality.check_here(experiments.load(job.experiment))
    quality.train_needed(job.experiment)


def evaluate(store: Store, trials: "Sequence[Json]", threads: int, *, elsewhere: bool = False) -> int:
    """Train the model that these trials share, then evaluate each of them; the number of those that failed. `elsewhere`
    as in `Job`."""
    import torch

    from sana_lab.ablation import quality

    fit = quality.fit_elsewhere if elsewhere else quality.fit
    if (end := guarded(store, trials, partial(fit, store, trials[0]))) != "done":
        return len(trials) if end == "failed" else 0
    failures = 0
    for trial in trials:
        torch.set_num_threads(threads)
        Progress(0, f"evaluating {trial['label']}").send()
        failures += guarded(store, [trial], partial(quality.evaluate, store, trial)) == "failed"
        Progress(EVALUATION, trial["label"]).send()
    return failures


def append(store: Store, trials: "Sequence[Json]") -> int:
    """Append the measures that finished trials lack; a failure leaves the run as it is, with the error as a tag. The
    number of failures."""
    from sana_lab.ablation import measures

    failures = 0
    for trial in trials:
        Progress(0, f"appending measures to {trial['label']}").send()
        try:
            measures.append(store, trial)
        except Exception as error:
            failures += 1
            traceback.print_exc()
            Line(f"{trial['label']}: no measure appended: {type(error).__name__}: {error}").send()
            store.set_tags(trial["run"], {"sana.append_error": f"{type(error).__name__}: {error}"})
        Progress(EVALUATION, trial["label"]).send()
    return failures


def measure(store: Store, trial: "Json", device: str | None) -> bool:
    """Measure a trial's costs; then its run has finished. Whether nothing failed."""
    Progress(0, f"measuring {trial['label']}").send()
    if trial["kind"] == "efficiency":
        end = guarded(store, [trial], partial(probe, store, trial, device))
    else:
        from sana_lab.ablation import quality

        end = guarded(store, [trial], partial(quality.measure, store, trial))
    Progress(MEASUREMENT, f"measured {trial['label']}").send()
    return end == "done"


def probe(store: Store, trial: "Json", name: str | None) -> None:
    """Count a trial's probe and time it on the device of that name; then its run has finished."""
    from sana_lab.ablation import efficiency
    from sana_lab.bench.record import device_name

    device = efficiency.open_device(name)
    metrics, reason = efficiency.run_probe(trial["config"], device)
    store.log_metrics(trial["run"], metrics)
    timed_on = None if device is None or reason else device_name(device)
    store.set_tags(trial["run"], {efficiency.UNMEASURED: reason, efficiency.TIMED_ON: timed_on})
    store.finish(trial["run"])


def guarded(store: Store, trials: "Sequence[Json]", work: Callable[[], None]) -> Literal["done", "failed", "pruned"]:
    """Run the job; if it raises, its trials' runs fail with the error, or end as pruned, and the others continue. The
    time it takes counts for the first of them."""
    start = time.time()
    try:
        work()
    except Exception as error:
        if any(trial.get("pruning") for trial in trials) and prune(store, trials, error):
            return "pruned"
        traceback.print_exc()
        for trial in trials:
            store.set_tags(trial["run"], {"sana.error": f"{type(error).__name__}: {error}"})
            store.finish(trial["run"], "FAILED")
        return "failed"
    finally:
        durations.add(store, trials[0]["run"], start, time.time())
    return "done"


def prune(store: Store, trials: "Sequence[Json]", error: Exception) -> bool:
    """End the runs of trials whose training was pruned; whether that is what the error says."""
    from sana_lab.ablation.search import judging
    from sana_lab.training.pruned import Pruned

    if not isinstance(error, Pruned):
        return False
    for trial in trials:
        judging.end(store, trial["run"], trial["pruning"]["metric"], error)
        left = trial["config"]["trainer"]["max_steps"] - error.step + EVALUATION + MEASUREMENT
        Progress(left, f"{trial['label']}: {error}").send()
        Line(f"{trial['label']}: {error} of {trial['pruning']['metric']}").send()
    return True


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
