"""Runs in a real sqlite store, read back through MLflow's own client."""

import math
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image
from torch.utils.data import DataLoader

from sana_lab.environment import commit, environment
from sana_lab.tracking.logger import RunLogger
from sana_lab.tracking.store import Point, Store, clean, flatten, to_pil

pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:DeprecationWarning",  # mlflow 3.17 with sqlalchemy 2.1
    "ignore:.*LeafSpec.*:FutureWarning",  # lightning 2.6 with torch 2.14
    "ignore:.*does not have many workers.*:UserWarning",
    "ignore:GPU available but not used:UserWarning",
)


@pytest.fixture(scope="module")
def store(tmp_path_factory, empty_database):
    store = Store(tmp_path_factory.mktemp("a folder") / "runs")
    store.home.mkdir()
    shutil.copy(empty_database, store.database)
    store.create("sweep")
    return store


@pytest.fixture
def run(store):
    return store.start_run("sweep", "trial")


def test_the_store_is_one_file_and_one_folder_under_home(store):
    assert {p.name for p in store.home.iterdir()} <= {"mlflow.db", "mlflow.lock", "artifacts"}
    assert MlflowClient(f"sqlite:///{store.home}/mlflow.db").get_experiment_by_name("sweep") is not None


def test_create_again_gives_the_same_experiment_and_restores_a_deleted_one(store):
    first = store.create("sometimes")
    store.client.delete_experiment(first)
    assert store.create("sometimes") == store.create("sometimes") == first
    assert store.experiments()["sometimes"] == first


def test_reading_a_store_that_is_not_there_makes_none(tmp_path):
    store = Store(tmp_path / "none")
    assert store.find("sweep") == []
    assert store.experiments() == {}
    assert not store.home.exists()


def test_a_home_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write runs under .*file/runs"):
        Store(tmp_path / "file" / "runs").create("sweep")


def test_a_sweep_finds_its_children_and_a_trial_is_found_by_its_tags(store):
    parent = store.start_run("sweep", "parent", {"kind": "sweep"})
    child = store.start_run("sweep", "child", {"label": "it's + linear", "seed": 3}, parent)
    store.start_run("sweep", "child", {"label": "other", "seed": 3}, parent)
    assert [r.name for r in store.find("sweep") if r.parent == parent] == ["child"] * 2
    assert [r.id for r in store.find("sweep", {"label": "it's + linear", "seed": 3})] == [child]
    assert store.run(child).parent == parent


def test_tags_are_text_and_none_is_left_out(store):
    run = store.start_run("sweep", "trial", {"dirty": True, "seed": 0, "commit": None})
    store.set_tags(run, {"error": "oh", "nothing": None})
    tags = {k: v for k, v in store.run(run).tags.items() if not k.startswith("mlflow.")}
    assert tags == {"dirty": "true", "seed": "0", "error": "oh"}


def test_find_goes_past_one_page_of_results(store):
    search = store.client.search_runs
    store.client.search_runs = lambda *a, page_token=None: search(*a, max_results=1, page_token=page_token)
    runs = [store.start_run("pages", f"run {i}") for i in range(3)]
    try:
        assert sorted(r.id for r in store.find("pages")) == sorted(runs)
    finally:
        del store.client.search_runs


def test_a_run_ends_and_may_be_taken_up_again(store, run):
    assert store.run(run).status == "RUNNING"
    store.finish(run, "failed")
    assert store.run(run).status == "FAILED"
    assert store.run(run).ended >= store.run(run).started
    store.resume(run)
    assert store.run(run).status == "RUNNING"
    assert store.run(run).ended is None
    with pytest.raises(ValueError, match="'DONE' is not one of FINISHED, FAILED, KILLED"):
        store.finish(run, "DONE")


def test_params_are_flat_short_and_whole_as_an_artifact(store, run):
    config = {"a": {"b": 1, "c": None, "d": {}}, "text": "x" * 600, "widths": [64, 128], "name": "é"}
    config["many"] = {str(i): i for i in range(150)}  # more than MLflow takes at a time
    assert store.log_params(run, config) == {}
    params = store.run(run).params
    assert {k: params[k] for k in ("a.b", "a.c", "a.d", "widths", "name")} == {
        "a.b": "1", "a.c": "null", "a.d": "{}", "widths": "[64, 128]", "name": "é"
    }  # fmt: skip
    assert len(params["text"]) == 500
    assert params["many.149"] == "149"
    assert "x" * 600 in store.file(run, "config/resolved.yaml").read_text()


def test_params_keep_their_first_value_on_resume_and_the_difference_is_told(store, run):
    store.log_params(run, {"dim": 32, "depth": 2})
    assert store.log_params(run, {"dim": 64, "depth": 2, "new": 1}) == {"dim": ("32", "64")}
    assert store.run(run).params == {"dim": "32", "depth": "2", "new": "1"}
    assert "dim: 32" in store.file(run, "config/resolved.yaml").read_text()


def test_metrics_keep_their_curve_and_infinity_and_leave_out_what_is_none(store, run):
    for step in range(3):
        store.log_metrics(run, {"loss": torch.tensor(1.0 / (step + 1)), "psnr": math.inf, "fid": None}, step)
    assert store.history(run, "loss") == [(0, 1.0), (1, 0.5), (2, pytest.approx(1 / 3))]
    assert store.run(run).metrics == pytest.approx({"loss": 1 / 3, "psnr": math.inf})


