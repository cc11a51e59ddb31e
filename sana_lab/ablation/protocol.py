"""Protocol between the runner and its worker processes: a job as a JSON file, progress as lines of stdout."""

import json
import os
import threading
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sana_lab.config.atomic_write import write_text

EVALUATION, MEASUREMENT = 400, 150
"""Weight of a trial's evaluation and cost measurement in the progress bar, in training steps."""

Kind = Literal["train", "evaluate", "append", "measure"]


class Job(NamedTuple):
    """Work for one process: train an experiment, evaluate trials that share a model, append measures to finished ones,
    or measure costs one by one."""

    kind: Kind
    store: str  # home folder of the runs
    threads: int  # CPU threads of torch
    trials: list[dict[str, Any]]  # {run, key, label, kind, config, weights, retrain, pruning} each
    experiment: str | None = None  # to train
    device: str | None = None  # that probes are timed on; None: counted only
    elsewhere: bool = False  # whether the worker is on another machine than the runner, which has not checked it

    def write(self, path: Path) -> None:
        write_text(path, json.dumps(self._asdict()))

    @classmethod
    def read(cls, path: Path) -> "Job":
        return cls(**json.loads(path.read_text()))


def _send(message: str) -> None:
    """Print a message for the runner. On a broken pipe (the runner was killed), end this process immediately."""
    try:
        print(message, flush=True)
    except BrokenPipeError:
        os._exit(1)


class Progress(NamedTuple):
    """So many steps more, in units of training steps, and what is going on."""

    steps: int
    text: str
    resumed: bool = False  # steps done before a restart, excluded from the speed

    def send(self) -> None:
        """Print the message for the runner."""
        _send(f"{'+' if self.resumed else '@'} {self.steps} {self.text}")

    @classmethod
    def parse(cls, line: str) -> "Progress | None":
        """The message in a line of a worker's stdout; None for anything that a library prints there."""
        mark, _, message = line.strip().partition(" ")
        steps, _, text = message.partition(" ")
        return cls(int(steps), text, mark == "+") if mark in ("@", "+") and steps.isdigit() else None


class Line(NamedTuple):
    """A line for the user, printed by the runner beside its bar."""

    text: str

    def send(self) -> None:
        """Print the message for the runner."""
        _send(f"! {self.text}")

    @classmethod
    def parse(cls, line: str) -> "Line | None":
        """The message in a line of a worker's stdout."""
        mark, _, text = line.strip().partition(" ")
        return cls(text) if mark == "!" and text else None


class End(NamedTuple):
    """The end of a job, after which the worker waits for another, or ends because a trial failed in it."""

    status: int
    retires: bool = False

    def send(self) -> None:
        """Print the message for the runner."""
        _send(f"= {self.status} {int(self.retires)}")

    @classmethod
    def parse(cls, line: str) -> "End | None":
        """The message in a line of a worker's stdout."""
        words = line.split()
        ends = len(words) == 3 and words[0] == "=" and words[1].isdigit() and words[2] in ("0", "1")
        return cls(int(words[1]), words[2] == "1") if ends else None


def exit_with_parent(parent: int, seconds: float = 0.5) -> threading.Thread:
    """End this process soon after its parent ends (immediately if it already has), so that a killed sweep leaves no
    workers."""

    def poll() -> None:
        while os.getppid() == parent:
            threading.Event().wait(seconds)
        os._exit(1)

    if os.getppid() != parent:
        os._exit(1)
    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    return thread
