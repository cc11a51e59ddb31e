"""Executor `slurm`: jobs of Slurm through submitit, in arrays (`pip install sana_lab[slurm]`)."""

import contextlib
import queue
import signal
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, InvalidStateError
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sana_lab.ablation.executors import Executor, Show, within_reach
from sana_lab.ablation.executors.remote import Tail, add_text, lines_of, run_job, terminate_workers
from sana_lab.ablation.protocol import Job
from sana_lab.config.atomic_write import write_text
from sana_lab.config.ranges import Count, Number
from sana_lab.config.specs import SpecError

GATHER = 1.0
"""Seconds in which jobs are gathered to one array."""

POLL = 2.0
"""Seconds between questions for a job's state."""


MISSING_SECONDS = 75.0
"""Seconds without a job in the queue and without its result until it has failed: a shared file system may show a new
file a minute late."""

TRIES = 10
"""Errors in a row of the thread that submits and polls, until the sweep is given up."""

RESERVED = {"array", "output", "error", "requeue", "signal", "time", "wckey"}
"""Options of sbatch that the executor and submitit set."""

SAVING = 60.0
"""Seconds that a worker has for its step and a checkpoint; submitit has Slurm send its signal 90 s before the end."""

GRACE = 600.0
"""Seconds after SIGTERM in which Slurm ends a job; the sweep submits one again that it has left alone."""


class Submission(NamedTuple):
    """A job to submit, and the future of its status."""

    path: Path
    log: Path
    future: "Future[int]"


class SlurmTask:
    """The callable of a Slurm job. Before preemption or the time limit its worker writes a checkpoint, and the job is
    put into the queue again."""

    def __init__(self, folder: str, submission: Submission) -> None:
        self.folder, self.path, self.log = folder, str(submission.path), str(submission.log)

    def __call__(self) -> int:
        """The status of the job. One that Slurm ends with SIGTERM leaves none: it is in the queue again, or cancelled.

        It waits for its end, since Slurm puts a preempted job into the queue only if it has not ended by itself.
        """
        ended: list[int] = []

        def end(number: int, _: object) -> None:
            ended.append(number)
            terminate_workers(0.0)  # Slurm sends signals to the tasks of a job, and on most clusters to no child

        signal.signal(signal.SIGTERM, end)
        status = run_job(self.folder, self.path, self.log, {})  # sbatch passes the environment on
        if ended and status:
            time.sleep(GRACE)
        return status

    def checkpoint(self) -> Any:
        """The same job again, once its worker has written a checkpoint. submitit calls it on Slurm's signal before the
        time limit or preemption."""
        from submitit.helpers import DelayedSubmission

        terminate_workers(SAVING)
        return DelayedSubmission(self)


