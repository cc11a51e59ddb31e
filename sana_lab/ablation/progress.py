"""A progress bar whose time left is sensible from the start, whoever works and however many at a time."""

import sys
from typing import Any, TextIO

from tqdm import tqdm

LAYOUT = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}"


class Bar(tqdm):
    """The time left is what is left over the mean rate since work began: since the first thing that was told, for
    processes take seconds to start. It is hidden until `settle` seconds of work were seen."""

    def __init__(self, name: str, total: int, *, settle: float = 15.0, file: TextIO | None = None) -> None:
        self.settle, self.skipped, self.first = settle, 0.0, None
        super().__init__(
            total=total, desc=name, bar_format=LAYOUT, dynamic_ncols=True, mininterval=1.0, file=file or sys.stderr
        )

    def advance(self, steps: int, *, counts: bool = True) -> None:
        """So many steps further; those that were done before (`counts` false) do not count for the rate."""
        if self.first is None:
            self.first = self._time()
            counts = False
        if not counts:
            self.skipped += steps
        self.update(steps)

    @property
    def rate(self) -> float:
        """Steps a second since work began; 0 where that is not known yet."""
        seconds = 0.0 if self.first is None else self._time() - self.first
        return (self.n - self.skipped) / seconds if seconds >= self.settle else 0.0

    @property
    def format_dict(self) -> Any:
        return {**super().format_dict, "rate": self.rate}
