"""Kills at random moments, and many first starts at once: nothing is lost, and the same command ends the work."""

import contextlib
import json
import os
import random
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import kill_processes
import pytest
import tiny

from sana_lab.checkpoints import weights
from sana_lab.tracking.store import Run, Store

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="forks from a server, and looks for processes in /proc"),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader"),  # mlflow 3.17 with sqlalchemy 2.1
]

KILLS, STARTS = 20, 8
AT_ONCE = 5  # stores, so that a loaded machine is tried too
CHANGES = {"trainer.max_steps": 12, "trainer.validate_every": 4, "trainer.checkpoint_every": 2, "prompts": []}

GRID = """
title: Two models
base: tiny
axes:
  attention:
    linear: {system.dit.attention: linear}
    softmax: {system.dit.attention: softmax}
columns: [geneval, val_loss]
"""


SWEEP = """
title: Six models, four samplings of each
base: tiny
axes:
  attention:
    linear: {system.dit.attention: linear}
    softmax: {system.dit.attention: softmax}
  steps: {1: {sampling.steps: 1}, 2: {sampling.steps: 2}, 3: {sampling.steps: 3}, 4: {sampling.steps: 4}}
seeds: [0, 1, 2]
columns: [geneval, val_loss]
"""


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServerContext]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield kill_processes.context()


def new_folder(root: Path, name: str) -> Path:
    """A working directory with an experiment and an ablation, and no store."""
    folder = root / name
    tiny.write_experiment(folder, changes=CHANGES)
    tiny.write(folder, "ablations/grid.yaml", GRID)
    return folder


def run(server: ForkServerContext, folder: Path, *words: str) -> tuple[int, float]:
    """Exit status of a verb that is not killed, and its seconds."""
    start = time.monotonic()
    process = kill_processes.start(server, folder, words)
    process.join()
    status = kill_processes.status(process, folder)
    return -1 if status is None else status, time.monotonic() - start


def kill(server: ForkServerContext, folder: Path, seconds: float, *words: str) -> bool:
    """SIGKILL to a verb after so many seconds; False if it had ended before."""
    process = kill_processes.start(server, folder, words)
    process.join(seconds)
    process.kill()
    process.join()
    return kill_processes.status(process, folder) is None


def stage(folder: Path) -> str:
    """What a killed process had reached."""
    checkpoints = [p.stem for p in folder.glob("runs/models/*/*.ckpt")]
    weights_files = list(folder.glob("runs/models/*/weights.safetensors"))
    database = "database" if (folder / "runs/mlflow.db").exists() else "nothing"
    return "weights" if weights_files else checkpoints[0] if checkpoints else database


def training(folder: Path) -> Any:
    """All that a finished training leaves but times: weights, measures, curves."""
    path = next((folder / "runs/models").glob("*/weights.safetensors"))
    store = Store(folder / "runs")
    state = {name: tensor.numpy().tobytes() for name, tensor in weights.read(path).items()}
    return state, weights.card(path)["measured"], curves(store, store.find("training")[0])


def curves(store: Store, run: Run) -> dict[str, list[tuple[int, float]]]:
    """The curves of losses; times and speeds differ between two runs."""
    return {key: store.history(run.id, key) for key in run.metrics if key.startswith(("train/loss", "val/"))}


def losses(folder: Path, reference: Any, status: int) -> Counter[str]:
    """What differs after the end from a training that nothing interrupted."""
    state, measured, curve = training(folder)
    runs = Store(folder / "runs").find("training")
    home = next((folder / "runs/models").iterdir())
    return Counter(
        {
            "failed reruns": int(status != 0),
            "other weights": int(state != reference[0]),
            "other measures": int(measured != reference[1]),
            "other curves": int(curve != reference[2]),
            "runs too many": len(runs) - 1,
            "runs not finished": sum(r.status != "FINISHED" for r in runs),
            "checkpoints too many": max(0, len(list(home.glob("*.ckpt"))) - 1),
            "files left over": len(list(home.rglob("*.partial"))),
        }
    )


def show(what: str, lost: Counter[str], folder: Path) -> None:
    print(f"{what}: {dict(+lost) or 'no loss'}", flush=True)
    if "failed reruns" in +lost:
        print((folder / "output").read_text()[-2000:], flush=True)


def report(title: str, lost: Counter[str], facts: dict[str, Any]) -> None:
    print(json.dumps({"what": title, **facts, "losses": dict(lost)}), flush=True)
    assert sum(lost.values()) == 0, (title, +lost)