class Slurm(Executor):
    """Jobs of Slurm, a trial each, in job arrays. A preempted job is requeued, and its trial resumes.

    Nodes share the working directory; runs belong on a tracking server.
    """

    def __init__(
        self,
        partition: str | None = None,  # partition of the jobs
        account: str | None = None,  # account to charge
        minutes: Count = 1440,  # time limit of a job, which is then requeued
        gpus: Number = 0,  # CUDA devices of a trial
        cpus: Count = 1,  # CPUs of a trial
        memory_gb: Count | None = None,  # main memory of a trial; null is Slurm's default
        jobs: Count = 64,  # jobs that wait or run at a time
        requeues: Number = 10,  # most requeues of a job at its time limit; preemption is not counted
        sbatch: dict[str, Any] | None = None,  # further options of sbatch, such as {qos: low}
        setup: list[str] | None = None,  # lines of shell before a job, such as `module load cuda`
        cluster: Literal["slurm", "local"] = "slurm",  # local runs the same jobs as processes here, to try a sweep
    ) -> None:
        self.cluster, self.requeues = cluster, requeues
        self.slots, self.devices, self.elsewhere = jobs, gpus or None, cluster == "slurm"
        self.threads = self.whole = cpus
        names = {"partition": partition, "account": account, "mem": None if memory_gb is None else f"{memory_gb}GB"}
        self.parameters: dict[str, Any] = {k: v for k, v in names.items() if v is not None}
        self.parameters |= {"time": minutes, "cpus_per_task": cpus, "array_parallelism": jobs}
        self.parameters |= {"additional_parameters": dict(sbatch or {}), "setup": list(setup or [])}
        self.parameters |= {"gpus_per_node": gpus} if gpus else {}
        if reserved := sorted((sbatch or {}).keys() & RESERVED):
            raise SpecError(f"executor.sbatch sets {reserved[0]!r}, which the executor sets itself; leave it out")
        self.queue: queue.SimpleQueue[Submission] = queue.SimpleQueue()
        self.jobs: dict[Path, tuple[Any, Submission]] = {}
        self.missing: dict[Path, float] = {}  # when a job was first neither in the queue nor had a result
        self.lock = threading.Lock()  # of `queue` and `stopped`
        self.stopped = threading.Event()

    def check(self) -> None:
        import_submitit()
        if self.cluster == "slurm":
            import shutil
            import subprocess

            if shutil.which("sbatch") is None:
                raise ValueError("executor 'slurm' needs sbatch, which is not on this machine; run it on a login node")
            command = ["sinfo", "--noheader", "--format=%P"]
            within_reach(
                "Slurm's controller", lambda: subprocess.run(command, check=True, capture_output=True, timeout=9)
            )

    def start(self, folder: Path, show: Show) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        super().start(folder.absolute(), show)
        self.executor = self._executor(self.folder / "slurm")
        self._cancel_left()
        self.tail = Tail(show)
        self.tail.start()
        threading.Thread(target=self._submit, daemon=True).start()

    def run(self, title: str, job: Job) -> int:
        submission = Submission(self.folder / f"{title}.json", self.log(title), Future())
        job.write(submission.path)
        self.tail.follow(lines_of(submission.path))
        try:
            with self.lock:
                if self.stopped.is_set():
                    return 1
                self.queue.put(submission)
            return submission.future.result()
        finally:
            self.tail.leave(lines_of(submission.path))
            submission.path.unlink(missing_ok=True)

    def stop(self) -> None:
        with self.lock:
            self.stopped.set()
        self._give_up()

    def _give_up(self) -> None:
        """Cancel all jobs; those and the submissions that wait end with status 1."""
        for job, submission in list(self.jobs.values()):
            with contextlib.suppress(Exception):  # it may have ended
                job.cancel()
            _resolve(submission, 1)
        with contextlib.suppress(queue.Empty):
            while True:
                _resolve(self.queue.get_nowait(), 1)

    def _executor(self, folder: Path) -> Any:
        submitit = import_submitit()
        if self.cluster == "local":
            executor = submitit.LocalExecutor(folder=folder)
            executor.update_parameters(timeout_min=self.parameters["time"], setup=self.parameters["setup"])
            return executor
        executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=self.requeues)
        executor.update_parameters(job_name=f"sana-{self.folder.name}", **self.parameters)
        return executor

    def _submit(self) -> None:
        """Gather jobs to arrays, submit them, and follow them to their ends."""
        errors = 0
        while not self.stopped.is_set():
            try:
                self._submit_and_poll()
                errors = 0
            except Exception as error:  # of a file system that is out of reach for a while
                errors += 1
                self.show(f"! executor 'slurm': {error}")  # a `Line`
                if errors == TRIES:
                    self.stop()
                time.sleep(POLL)
        self._give_up()  # a job that was submitted meanwhile too

    def _submit_and_poll(self) -> None:
        if batch := self._gathered():
            self._submit_array(batch)
        for path in self._ended():
            job, submission = self.jobs.pop(path)
            _resolve(submission, _status(job, submission.log))

    def _ended(self) -> list[Path]:
        """The jobs that have left a result; or the queue for MISSING_SECONDS, as a job that was killed."""
        if self.cluster == "local":
            return [path for path, (job, _) in self.jobs.items() if job.done()]
        left = in_queue(job.job_id for job, _ in self.jobs.values())
        ended = []
        for path, (job, _) in self.jobs.items():
            if left is None or job.job_id in left:
                self.missing.pop(path, None)
            since = time.monotonic() - self.missing.setdefault(path, time.monotonic())
            if _has_result(job) or since > MISSING_SECONDS:
                ended.append(path)
        self.missing = {path: since for path, since in self.missing.items() if path not in ended}
        return ended

    def _gathered(self) -> list[Submission]:
        """The jobs of the next array: those that come within GATHER of the first; none if none comes for POLL."""
        with contextlib.suppress(queue.Empty):
            batch = [self.queue.get(timeout=POLL)]
            end = time.monotonic() + GATHER
            with contextlib.suppress(queue.Empty):
                while (left := end - time.monotonic()) > 0:
                    batch.append(self.queue.get(timeout=left))
            return batch
        return []

    def _submit_array(self, batch: Sequence[Submission]) -> None:
        try:
            if self.stopped.is_set():
                raise RuntimeError("the sweep was stopped before the job was submitted")
            with self.executor.batch():
                tasks = [SlurmTask(str(Path.cwd()), submission) for submission in batch]
                jobs = [self.executor.submit(task) for task in tasks]
        except Exception as error:  # of sbatch: an option that this cluster refuses
            for submission in batch:
                add_text(submission.log, f"{error}\n")
                _resolve(submission, 1)
            return
        for submission, job in zip(batch, jobs, strict=True):
            self.jobs[submission.path] = (job, submission)
        write_text(self.folder / "slurm-jobs", "\n".join(sorted({job.job_id for job, _ in self.jobs.values()})))

    def _cancel_left(self) -> None:
        """Cancel jobs that a killed sweep of this name has left; their trials resume in new ones."""
        import subprocess

        record = self.folder / "slurm-jobs"
        if self.cluster == "slurm" and record.exists() and (ids := record.read_text().split()):
            subprocess.run(["scancel", *ids], check=False, capture_output=True)
            record.unlink()


