"""A worker process that does one job after another, so that a sweep pays for imports once per worker."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from sana_lab.ablation.executors import Show
from sana_lab.ablation.protocol import End


class WarmWorker:
    """Starts `python -m sana_lab.ablation.worker` for the first job, and again after one that failed or died.

    The process ends with this one, however that ends.
    """

    def __init__(self, variables: Mapping[str, str]) -> None:
        self.variables = dict(variables)  # of the environment, beside that of this process
        self.process: subprocess.Popen[str] | None = None

    def run(self, job: Path, log: Path, show: Show, *, keep: bool = False) -> int:
        """Do the job of a file, which the worker deletes unless `keep`; the exit status. Its stderr goes to `log`."""
        process = self._started(log)
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps({"job": str(job), "log": str(log), "keep": keep}) + "\n")
            process.stdin.flush()
        except BrokenPipeError:  # it has died; its output ends below
            pass
        for line in process.stdout:
            if (end := End.parse(line)) is None:
                show(line)
            else:
                if end.retires:
                    self.close()
                return end.status
        self._discard(process)
        return process.returncode or 1

    def kill(self) -> None:
        """End the process immediately; safe because checkpoints and weights files are written atomically."""
        if (process := self.process) is not None:
            process.kill()

    def terminate(self) -> None:
        """Send SIGTERM: a training ends after its step, with a checkpoint; another job at once."""
        if (process := self.process) is not None:
            process.terminate()

    def wait(self, seconds: float) -> None:
        """Wait for the end of the process, so long at most."""
        if (process := self.process) is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, seconds))

    def close(self) -> None:
        """End the process once it is idle."""
        if (process := self.process) is not None:
            process.kill()  # an idle worker has nothing to finish
            self._discard(process)

    def _discard(self, process: subprocess.Popen[str]) -> None:
        """Wait for the end of a process, and close its pipes."""
        self.process = None
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):  # a line that it has not read
                pipe.close()  # type: ignore[union-attr]

    def _started(self, log: Path) -> subprocess.Popen[str]:
        if self.process is not None and self.process.poll() is not None:  # killed while it was idle
            self._discard(self.process)
        if self.process is None:
            command = [sys.executable, "-m", "sana_lab.ablation.worker", str(os.getpid())]
            variables = {**os.environ, "TOKENIZERS_PARALLELISM": "false", **self.variables}
            pipe = subprocess.PIPE
            with log.open("w") as errors:
                self.process = subprocess.Popen(
                    command, env=variables, stdin=pipe, stdout=pipe, stderr=errors, text=True, start_new_session=True
                )
        return self.process
