"""Threads that each compute with one core, for work that is cut into independent pieces.

Torch's own threads share each operation, which costs more than it gains where operations are short enough to stay in a
core's cache; here each thread takes whole pieces.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue
from typing import TypeVar

import torch

Job = TypeVar("Job")


def share(jobs: Sequence[Job], work: Callable[[Iterator[Job]], None]) -> None:
    """Call `work` in as many threads as torch computes with, each with an iterator over the jobs that nobody has taken.

    Torch computes with one thread in each, records no gradient, and is as before when this returns; an exception in one
    is raised here. With one thread, or one job, `work` is called here with all jobs.
    """
    threads = torch.get_num_threads()
    inference = torch.is_inference_mode_enabled()
    queue: SimpleQueue[Job] = SimpleQueue()
    for job in jobs:
        queue.put(job)

    def alone() -> None:
        with torch.inference_mode(inference), torch.no_grad():  # in this order: the first sets the second
            work(taken(queue))

    if min(threads, len(jobs)) < 2:
        return alone()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            done = [pool.submit(alone) for _ in range(min(threads, len(jobs)))]
        for future in done:
            future.result()
    finally:
        torch.set_num_threads(threads)  # in the workers it set their own number, and that of threads yet to come


def taken(queue: "SimpleQueue[Job]") -> Iterator[Job]:
    """The jobs of a queue until it is empty."""
    while True:
        try:
            yield queue.get_nowait()
        except Empty:
            return
