"""The processes of one training, a device each: those that torchrun started, or that this process starts itself.

The first rank alone locks, decides and records. Every rank trains on an equal part of each batch.
"""

import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from multiprocessing import connection, parent_process
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from torch import multiprocessing, nn

from sana_lab.config import specs
from sana_lab.config.schema import Config
from sana_lab.config.validation import SpecError
from sana_lab.environment import join_processes
from sana_lab.systems import System
from sana_lab.training import strategies
from sana_lab.training.terminated import SAVING, Terminated, interrupt_on_sigterm

T = TypeVar("T")

CORES = "CPU cores"

WAIT = timedelta(days=30)  # for the first rank, which may wait for another training of the same model


def launched() -> bool:
    """Whether torchrun started this process, as one of several or alone."""
    return dist.is_available() and dist.is_torchelastic_launched()


def is_first() -> bool:
    """Whether this process locks, decides and records."""
    return not launched() or os.environ["RANK"] == "0"


def join(options: Config) -> None:
    """Join the processes that torchrun or `start` started, with the backend of the `trainer:` options' devices;
    Lightning uses this group too."""
    if launched():
        cuda = options["accelerator"] != "cpu" and torch.cuda.is_available()
        join_processes(cuda, _own_device(options["devices"]) if cuda else None)


def _own_device(devices: int | str) -> int:
    """The number of this process's device: of a list such as 4,5 the one at its place."""
    place = int(os.environ["LOCAL_RANK"])
    return int(_listed(devices)[place]) if isinstance(devices, str) and "," in devices else place


def first(decide: Callable[[], T]) -> T:
    """What the first rank decides, on every rank. In a process that torchrun or `start` started `join` comes first."""
    if not launched():
        return decide()
    box: list[Any] = [decide() if is_first() else None]
    dist.broadcast_object_list(box, src=0, group=_group())
    decision: T = box[0]
    return decision


@cache
def _group() -> Any:
    """The processes that torchrun started, for messages of the host."""
    return dist.new_group(timeout=WAIT, backend="gloo")


# Number of devices


def count(experiment: Config, elsewhere: int | None = None) -> int:
    """Number of processes to train with, on this machine or on another one of `elsewhere` devices. SpecError where they
    cannot share a batch, or torchrun started others."""
    options = experiment["trainer"]
    local, world = _launched_counts() if launched() else (0, 0)
    given = _given(options["devices"])
    if launched() and given not in (None, local):
        raise SpecError(
            f"torchrun started {local} processes, and trainer.devices is {options['devices']!r}; expected auto"
        )
    ranks = world or given or _available(options["accelerator"], elsewhere)
    if ranks == 1 or not options["max_steps"]:
        return 1
    reason = obstacle(experiment, ranks)
    if reason is None:
        return ranks
    if world or given:
        raise SpecError(f"{ranks} devices cannot share the training: {reason}")
    return next(n for n in range(ranks - 1, 0, -1) if n == 1 or obstacle(experiment, n) is None)


def check_available(options: Config) -> None:
    """SpecError for more devices than this machine has; on the CPU a device is a process, of a core at least."""
    devices, (total, kind) = options["devices"], _present(options["accelerator"])
    if launched() and (local := _launched_counts()[0]) > total:
        raise SpecError(f"torchrun started {local} processes here, and this machine has {total} {kind}")
    if isinstance(devices, str) and "," in devices and kind != CORES:
        if missing := [d for d in _listed(devices) if int(d) >= total]:
            raise SpecError(
                f"trainer.devices names device {missing[0]}, and this machine has {total} {kind}; expected numbers "
                f"from 0 to {total - 1}"
            )
    elif not launched() and (given := _given(devices) or 1) > total:
        raise SpecError(f"trainer.devices is {given}, and this machine has {total} {kind}; expected at most {total}")


def _present(accelerator: str) -> tuple[int, str]:
    """Number of the devices to train on, and what they are."""
    if accelerator == "mps":
        return 1, "MPS device"
    gpus = torch.cuda.device_count() if accelerator != "cpu" else 0
    return (gpus, "GPUs" if gpus > 1 else "GPU") if gpus else (os.cpu_count() or 1, CORES)