def in_queue(jobs: Iterable[str]) -> set[str] | None:
    """Those of the jobs that wait or run; None if Slurm does not say. Accounting (`sacct`) is not needed."""
    import subprocess

    ids = list(jobs)
    if not ids:
        return set()
    command = ["squeue", "--noheader", "--array", "--format=%i", f"--jobs={','.join(ids)}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if answer.returncode and "Invalid job id" not in answer.stderr:  # which is said where none is left
        return None
    return set(answer.stdout.split())


def _resolve(submission: Submission, status: int) -> None:
    """Give a submission its status, unless it has one: the thread and `stop` may both do it."""
    with contextlib.suppress(InvalidStateError):
        submission.future.set_result(status)


def _has_result(job: Any) -> bool:
    """Whether a job has left its result; a change of the folder has a shared file system look again."""
    folder = job.paths.folder
    with contextlib.suppress(OSError):
        folder.chmod(folder.stat().st_mode)
    return bool(job.paths.result_pickle.exists())


def _status(job: Any, log: Path) -> int:
    """The exit status of a job that has ended; 1 if it has no result, and a line of its log that says why."""
    if not _has_result(job):
        with contextlib.suppress(OSError):
            add_text(log, f"job {job.job_id} ended without a result: it was cancelled, or killed on its node\n")
        return 1
    try:
        return int(job.result())
    except Exception as error:  # submitit's errors: the job's own, a result that is truncated
        with contextlib.suppress(OSError):
            add_text(log, f"{error}\n")
        return 1


def import_submitit() -> Any:
    """submitit. ImportError with its extra."""
    try:
        import submitit
    except ImportError as error:
        raise ImportError("executor 'slurm' needs submitit; run: pip install 'sana_lab[slurm]'") from error
    return submitit