@pytest.fixture(scope="module")
def reference(server: ForkServerContext, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, float]:
    """An uninterrupted training on a new store, and its seconds beside as many others as in the tests."""
    root = tmp_path_factory.mktemp("reference")
    assert run(server, new_folder(root, "first"), "train", "tiny")[0] == 0  # with it the server starts
    folders = [new_folder(root, str(number)) for number in range(AT_ONCE)]
    with ThreadPoolExecutor(AT_ONCE) as threads:
        ends = list(threads.map(lambda folder: run(server, folder, "train", "tiny"), folders))
    assert [status for status, _ in ends] == [0] * AT_ONCE, (folders[0] / "output").read_text()[-2000:]
    return training(folders[0]), statistics.median(seconds for _, seconds in ends)


def test_a_training_on_a_new_store_killed_at_random_moments(server, reference, tmp_path):
    expected, seconds = reference
    moments = random.Random(0)

    def one(number: int, moment: float) -> tuple[bool, Counter[str]]:
        """Whether the kill came before the end, and the losses after the same command again."""
        folder = new_folder(tmp_path, str(number))
        early = kill(server, folder, moment, "train", "tiny")
        state = stage(folder)
        status, _ = run(server, folder, "train", "tiny")
        lost = losses(folder, expected, status) if status == 0 else Counter({"failed reruns": 1})
        show(f"kill {number} after {moment:.1f} s, {state}", lost, folder)
        return early, lost

    with ThreadPoolExecutor(AT_ONCE) as threads:
        ends = list(threads.map(one, range(1, KILLS + 1), [moments.uniform(0, seconds) for _ in range(KILLS)]))
    lost = sum((each for _, each in ends), Counter[str]())
    early = sum(early for early, _ in ends)
    report("train killed on a new store", lost, {"stores": KILLS, "killed before the end": early, "seconds": seconds})


def test_first_starts_at_once(server, reference, tmp_path):
    folder = new_folder(tmp_path, "together")
    processes = [kill_processes.start(server, folder, ["train", "tiny"]) for _ in range(STARTS)]
    for process in processes:
        process.join()
    failed = sum(kill_processes.status(process, folder) != 0 for process in processes)
    if failed:
        print((folder / "output").read_text()[-4000:])
    report("first starts at once", losses(folder, reference[0], failed), {"starts": STARTS})


def results(folder: Path) -> Any:
    """Numbers and curves of each row, without times, and the weights of each model."""
    store = Store(folder / "runs")
    trials = {r.name: r for r in store.find("grid", {"sana.kind": "trial"})}
    keys = ("geneval", "geneval_low", "geneval_high", "val_loss", "params_m", "gmacs", "tokens")
    rows = {name: ({k: r.metrics.get(k) for k in keys}, curves(store, r)) for name, r in trials.items()}
    states = {p.parent.name: weights.read(p) for p in (folder / "runs/models").glob("*/weights.safetensors")}
    return rows, {name: {k: v.numpy().tobytes() for k, v in s.items()} for name, s in states.items()}


def ablation_losses(folder: Path, expected: Any, written: dict[str, int]) -> Counter[str]:
    """What differs after the end from an ablation that nothing interrupted; `written`: when models were first seen."""
    store = Store(folder / "runs")
    rows, states = results(folder)
    trials, sweeps = (store.find("grid", {"sana.kind": kind}) for kind in ("trial", "sweep"))
    names = ("geneval", "val_loss", "latency_s")
    return Counter(
        {
            "other numbers": sum(rows.get(name, [None])[0] != numbers for name, (numbers, _) in expected[0].items()),
            "other curves": sum(rows.get(name, [0, None])[1] != curve for name, (_, curve) in expected[0].items()),
            "other weights": sum(states.get(name) != state for name, state in expected[1].items()),
            "trained again": sum(times(folder)[name] != at for name, at in written.items()),
            "runs too many": max(0, len(trials) - len(expected[0])) + max(0, len(sweeps) - 1),
            "runs not finished": sum(r.status != "FINISHED" for r in (*trials, *sweeps)),
            "measured twice": sum(len(store.history(r.id, k)) != 1 for r in trials for k in names[:1]),
            "files left over": len(list((folder / "runs").rglob("*.partial"))),
        }
    )


def times(folder: Path) -> dict[str, int]:
    """Model -> when its weights were written."""
    return {p.parent.name: p.stat().st_mtime_ns for p in (folder / "runs/models").glob("*/weights.safetensors")}


def workers(folder: Path) -> int:
    """Number of worker processes in a folder."""
    return len(worker_ids(folder))


def worker_ids(folder: Path) -> list[int]:
    """Process ids of workers in a folder."""
    ids = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command, place = (entry / "cmdline").read_bytes(), (entry / "cwd").readlink()
        except OSError:  # it has ended meanwhile
            continue
        if b"sana_lab.ablation.worker" in command and place == folder:
            ids.append(int(entry.name))
    return ids