def test_a_step_that_a_resumed_run_went_over_again_counts_once(store, run):
    store.log_points(run, [Point("loss", 5.0, 0, 1.0), Point("loss", 4.0, 1, 2.0), Point("loss", 3.0, 1, 9.0)])
    assert store.history(run, "loss") == [(0, 5.0), (1, 3.0)]


def test_images_are_png_by_step(store, run):
    image = torch.randint(256, (3, 8, 12), dtype=torch.uint8)
    store.log_image(run, "val/samples: é", image, step=7)
    (file,) = store.file(run, "images").glob("*.png")
    assert file.name.startswith("val~samples_ _+step+7+")
    assert np.array_equal(np.asarray(Image.open(file)), image.permute(1, 2, 0).numpy())


def test_an_image_of_another_shape_or_type_is_refused():
    assert to_pil(np.zeros((4, 6, 3), np.uint8)).size == (6, 4)
    with pytest.raises(ValueError, match=r"not float32 \(3, 4, 4\)"):
        to_pil(torch.zeros(3, 4, 4))
    with pytest.raises(ValueError, match=r"not uint8 \(2, 3, 4, 4\)"):
        to_pil(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))


def test_dicts_files_and_folders_are_artifacts(store, run, tmp_path):
    (tmp_path / "table.csv").write_text("1,2")
    store.log_dict(run, {"hello": 1}, "notes/a.yaml")
    store.log_dict(run, {"a": [1]}, "b.json")
    store.log_file(run, tmp_path / "table.csv", "table")
    store.log_file(run, tmp_path, "folder")
    assert store.file(run, "notes/a.yaml").read_text() == "hello: 1\n"
    assert store.file(run, "table/table.csv").read_text() == store.file(run, "folder/table.csv").read_text() == "1,2"
    with pytest.raises(FileNotFoundError, match=r"no artifact 'nothing.txt'"):
        store.file(run, "nothing.txt")


def test_a_store_travels_to_another_process(store, run):
    assert pickle.loads(pickle.dumps(store)).run(run) == store.run(run)


def test_importing_tracking_imports_nothing_heavy():
    heavy = "{'torch', 'mlflow', 'lightning', 'numpy'}"
    code = f"import sys, sana_lab.tracking.store; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_flatten_and_clean():
    assert flatten({"a": {"b": {"c": True}}, "d": "text"}) == {"a.b.c": "true", "d": "text"}
    assert clean("loss@0.5/é") == "loss_0.5/_"


def test_environment_is_flat_and_names_this_machine():
    facts = environment()
    assert facts["torch"] == torch.__version__.split("+")[0]
    assert facts["cores"] >= 1
    assert {type(v) for v in facts.values()} <= {str, int, bool, type(None)}


def test_commit_knows_whether_the_code_differs(tmp_path):
    def git(*arguments):
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    assert commit(tmp_path) == {"commit": None, "dirty": None}
    (tmp_path / "sana_lab").mkdir()
    (tmp_path / "sana_lab" / "a.py").write_text("")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    assert commit(tmp_path)["dirty"] is False
    assert len(commit(tmp_path)["commit"]) == 40
    (tmp_path / "README.md").write_text("words change no number")
    assert commit(tmp_path)["dirty"] is False
    (tmp_path / "sana_lab" / "b.py").write_text("")
    assert commit(tmp_path)["dirty"] is True
    assert commit(tmp_path / "sana_lab") == {"commit": None, "dirty": None}  # inside a repository, not its root


class Descent(lightning.LightningModule):
    """Logs its step as a metric, so that the curve is known."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def training_step(self, batch, index):
        self.log("step_again", float(self.global_step))
        return (self.weight * batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(logger, folder):
    trainer = lightning.Trainer(
        max_steps=7, log_every_n_steps=1, logger=logger, accelerator="cpu", default_root_dir=folder,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Descent(), DataLoader(torch.ones(7, 1)))


def test_a_trainer_writes_each_point_once(store, run, tmp_path):
    fit(RunLogger(store, run), tmp_path)
    assert store.history(run, "step_again") == [(i, float(i)) for i in range(7)]
    assert "epoch" not in store.run(run).metrics
    assert store.run(run).status == "RUNNING"  # who started the run ends it


def test_points_wait_and_are_written_by_the_clock(store, run):
    logger = RunLogger(store, run, seconds=0.05)
    logger.log_metrics({"loss": 1.0}, 0)
    assert store.run(run).metrics == {}
    time.sleep(0.06)
    logger.log_metrics({"loss": 2.0}, 1)
    assert store.history(run, "loss") == [(0, 1.0), (1, 2.0)]


def test_points_that_could_not_be_written_wait_for_the_next_time(store, run):
    logger = RunLogger(store, "0" * 32, seconds=0)
    with pytest.warns(UserWarning, match="1 points of curves wait"):
        logger.log_metrics({"loss": 1.0}, 0)
    logger._run_id = run
    logger.finalize("success")
    assert store.history(run, "loss") == [(0, 1.0)]


def test_artifacts_lie_under_home(store, run):
    store.log_dict(run, {"a": 1}, "a.json")
    assert store.file(run, "a.json").is_relative_to(Path(store.home) / "artifacts")
