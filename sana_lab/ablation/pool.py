"""The jobs of one sweep on an executor, with their progress on the bar."""

from pathlib import Path

from sana_lab.ablation.executors import Executor
from sana_lab.ablation.progress import ProgressBar
from sana_lab.ablation.protocol import Job, Line, Progress


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
        """Do a job to its end; the exit status. The log is `title`.log in the sweep's folder."""
        return 0 if self.stopped else self.executor.run(title, job)

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
