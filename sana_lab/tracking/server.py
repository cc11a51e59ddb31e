"""MLflow's server on this machine alone, opened at the runs: every trial a row, what was measured its columns."""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from sana_lab.report.columns import COLUMNS, ENDS
from sana_lab.tracking.store import Run, Store

LOOPBACK = ("127.0.0.1", "localhost")
VIEW = "sana-lab"
PATIENCE = 180.0  # seconds for the server to answer; 10 to 16 on two cores
MOST_PARAMS = 6  # columns of parameters


def say_at_once(text: str) -> None:
    print(text, flush=True)


def serve(
    home: Path | str, host: str = "127.0.0.1", port: int = 5000, say: Callable[[str], None] = say_at_once
) -> None:
    """Runs the server until Ctrl-C and says where each experiment's runs are.

    A busy port gives way to the next free one. Raises ValueError when there are no runs under `home` or `host` is
    not this machine: the server has no password.
    """
    store = Store(home)
    experiments = _checked(store, host)
    chosen = free_port(host, port)
    if chosen != port:
        say(f"port {port} is busy; using {chosen}")
    for identity in experiments.values():
        write_view(store, identity)
    say("starting MLflow ...")
    with _ended_by_sigterm(), running(store, host, chosen) as (base, server):
        for name, identity in experiments.items():
            say(f"{name}: {runs_link(base, identity)}")
            say(f"  curves and images: {charts_link(base, identity)}")
        say("Ctrl-C stops it")
        try:
            server.wait()
        except KeyboardInterrupt:
            say("stopped")
        else:
            raise RuntimeError(f"the server ended with code {server.returncode}; {_tail(store)}")


def runs_link(base: str, experiment: str) -> str:
    """The table of runs of an experiment; without `workflowType` a new browser opens MLflow's pages for agents."""
    return f"{base}/#/experiments/{experiment}/runs?workflowType=machine_learning&viewStateShareKey={VIEW}"


def charts_link(base: str, experiment: str) -> str:
    """The curves and step-wise images of the same runs."""
    return f"{runs_link(base, experiment)}&compareRunsMode=CHART"


def free_port(host: str, port: int, tries: int = 50) -> int:
    """`port`, or the first free one after it. Raises ValueError when there is none among `tries`."""
    last = min(port + tries, 65536)
    for candidate in range(port, last):
        with closing(socket.socket()) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: just closed is free
            if _binds(probe, host, candidate):
                return candidate
    raise ValueError(f"no free port from {port} to {last - 1} on {host}; give another with --port")


@contextmanager
def running(store: Store, host: str, port: int) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The server's address and process once it answers; it and what it started end with the block."""
    with (store.home / "ui.log").open("wb") as log:
        server = subprocess.Popen(
            _command(store, host, port), env=_environment(), stdout=log, stderr=log, start_new_session=True
        )
    try:
        base = f"http://{host}:{port}"
        _wait(base, server, store)
        yield base, server
    finally:
        _stop(server)


def write_view(store: Store, experiment: str) -> None:
    """Saves the view that the links open: flat (a child of a sweep is a row like any other), the best first.

    MLflow keeps shared views as tags of the experiment, in a form that it does not document; a version that reads
    another form shows its own default view.
    """
    runs = store.all_runs(experiment)
    now = int(time.time() * 1000)
    text = json.dumps(view(runs, image_steps(store, runs)))
    state = "deflate;" + base64.b64encode(zlib.compress(text.encode())).decode()
    shared = {"name": "sana-lab: every trial", "createdAt": now, "updatedAt": now, "state": state}
    store.client.set_experiment_tag(experiment, f"mlflow.sharedViewState.{VIEW}", json.dumps(shared))


def view(runs: Sequence[Run], images: Mapping[str, int] | None = None) -> dict[str, Any]:
    """The state of MLflow's runs page: columns, an order (any but by date shows children as rows), pictures first.

    `images` maps the keys of logged images to the step to show. MLflow adds the charts of all metrics by itself.
    """
    metrics = shown_metrics(runs)
    quality = [c for c in COLUMNS if c.interval and c.name in metrics][:1]
    columns = [f"metrics.`{name}`" for name in metrics] + [f"params.`{name}`" for name in differing_params(runs)]
    return {
        "orderByKey": f"metrics.`{quality[0].name}`" if quality else "tags.`mlflow.runName`",
        "orderByAsc": not quality or quality[0].better == "lower",
        "selectedColumns": columns,
        "runsHiddenMode": "FIRST_20_RUNS",
    } | (_pictures(images) if images else {})


