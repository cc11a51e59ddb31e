"""The end of a training by SIGTERM, or by another signal that means the same."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SAVING = 100.0
"""Seconds that processes have on SIGTERM for their step and a checkpoint, before they are killed."""


class Terminated(KeyboardInterrupt):
    """SIGTERM has ended the process; what was trained is in a checkpoint, for the command to be run again."""

    status = 128 + signal.SIGTERM  # exit status, as of a process that the signal ends


@contextmanager
def interrupt_on_sigterm(*others: signal.Signals) -> Iterator[None]:
    """Raise `Terminated` on SIGTERM within the block, in training after the step; the `others` are taken for SIGTERM.
    Signals are of the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise Terminated

    def as_sigterm(*_: object) -> None:
        signal.raise_signal(signal.SIGTERM)  # whose handler is another one in training

    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, interrupt)}
    before |= {number: signal.signal(number, as_sigterm) for number in others}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
