"""The jobs of one sweep on an executor, with their progress on the bar."""

import signal
from pathlib import Path

from sana_lab.ablation.executors import Executor
from sana_lab.ablation.progress import ProgressBar
from sana_lab.ablation.protocol import Job, Line, Progress
from sana_lab.training.terminated import Terminated

TERMINATED = (Terminated.status, -signal.SIGTERM)
"""Statuses of a worker that SIGTERM ended: with a checkpoint, or before it could do any work."""

RESTARTS = 10
"""Most times that a job is done again after SIGTERM."""


class WorkerPool:
    """Do jobs on an executor and show their progress; `stop` ends all that run."""

    def __init__(self, folder: Path, bar: ProgressBar, executor: Executor) -> None:
        self.folder, self.bar, self.executor = folder, bar, executor
        self.stopped = False
        try:
            executor.start(folder, self.show)
        except BaseException:
            executor.close()
            raise

    def run(self, title: str, job: Job) -> int:
        """Do a job to its end; the exit status. One whose worker got SIGTERM is done again, from its last checkpoint.
        The log is `title`.log in the sweep's folder."""
        for restart in range(RESTARTS + 1):
            if restart and not self.stopped:
                self.bar.print(f"{title}: its worker was ended by SIGTERM; it goes on from its last checkpoint")
            status = 0 if self.stopped else self.executor.run(title, job)
            if status not in TERMINATED:
                break
        return status

    def show(self, line: str) -> None:
        """Move the bar by a worker's message, or print its line; other output is ignored."""
        if announced := Line.parse(line):
            self.bar.print(announced.text)
        if message := Progress.parse(line):
            self.bar.advance(message.steps, message.text, resumed=message.resumed)

    def log(self, title: str) -> Path:
        """The stderr of a job."""
        return self.executor.log(title)

    def stop(self) -> None:
        """End all jobs immediately; safe because checkpoints and weights files are written atomically."""
        self.stopped = True
        self.executor.stop()

    def terminate(self) -> None:
        """End all jobs as SIGTERM does: trainings after their step, with a checkpoint."""
        self.stopped = True
        self.executor.terminate()