def test_an_ablation_killed_at_random_moments(server, tmp_path):
    """Several stores; on each the same command is killed again and again, and then runs to its end."""
    reference = new_folder(tmp_path, "reference")
    words = ["ablate", "grid", "--workers", "1"]
    status, seconds = run(server, reference, *words)
    assert status == 0, (reference / "output").read_text()[-2000:]
    expected = results(reference)

    def one(number: int) -> tuple[int, Counter[str]]:
        """Kills before the end, and all losses."""
        folder, moments = new_folder(tmp_path, f"store-{number}"), random.Random(number)
        kills, lost, written = 0, Counter[str](), dict[str, int]()
        for _ in range(KILLS // AT_ONCE):
            kills += kill(server, folder, moments.uniform(0, seconds / 2), *words)
            end = time.monotonic() + 60
            while workers(folder) and time.monotonic() < end:
                time.sleep(0.1)
            now = Counter({"workers left": workers(folder)})
            now += Counter({"models lost": sum(times(folder).get(name) != at for name, at in written.items())})
            show(f"store {number}, kill {kills}, {stage(folder)}, {len(times(folder))} models", now, folder)
            lost, written = lost + now, times(folder)
        status, _ = run(server, folder, *words)
        now = Counter({"failed reruns": 1}) if status else ablation_losses(folder, expected, written)
        show(f"store {number} after {kills} kills", now, folder)
        return kills, lost + now

    with ThreadPoolExecutor(AT_ONCE) as threads:
        ends = list(threads.map(one, range(1, AT_ONCE + 1)))
    kills = sum(kills for kills, _ in ends)
    lost = sum((each for _, each in ends), Counter[str]())
    report("ablate killed", lost, {"kills": kills, "stores": AT_ONCE, "seconds": seconds})


@pytest.fixture
def ray_address() -> Iterator[str]:
    """A Ray cluster of two nodes with a CPU each."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'sana_lab[ray]'")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster.address
    cluster.shutdown()


def kill_once(server: ForkServerContext, folder: Path, seconds: float, victim: str, words: list[str]) -> str:
    """Start a sweep, and after so many seconds send SIGKILL to it or to one of its workers; who was killed."""
    process = kill_processes.start(server, folder, words)
    process.join(seconds)
    if kill_processes.status(process, folder) is not None:
        return "none"
    ids = worker_ids(folder)
    if victim == "worker" and ids:
        with contextlib.suppress(ProcessLookupError):  # it has ended just now
            os.kill(ids[0], signal.SIGKILL)
        process.join()
        return "worker"
    process.kill()
    process.join()
    return "driver"


def sweep_with_kills(server: ForkServerContext, tmp_path: Path, words: list[str]) -> None:
    """24 trials, whose driver or worker is killed KILLS times, end as those that nothing disturbs."""
    folders = [new_folder(tmp_path, name) for name in ("reference", "disturbed")]
    for folder in folders:
        tiny.write(folder, "ablations/grid.yaml", SWEEP)
    status, seconds = run(server, folders[0], *words)
    assert status == 0, (folders[0] / "output").read_text()[-2000:]
    expected, (_, folder) = results(folders[0]), folders
    assert len(expected[0]) == 24
    moments, victims, lost, written = random.Random(0), Counter[str](), Counter[str](), dict[str, int]()
    for number in range(KILLS):
        victim = kill_once(server, folder, moments.uniform(0, seconds / 6), ("driver", "worker")[number % 2], words)
        end = time.monotonic() + 60
        while workers(folder) and time.monotonic() < end:
            time.sleep(0.1)
        now = Counter({"workers left": workers(folder)})
        now += Counter({"models lost": sum(times(folder).get(name) != at for name, at in written.items())})
        show(f"kill {number + 1} of the {victim}, {len(times(folder))} models", now, folder)
        victims, lost, written = victims + Counter([victim]), lost + now, times(folder)
    status, _ = run(server, folder, *words)
    lost += Counter({"failed reruns": 1}) if status else ablation_losses(folder, expected, written)
    tables = [json.loads((folder / "runs/tables/grid/table.json").read_text()) for folder in folders]
    lost += Counter(
        {"rows of the table": int([r["label"] for r in tables[0]["rows"]] != [r["label"] for r in tables[1]["rows"]])}
    )
    report("24 trials killed", lost, {"kills": dict(victims), "words": words, "seconds": seconds})


def test_a_sweep_of_24_trials_whose_driver_and_workers_are_killed(server, tmp_path):
    sweep_with_kills(server, tmp_path, ["ablate", "grid", "--workers", "2"])


def test_the_same_on_ray(server, tmp_path, ray_address):
    sweep_with_kills(server, tmp_path, ["ablate", "grid", "--executor", f"{{name: ray, address: '{ray_address}'}}"])