def _pictures(images: Mapping[str, int]) -> dict[str, Any]:
    """A wide section of one chart for each image, without the hundred parameters that would hide it."""
    section = {"uuid": VIEW, "name": "Pictures", "display": True, "isReordered": True, "columns": 1, "cardHeight": 560}
    common = {"type": "IMAGE", "metricSectionId": VIEW, "deleted": False, "isGenerated": False, "showRunParams": False}
    charts = [common | {"uuid": f"{VIEW}-{k}", "imageKeys": [k], "displayName": k, "step": images[k]} for k in images]
    return {"compareRunSections": [section], "compareRunCharts": charts, "isAccordionReordered": True}


def image_steps(store: Store, runs: Sequence[Run]) -> dict[str, int]:
    """The last step of each image that `Store.log_image` wrote in these runs."""
    steps: dict[str, int] = {}
    for run in runs:
        if run.tags.get("mlflow.loggedImages"):
            for file in store.file(run.id, "images").glob("*+step+*.png"):
                key, _, rest = file.name.partition("+step+")
                key, step = key.replace("~", "/"), int(rest.partition("+")[0])
                steps[key] = max(step, steps.get(key, 0))
    return dict(sorted(steps.items()))


def shown_metrics(runs: Sequence[Run]) -> list[str]:
    """The final metrics, in the order of the lab's tables; curves ("train/loss") and ends of intervals are left out."""
    names = {name for run in trials(runs) for name in run.metrics if "/" not in name and not name.endswith(ENDS)}
    order = {c.name: i for i, c in enumerate(COLUMNS)}
    return sorted(names, key=lambda name: (order.get(name, len(order)), name))


def differing_params(runs: Sequence[Run]) -> list[str]:
    """The parameters in which trials differ, those with the fewest values first."""
    params = [run.params for run in trials(runs)]
    values = {name: {p.get(name) for p in params} for name in {name for p in params for name in p}}
    differing = [name for name in values if len(values[name]) > 1]
    return sorted(differing, key=lambda name: (len(values[name]), name.count("."), name))[:MOST_PARAMS]


def trials(runs: Sequence[Run]) -> Sequence[Run]:
    """The children of sweeps, or every run where there are none."""
    return [run for run in runs if run.parent] or runs


def _checked(store: Store, host: str) -> dict[str, str]:
    if host not in LOOPBACK:
        raise ValueError(
            f"host {host!r} is not this machine ({', '.join(LOOPBACK)}), and the server has no password; from another "
            "machine use `ssh -L 5000:127.0.0.1:5000 ...`, or run `mlflow server` with its own authentication"
        )
    experiments = store.experiments()
    if not experiments:
        raise ValueError(f"no runs under {store.home}; make some first, for example with `sana-lab ablate quickstart`")
    return experiments


def _command(store: Store, host: str, port: int) -> list[str]:
    where = ["--backend-store-uri", store.uri, "--artifacts-destination", str(store.artifacts)]
    return [sys.executable, "-m", "mlflow", "server", *where, "--host", host, "--port", str(port), "--workers", "1"]


def _environment() -> dict[str, str]:
    """Without the eight processes that serve agents' jobs (half a gigabyte), and without telemetry."""
    return os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


def _wait(base: str, server: "subprocess.Popen[bytes]", store: Store) -> None:
    end = time.monotonic() + PATIENCE
    while not _answers(base):
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with code {server.returncode} while it started; {_tail(store)}")
        if time.monotonic() > end:
            raise RuntimeError(f"the server did not answer within {PATIENCE:.0f} s; {_tail(store)}")
        time.sleep(0.2)


def _answers(base: str) -> bool:
    try:
        with urllib.request.urlopen(f"{base}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:  # refused, not listening yet, or slow
        return False


def _stop(server: "subprocess.Popen[bytes]") -> None:
    """Ends the server's whole group, gently first."""
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, signal_number)
            server.wait(timeout=10)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _binds(probe: socket.socket, host: str, port: int) -> bool:
    try:
        probe.bind((host, port))
    except OSError:
        return False
    return True


def _tail(store: Store, lines: int = 15) -> str:
    log = store.home / "ui.log"
    return f"{log} ends with:\n" + "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that the server does not outlive us."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
