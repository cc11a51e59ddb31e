"""The progress bar of a sweep: the time left is sensible from the start, whoever works and however many at a time."""

import sys
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

SETTLE = 15.0
"""Seconds of work before the time left is shown."""

QUIET = 60.0
"""Seconds between lines if the output is not a terminal."""


class TimeLeft(ProgressColumn):
    """Remaining work over the mean rate since the first message: processes take seconds to start, and steps that were
    done before a restart are no work of now. Rich's estimate uses only the last 30 seconds."""

    def render(self, task: Task) -> Text:
        seconds = seconds_left(task)
        return Text("left -:--" if seconds is None else f"left {clock(seconds)}", style="progress.remaining")


def rate(task: Task) -> float | None:
    """Steps per second since work began; None if not known yet."""
    if task.fields["began"] is None or (seconds := task.get_time() - task.fields["began"]) < SETTLE:
        return None
    return max(0.0, task.completed - task.fields["resumed"]) / seconds


def seconds_left(task: Task) -> float | None:
    speed = rate(task)
    return max(0.0, (task.total or 0.0) - task.completed) / speed if speed else None


def clock(seconds: float) -> str:
    """1:02:03, or 02:03 below an hour."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"


class ProgressBar:
    """Rich's bar on stderr with `TimeLeft`; a line a minute where stderr is no terminal."""

    def __init__(
        self, name: str, total: int, *, console: Console | None = None, now: Callable[[], float] = time.monotonic
    ) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeLeft(),
            TextColumn("{task.fields[text]}"),
        )
        self.console = console or Console(file=sys.stderr)
        self.bar = Progress(*columns, console=self.console, get_time=now, disable=not self.console.is_terminal)
        self.bar.add_task(name, total=total, text="", began=None, resumed=0)
        (self.task,) = self.bar.tasks
        self.now, self.printed = now, now()

    def __enter__(self) -> "ProgressBar":
        self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.stop()

    def advance(self, steps: int, text: str = "", *, resumed: bool = False) -> None:
        """Advance by a number of steps and show the current activity. The first message starts the clock; its steps are
        not timed."""
        fields: dict[str, Any] = {"text": text}
        if self.task.fields["began"] is None:
            fields["began"], resumed = self.now(), True
        if resumed:
            fields["resumed"] = self.task.fields["resumed"] + steps
        self.bar.update(self.task.id, advance=steps, **fields)
        if not self.console.is_terminal and self.now() - self.printed >= QUIET:
            self.printed = self.now()
            self.console.print(self.line(), highlight=False)

    def print(self, text: str) -> None:
        """Print a line above the bar."""
        self.printed = self.now()
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def line(self) -> str:
        """The bar as text."""
        seconds = seconds_left(self.task)
        left = "" if seconds is None else f", {clock(seconds)} left"
        return f"{self.task.description}: {self.task.percentage:.0f} %{left}; {self.task.fields['text']}"
