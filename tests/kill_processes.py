"""Verbs in processes of their own that can be killed: forked from a server that has the lab's imports done.

Imports write nothing, so a kill during them loses nothing; without them a random moment is one of work.
"""

import multiprocessing
import os
import sys
from collections.abc import Sequence
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

PRELOADED = ["sana_lab.training.train", "sana_lab.ablation.runner", "sana_lab.shapes.data", "mlflow", "kill_processes"]


def context() -> ForkServerContext:
    """The server, which starts with the first process."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOADED)
    return server


def start(server: ForkServerContext, folder: Path, words: Sequence[str]) -> ForkServerProcess:
    """`sana-lab WORDS` in a folder; its output is added to `folder/output`."""
    process = server.Process(target=run, args=(str(folder), list(words)))
    process.start()
    return process


def run(folder: str, words: list[str]) -> None:
    os.chdir(folder)
    output = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = ["sana-lab", *words]
    import torch

    from sana_lab import __main__

    torch.set_num_threads(1)
    status = __main__.main(words)
    Path(f"status-{os.getpid()}").write_text(str(status))
    os._exit(status)


def status(process: ForkServerProcess, folder: Path) -> int | None:
    """Exit status of a verb that has ended by itself; None if it was killed.

    `Process.exitcode` is not it: where several threads start processes, it may be 255.
    """
    path = folder / f"status-{process.pid}"
    return int(path.read_text()) if path.exists() else None