def obstacle(experiment: Config, ranks: int) -> str | None:
    """Why so many ranks would not train the model of one device; None where they do."""
    with torch.device("meta"):
        system: System = specs.build("system", experiment["system"])
    norms = (m for name, m in system.named_modules() if not name.startswith(system.frozen))
    if not system.divisible or any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in norms):
        return (
            f"the loss of system {specs.name_of(experiment['system'])!r} mixes the items of a batch; expected 1 device"
        )
    methods = system.part("methods")
    for name in [] if methods is None else map(specs.name_of, methods.specs):
        if not getattr(specs.find("method", name), "divisible", True):
            return f"the term of method {name!r} mixes the items of a batch; expected 1 device"
    batch = experiment["data"].get("batch")
    if isinstance(batch, int) and batch % ranks:
        nearest = max(1, round(batch / ranks)) * ranks
        return f"data.batch {batch} is not a multiple of {ranks}; the nearest is {nearest}"
    return None


def _launched_counts() -> tuple[int, int]:
    """Processes of this machine, and of all."""
    return int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])


def _given(devices: int | str) -> int | None:
    """The number that `trainer.devices` says; None for auto."""
    if devices == "auto":
        return None
    if isinstance(devices, str):
        return len(_listed(devices)) if "," in devices else int(devices)
    return devices


def _listed(devices: str) -> list[str]:
    return [d for d in devices.split(",") if d]


def _available(accelerator: str, elsewhere: int | None) -> int:
    devices = torch.cuda.device_count() if elsewhere is None else elsewhere
    return max(1, devices) if accelerator in ("auto", "gpu", "cuda") else 1


def placement(options: Config, count: int) -> dict[str, Any]:
    """Devices and strategy of the Trainer."""
    devices = options["devices"]
    if isinstance(devices, str) and "," in devices and options["accelerator"] != "cpu":
        return {"devices": devices, **_strategy(options["strategy"], count)}
    own = min(count, _launched_counts()[0]) if launched() else count
    return {"devices": own, **_strategy(options["strategy"], count)}


def _strategy(name: str, count: int) -> dict[str, Any]:
    if count == 1:
        return {}
    return {"strategy": strategies.build(name, count), "num_nodes": count // _launched_counts()[0]}


def plugins(count: int) -> list[Any]:
    """What tells the Trainer the rank of a process; never Slurm's variables, by which Lightning would take the tasks of
    a job for ranks and requeue the job itself, which the executor of a sweep does."""
    return [TorchElasticEnvironment() if count > 1 or launched() else LightningEnvironment()]


# Starting them


def start(ranks: int, work: Callable[..., object], *arguments: object) -> None:
    """Call `work` in so many processes on this machine and wait for them; where one fails, end all and raise its error.
    On SIGTERM, where the caller raises `Terminated`, they get it too, and time to write a checkpoint.

    As for all processes that Python spawns, a script that trains is guarded by `if __name__ == "__main__"`.
    """
    context, port = multiprocessing.get_context("spawn"), _free_port()
    call = pickle.dumps((work, arguments))
    workers: dict[Any, Any] = {}
    errors: dict[Any, Any] = {}
    try:
        for rank in range(ranks):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_run, args=(_place(rank, ranks, port), call, sender))
            process.start()
            sender.close()
            workers[process.sentinel], errors[process.sentinel] = process, receiver
        while workers:
            for sentinel in connection.wait(list(workers)):
                process, receiver = workers.pop(sentinel), errors[sentinel]
                process.join()
                if process.exitcode:
                    raise _error(receiver, process.exitcode)
    except Terminated:
        for process in workers.values():
            process.terminate()
        end = time.monotonic() + SAVING
        for process in workers.values():
            process.join(max(0.0, end - time.monotonic()))
        raise
    finally:
        for process in workers.values():
            process.kill()  # at once: files are written whole or not at all
            process.join()


def _place(rank: int, ranks: int, port: int) -> dict[str, str]:
    """The variables that tell a process its rank, as torchrun names them."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "sana-lab"}
    quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # that every parameter had a gradient is no warning
    return {name: str(value) for name, value in {**numbers, **place, **quiet}.items()}


def _run(place: dict[str, str], call: bytes, sender: connection.Connection) -> None:
    """The life of one process: its place first, since libraries read it while they are imported."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(place)
    with interrupt_on_sigterm(signal.SIGUSR2):  # which Slurm may send to every process of a job
        try:
            work, arguments = pickle.loads(call)
            work(*arguments)
        except BaseException as error:
            sender.send_bytes(_pickled(error))
            sys.exit(1)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _pickled(error: BaseException) -> bytes:
    """An error as it is, or its text where it cannot be rebuilt elsewhere."""
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
    except Exception:  # of the error's own methods
        data = pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    return data


def _error(receiver: connection.Connection, status: int) -> BaseException:
    try:
        error: BaseException = pickle.loads(receiver.recv_bytes())
    except EOFError:  # killed before it could send one
        return RuntimeError(f"a process of the training ended with status {status}")
    return error


def _free_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
