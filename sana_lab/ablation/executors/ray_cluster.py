"""Executor `ray`: a task of Ray per job, on a cluster that is running (`pip install sana_lab[ray]`)."""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sana_lab.ablation.executors import Executor, Show, within_reach
from sana_lab.ablation.executors.remote import Tail, add_text, lines_of, run_job, variables
from sana_lab.ablation.protocol import Job
from sana_lab.config.ranges import Count, Nonnegative, Number, Positive
from sana_lab.config.specs import SpecError, nearest

INTERNAL = ("node:", "memory", "object_store_memory")
"""Beginnings of the names of resources that Ray counts itself."""


class RayCluster(Executor):
    """Tasks on a Ray cluster, which waits for free devices itself and starts a task again if its node dies.

    Nodes share the working directory; with several of them runs belong on a tracking server.
    """

    elsewhere = True

    def __init__(
        self,
        address: str = "auto",  # of the cluster: auto is RAY_ADDRESS or the one of this machine; else HOST:PORT
        cpus: Positive = 1.0,  # CPUs of a trial
        gpus: Nonnegative = 0.0,  # CUDA devices of a trial; a fraction below 1 lets several trials share one
        jobs: Count = 64,  # tasks that wait or run at a time
        retries: Number = 2,  # restarts of a task whose node or process died
        resources: dict[str, float] | None = None,  # custom resources of a trial, such as {a100: 1}
        autoscaling: bool = False,  # nodes start on demand, so that a trial may need more than one has now
    ) -> None:
        if gpus > 1 and gpus != int(gpus):
            raise SpecError(f"executor.gpus is {gpus:g}, expected a fraction below 1, or a whole number")
        self.address, self.retries, self.autoscaling = address, retries, autoscaling
        self.options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus, "resources": dict(resources or {})}
        self.slots, self.devices = jobs, max(1, int(gpus)) if gpus else None
        self.threads = self.whole = max(1, int(cpus))
        self.references: dict[str, Any] = {}
        self.lock, self.stopped = threading.Lock(), False

    def check(self) -> None:
        ray = import_ray()
        if not ray.is_initialized():
            within_reach(f"the Ray cluster {self.address!r} (executor.address)", self._connect)
        if not self.autoscaling:
            request = {"GPU": self.options["num_gpus"], "CPU": self.options["num_cpus"], **self.options["resources"]}
            check_fits(request, [node["Resources"] for node in ray.nodes() if node["Alive"]])

    def start(self, folder: Path, show: Show) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        super().start(folder.absolute(), show)
        self.tail = Tail(show)
        self.tail.start()
        options = {"max_retries": self.retries, "max_calls": 0, **self.options}  # 0: processes stay, with their imports
        self.task = import_ray().remote(**options)(run_job)

    def run(self, title: str, job: Job) -> int:
        from ray import exceptions

        path = self.folder / f"{title}.json"
        job.write(path)
        self.tail.follow(lines_of(path))
        with self.lock:
            if self.stopped:
                return 1
            reference = self.task.remote(str(Path.cwd()), str(path), str(self.log(title)), variables())
            self.references[title] = reference
        try:
            return int(import_ray().get(reference))
        except (exceptions.RayError, ValueError) as error:
            add_text(self.log(title), f"{error}\n")
            return 1
        finally:
            self.references.pop(title, None)
            self.tail.leave(lines_of(path))
            path.unlink(missing_ok=True)

    def stop(self) -> None:
        with self.lock:
            self.stopped = True
            references = list(self.references.values())
        for reference in references:
            import_ray().cancel(reference, force=True)

    def close(self) -> None:
        self.stop()
        import_ray().shutdown()

    def _connect(self) -> None:
        ray = import_ray()
        ray.init(address=self.address, log_to_driver=False, configure_logging=False, include_dashboard=False)


def check_fits(request: Mapping[str, float], nodes: Sequence[Mapping[str, float]]) -> None:
    """SpecError for resources of a trial that no node has, for which Ray would wait without end."""
    amounts = {name: amount for name, amount in request.items() if amount}
    names = {name: None for node in nodes for name in node if not name.startswith(INTERNAL)}
    if unknown := next((name for name in amounts if name not in ("CPU", "GPU", *names)), None):
        raise SpecError(
            f"executor.resources has {unknown!r}, which no node of the cluster has; {nearest(unknown, names)}"
        )
    if any(all(node.get(name, 0) >= amount for name, amount in amounts.items()) for node in nodes):
        return
    order = [*(name for name in amounts if name != "CPU"), "CPU"]
    largest = max(nodes, key=lambda node: [node.get(name, 0) for name in order], default={})
    raise SpecError(
        f"executor 'ray' asks for {_amounts(amounts, order)} a trial, and the largest node of the cluster has "
        f"{_amounts(largest, order)}; expected at most what one has, or autoscaling: true where nodes "
        "start on demand"
    )


def _amounts(resources: Mapping[str, float], names: Sequence[str]) -> str:
    return ", ".join(f"{name} {resources.get(name, 0):g}" for name in names)


def import_ray() -> Any:
    """Ray. ImportError with its extra."""
    try:
        import ray
    except ImportError as error:
        raise ImportError("executor 'ray' needs Ray; run: pip install 'sana_lab[ray]'") from error
    return ray
