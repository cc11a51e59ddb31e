"""Executor `local`: worker processes on this machine, one or several to a CUDA device."""

import os
import queue
import time
from pathlib import Path

import torch

from sana_lab import environment
from sana_lab.ablation.executors import Executor, Show
from sana_lab.ablation.executors.warm import WarmWorker
from sana_lab.ablation.protocol import Job
from sana_lab.config.ranges import Count, Threads
from sana_lab.config.specs import SpecError
from sana_lab.training.terminated import SAVING


class Local(Executor):
    """Processes on this machine, each in a slot with its own CUDA devices and share of the cores."""

    def __init__(
        self,
        workers: Threads | None = None,  # trials at a time; null is one per slot of the devices, else 1 or 2 on a CPU
        per_device: Count = 1,  # trials that share a CUDA device
        devices: Count = 1,  # CUDA devices of a trial; a trial never takes more
    ) -> None:
        available = device_ids()
        groups = device_groups(available, devices, per_device)
        self.slots = workers or len(groups) or min(2, environment.cores())
        self.devices = devices if available else None
        self.whole = environment.cores()
        self.threads = self.whole // self.slots or 1
        self.stopped = False
        slots = [groups[i % len(groups)] if groups else [] for i in range(self.slots)]
        self.workers = [WarmWorker(self._variables(ids)) for ids in slots]
        self.idle: queue.SimpleQueue[WarmWorker] = queue.SimpleQueue()
        for worker in self.workers:
            self.idle.put(worker)

    def check(self) -> None:
        """Nothing: a machine is within its own reach."""

    def start(self, folder: Path, show: Show) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        super().start(folder, show)

    def run(self, title: str, job: Job) -> int:
        path = self.folder / f"{title}.json"
        job.write(path)
        worker = self.idle.get()
        try:
            return 1 if self.stopped else worker.run(path, self.log(title), self.show)
        finally:
            self.idle.put(worker)
            path.unlink(missing_ok=True)  # where the worker ended before it read it

    def stop(self) -> None:
        self.stopped = True
        for worker in self.workers:
            worker.kill()

    def terminate(self) -> None:
        self.stopped = True
        for worker in self.workers:
            worker.terminate()
        end = time.monotonic() + SAVING
        for worker in self.workers:
            worker.wait(end - time.monotonic())
        self.stop()

    def close(self) -> None:
        self.stopped = True
        for worker in self.workers:
            worker.close()

    def _variables(self, ids: list[str]) -> dict[str, str]:
        variables = {"OMP_NUM_THREADS": str(self.threads)}
        return variables | ({"CUDA_VISIBLE_DEVICES": ",".join(ids)} if ids else {})


def device_ids() -> list[str]:
    """The CUDA devices of this process, as CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return visible[:count] if visible else [str(i) for i in range(count)]


def device_groups(ids: list[str], devices: int, per_device: int) -> list[list[str]]:
    """The devices of each slot; several slots share a device. SpecError for more devices than there are."""
    if ids and devices > len(ids):
        raise SpecError(f"executor.devices is {devices}, and this machine has {len(ids)}; expected at most {len(ids)}")
    if devices > 1 and per_device > 1:
        raise SpecError(
            f"executor.per_device is {per_device}, and a trial has {devices} devices of its own; expected per_device 1"
        )
    whole = [ids[i : i + devices] for i in range(0, len(ids) - devices + 1, devices)]
    return [group for _ in range(per_device) for group in whole]
