"""Executors: where the jobs of a sweep run. On this machine, as tasks of Ray, or as jobs of Slurm.

In all of them a job is done by the same process, `python -m sana_lab.ablation.worker`, which stays for the next job.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from sana_lab.ablation.protocol import Job

T = TypeVar("T")

Show = Callable[[str], None]
"""Takes a line of a worker's output."""

REACH = 10.0
"""Seconds in which a cluster has to answer."""


class Executor(ABC):
    """Runs jobs in worker processes; `run` is called from several threads, at most `slots` at a time."""

    slots: int
    """Jobs at a time."""

    devices: int | None
    """CUDA devices of a job; None if they are not counted, as on a machine without any."""

    elsewhere: bool = False
    """Whether jobs run on other machines, whose devices this one does not see."""

    threads: int
    """CPU threads of a job while others run beside it."""

    whole: int
    """CPU threads of a job that runs alone."""

    @abstractmethod
    def check(self) -> None:
        """Before any work: ImportError for a missing package with its extra, ValueError for a cluster out of reach."""

    def start(self, folder: Path, show: Show) -> None:
        """Prepare for jobs, whose files are in `folder`; `show` takes their lines."""
        self.folder, self.show = folder, show

    @abstractmethod
    def run(self, title: str, job: Job) -> int:
        """Do a job to its end. The exit status: 0, or of a process that died, -9 for SIGKILL."""

    @abstractmethod
    def stop(self) -> None:
        """End all jobs immediately."""

    def terminate(self) -> None:
        """End all jobs, trainings with a checkpoint where the executor can wait for it."""
        self.stop()

    def close(self) -> None:
        """End idle workers, after the last job."""
        self.stop()

    def log(self, title: str) -> Path:
        """The stderr of a job."""
        return (self.folder / f"{title}.log").absolute()


def within_reach(cluster: str, connect: Callable[[], T], seconds: float = REACH) -> T:
    """What `connect` returns. ValueError if it raises, or takes longer than a cluster may."""
    outcome: list[T] = []
    errors: list[BaseException] = []

    def attempt() -> None:
        try:
            outcome.append(connect())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    if outcome:
        return outcome[0]
    reason = f"no answer in {seconds:g} s"
    if errors:
        reason = next(iter(str(errors[0]).splitlines()), type(errors[0]).__name__)
    raise ValueError(f"{cluster} cannot be reached: {reason}")
