"""What every test shares: one CPU thread, and an empty folder to work in for those that ask."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    import stand_in_server


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny tensors gain nothing from threads, and machines that run tests are busy."""
    torch.set_num_threads(1)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory: `runs/`, `experiments/` and the like are looked for here first."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables, which take seconds to make. Copy the file to runs/mlflow.db."""
    from sana_lab.tracking.store import Store

    store = Store(tmp_path_factory.mktemp("mlflow"))
    store.make_database()
    return store.database


@pytest.fixture
def runs(here: Path, empty_database: Path) -> Path:
    """`runs/` in an empty working directory, with a database and no runs."""
    (here / "runs").mkdir()
    shutil.copy(empty_database, here / "runs/mlflow.db")
    return here / "runs"


@pytest.fixture(scope="session")
def sana_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers SanaPipeline folder of tiny random components, Flow-DPM-Solver with shift 3. Do not change it."""
    import tiny_peers

    return tiny_peers.saved(tiny_peers.sana_pipeline(), tmp_path_factory.mktemp("sana") / "pipeline")


@pytest.fixture
def server(here: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> "stand_in_server.Server":
    """A stand-in for an MLflow server that the environment names, in an empty working directory."""
    import stand_in_server

    return stand_in_server.start(here, empty_database, monkeypatch)
