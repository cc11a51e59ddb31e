"""Thread pool of single-core workers for independent pieces of work.

Torch parallelises within each operation, which is inefficient for operations that fit in a core's cache; here each
thread computes whole pieces.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue
from typing import TypeVar

import torch

Job = TypeVar("Job")


def share(jobs: Sequence[Job], work: Callable[[Iterator[Job]], None]) -> None:
    """Call `work` in `torch.get_num_threads()` threads, each with an iterator over a shared queue of the jobs.

    Each worker runs torch with one thread and without autograd; torch's number of threads is restored at the end.
    Workers' exceptions are raised here. With one thread or one job, `work` is called in the calling thread.
    """
    threads = torch.get_num_threads()
    inference = torch.is_inference_mode_enabled()
    queue: SimpleQueue[Job] = SimpleQueue()
    for job in jobs:
        queue.put(job)

    def run() -> None:
        with torch.inference_mode(inference), torch.no_grad():  # in this order: the first sets the second
            work(drain(queue))

    if min(threads, len(jobs)) < 2:
        return run()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            futures = [pool.submit(run) for _ in range(min(threads, len(jobs)))]
        for future in futures:
            future.result()
    finally:
        torch.set_num_threads(threads)  # the workers have also set the number of later threads


def drain(queue: "SimpleQueue[Job]") -> Iterator[Job]:
    """Jobs of a queue until it is empty."""
    while True:
        try:
            yield queue.get_nowait()
        except Empty:
            return
