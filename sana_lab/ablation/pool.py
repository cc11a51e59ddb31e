"""Worker processes of one sweep, one for each job, so that a crash costs one job and not the sweep."""

import os
import subprocess
import sys
from pathlib import Path

from sana_lab.ablation.progress import ProgressBar
from sana_lab.ablation.protocol import Job, Line, Progress


class WorkerPool:
    """Start a process for each job and read its progress; `stop` kills all that run."""

    def __init__(self, folder: Path, bar: ProgressBar) -> None:
        self.folder, self.bar = folder, bar
        self.folder.mkdir(parents=True, exist_ok=True)
        self.processes: set[subprocess.Popen[str]] = set()
        self.stopped = False

    def run(self, title: str, job: Job) -> int:
        """Do a job to its end; the exit status. The log is `title`.log in the sweep's folder; the
        job is `title`.json there until the worker has read it."""
        if self.stopped:
            return 0
        path = self.folder / f"{title}.json"
        job.write(path)
        command = [sys.executable, "-m", "sana_lab.ablation.worker", str(path), str(os.getpid())]
        variables = {**os.environ, "OMP_NUM_THREADS": str(job.threads), "TOKENIZERS_PARALLELISM": "false"}
        with (
            self.log(title).open("w") as log,
            subprocess.Popen(
                command, env=variables, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
            ) as process,
        ):
            self.processes.add(process)
            if self.stopped:  # while this one was starting
                process.kill()
            assert process.stdout is not None
            for line in process.stdout:
                self.show(line)
        self.processes.discard(process)
        path.unlink(missing_ok=True)  # where the worker ended before it read it
        return process.returncode

    def show(self, line: str) -> None:
        """Move the bar by a worker's message, or print its line; other output is ignored."""
        if announced := Line.parse(line):
            self.bar.print(announced.text)
        if message := Progress.parse(line):
            self.bar.advance(message.steps, message.text, resumed=message.resumed)

    def log(self, title: str) -> Path:
        """The stderr of a job."""
        return (self.folder / f"{title}.log").absolute()

    def stop(self) -> None:
        """Kill immediately; safe because checkpoints and weights files are written atomically."""
        self.stopped = True
        for process in list(self.processes):
            process.kill()
