"""Command `sana-lab ui`: MLflow's server, local only, with links to a table view of the runs.

The view has one row per trial and one column per metric.
"""

import os
import socket
import sys
from contextlib import closing
from pathlib import Path

from sana_lab.tracking.store import Store, artifact_link
from sana_lab.tracking.view import ROWS, VIEW, write_view

TRAINING = "workflowType=machine_learning"
"""Part of an address without which a new browser opens MLflow's pages for agents."""

LOOPBACK = ("127.0.0.1", "localhost")


def serve(home: Path | str, host: str = "127.0.0.1", port: int = 5000) -> None:
    """Print a link to each experiment's runs, then exec `mlflow server`, which Ctrl-C and SIGTERM end.

    If the port is busy, the next free one is used. ValueError if there are no runs under `home`, or if `host` is not
    local, because the server has no password.
    """
    store = Store(home)
    if store.server is not None:
        print(
            "\n".join(
                line for name, id_ in store.experiments().items() for line in links(store, store.server, name, id_)
            )
        )
        return
    free = free_port(host, port)
    experiments = _check(store, host)
    if free != port:
        print(f"port {port} is busy; using {free}")
    for name, experiment in experiments.items():
        write_view(store, experiment)
        print("\n".join(links(store, f"http://{host}:{free}", name, experiment)))
    print("MLflow answers in about ten seconds; Ctrl-C stops it", flush=True)
    os.execve(sys.executable, command(store, host, free), environment())


def links(store: Store, base: str, name: str, experiment: str) -> list[str]:
    """The lines on an experiment: its trials, their charts, and for a sweep the page with its answer and its report."""
    runs = runs_link(base, experiment)
    lines = [f"{name}: {runs}", f"  curves and images: {charts_link(runs)}"]
    for sweep in store.find(name, {"sana.kind": "sweep"})[:1]:
        lines = [
            f"{name}: {base}/#/experiments/{experiment}/runs/{sweep.id}?{TRAINING}",
            f"  report: {base}/{artifact_link(experiment, sweep.id, 'table/report.html')}?{TRAINING}",
            f"  trials: {runs}",
            f"  charts: {charts_link(runs)}",
            f"  means over seeds: {charts_link(runs_link(base, experiment, ROWS))}",
        ]
    return lines


def runs_link(base: str, experiment: str, view: str = VIEW) -> str:
    """The table of runs of an experiment."""
    return f"{base}/#/experiments/{experiment}/runs?{TRAINING}&viewStateShareKey={view}"


def charts_link(runs: str) -> str:
    """The curves and step-wise images of the runs behind a link."""
    return f"{runs}&compareRunsMode=CHART"


def free_port(host: str, port: int, tries: int = 50) -> int:
    """`port`, or the first free one after it. ValueError if none of `tries` is free, or for an invalid port number."""
    if not 1 <= port <= 65535:
        raise ValueError(f"port {port} is out of range, expected 1 to 65535, such as 5000")
    end = min(port + tries, 65536)
    for candidate in range(port, end):
        with closing(socket.socket()) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server: a port just closed is free
            if _binds(probe, host, candidate):
                return candidate
    raise ValueError(f"no free port from {port} to {end - 1} on {host}; choose another with --port")


def command(store: Store, host: str, port: int) -> list[str]:
    storage = ["--backend-store-uri", store.uri, "--artifacts-destination", str(store.artifacts)]
    return [
        sys.executable,
        "-m",
        "sana_lab.tracking.mlflow_app",
        *storage,
        "--host",
        host,
        "--port",
        str(port),
        "--workers",
        "1",
    ]


def environment() -> dict[str, str]:
    """Environment that disables MLflow's eight job processes (half a gigabyte) and its telemetry."""
    return os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


def _check(store: Store, host: str) -> dict[str, str]:
    """Name -> id of the experiments to show."""
    if host not in LOOPBACK:
        raise ValueError(
            f"host {host!r} is not this machine ({', '.join(LOOPBACK)}), and the server has no password; from another "
            "machine use `ssh -L 5000:127.0.0.1:5000 ...`, or run `mlflow server` with its own authentication"
        )
    experiments = store.experiments()
    if not experiments:
        raise ValueError(f"no runs under {store.home}; make some first, for example with `sana-lab ablate quickstart`")
    return experiments


def _binds(probe: socket.socket, host: str, port: int) -> bool:
    try:
        probe.bind((host, port))
    except OSError:
        return False
    return True
