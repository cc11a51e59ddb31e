"""The sqlite file of runs: made once by all processes, refused where it is not MLflow's, moved with its home."""

import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
import tiny

from sana_lab import __main__
from sana_lab.tracking import database, server, store
from sana_lab.tracking.store import Store

pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:DeprecationWarning"  # mlflow 3.17 with sqlalchemy 2.1
)


def home_of(folder: Path, empty_database: Path) -> Store:
    """A store on a copy of the empty database."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(empty_database, folder / "mlflow.db")
    return Store(folder)


class TestFirstStarts:
    def test_one_of_several_makes_the_database(self, tmp_path, empty_database, monkeypatch):
        """`start_run` of four stores on a new home; the making is slow, and a copy."""
        calls = []

        def make(path: Path) -> None:
            calls.append(path)
            time.sleep(0.2)
            shutil.copy(empty_database, path)

        monkeypatch.setattr(database, "make", make)
        stores = [Store(tmp_path / "runs") for _ in range(4)]
        threads = [threading.Thread(target=s.start_run, args=("training", "tiny")) for s in stores]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(calls) == 1
        assert len(stores[0].find("training")) == 4

    def test_a_kill_during_the_making_leaves_no_database(self, tmp_path, empty_database, monkeypatch):
        def killed(path: Path) -> None:
            path.write_text("half")
            Path(f"{path}-journal").write_text("of another database")
            raise KeyboardInterrupt

        def whole(path: Path) -> object:
            assert not Path(f"{path}-journal").exists()
            shutil.copy(empty_database, path)
            return type("Client", (), {"search_experiments": list})

        monkeypatch.setattr(database, "client", killed)
        with pytest.raises(KeyboardInterrupt):
            Store(tmp_path).start_run("training", "tiny")
        assert not (tmp_path / "mlflow.db").exists()
        monkeypatch.setattr(database, "client", whole)
        Store(tmp_path).make_database()
        database.check(tmp_path / "mlflow.db")
        assert {p.name for p in tmp_path.glob("mlflow*")} == {"mlflow.db", "mlflow.lock"}

    @pytest.mark.slow
    def test_eight_trainings_start_on_a_new_home_at_once(self, here):
        tiny.write(here, "experiments/tiny.yaml", tiny.EXPERIMENT)
        command = [sys.executable, "-m", "sana_lab", "train", "tiny"]
        started = [
            subprocess.Popen([*command, f"seed={i}"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            for i in range(8)
        ]
        errors = [process.communicate(timeout=900)[1] for process in started]
        assert [process.returncode for process in started] == [0] * 8, errors
        assert [run.status for run in Store("runs").find("training")] == ["FINISHED"] * 8

    @pytest.mark.slow
    def test_a_training_killed_at_its_start_leaves_a_home_that_works(self, here):
        tiny.write(here, "experiments/tiny.yaml", tiny.EXPERIMENT)
        command = [sys.executable, "-m", "sana_lab", "train", "tiny"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and not (here / "runs/mlflow.new.db").exists():
                time.sleep(0.01)
            time.sleep(0.5)
            process.kill()
        assert not (here / "runs/mlflow.db").exists()
        assert subprocess.run(command, capture_output=True, timeout=300).returncode == 0


class TestNoDatabase:
    def test_an_empty_file_is_none(self, tmp_path, empty_database, monkeypatch):
        (tmp_path / "mlflow.db").touch()
        assert Store(tmp_path).experiments() == {}
        monkeypatch.setattr(database, "make", lambda path: shutil.copy(empty_database, path))
        assert Store(tmp_path).create("sweep")

    @pytest.mark.parametrize(("verb", "junk", "words"), [
        (["ablate", "quickstart", "--dry-run"], b"junk " * 2000, "(file is not a database)"),
        (["ui"], b"SQLite format 3\0" + b"\xff" * 5000, "cannot be read as MLflow's database"),
    ])  # fmt: skip
    def test_junk_is_one_line(self, runs, verb, junk, words, capsys):
        (runs / "mlflow.db").write_bytes(junk)
        self.one_line(verb, words, capsys)

    def test_a_damaged_one_is_one_line(self, runs, capsys):
        """Its first page can be read."""
        data = (runs / "mlflow.db").read_bytes()
        (runs / "mlflow.db").write_bytes(data[: 4096 * 2] + b"\xff" * (len(data) - 4096 * 2))
        self.one_line(["table", "quickstart"], "database", capsys)

    def test_a_foreign_database_is_one_line(self, runs, capsys):
        (runs / "mlflow.db").unlink()
        with closing(sqlite3.connect(runs / "mlflow.db")) as other, other:
            other.execute("CREATE TABLE songs (title TEXT)")
        self.one_line(["table", "quickstart"], "is the database of something else (its tables: songs)", capsys)

    def test_a_half_made_one_is_named_with_what_to_do(self, runs, capsys):
        with closing(sqlite3.connect(runs / "mlflow.db")) as half, half:
            half.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
        self.one_line(["ui"], "mlflow.db is half-made", capsys)
        with closing(sqlite3.connect(runs / "mlflow.db")) as half, half:
            half.execute("DROP TABLE metrics")
        with pytest.raises(ValueError, match="It holds no runs; delete it and a new one is made: rm '/"):
            Store(runs).start_run("training", "tiny")

    def test_one_of_another_version_keeps_its_runs(self, tmp_path, empty_database):
        home_of(tmp_path, empty_database).start_run("training", "tiny")
        with closing(sqlite3.connect(tmp_path / "mlflow.db")) as old, old:
            old.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
        with pytest.raises(ValueError, match=r"holds 1 runs of another version .* copy it, then run: mlflow db"):
            Store(tmp_path).find("training")

    def test_a_folder_is_named(self, tmp_path):
        (tmp_path / "mlflow.db").mkdir()
        with pytest.raises(ValueError, match=r"mlflow\.db is a folder, expected MLflow's database"):
            Store(tmp_path).find("training")

    def one_line(self, verb, words, capsys):
        assert __main__.main(verb) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line


class TestMoved:
    def fill(self, home: Store) -> str:
        """A run with an artifact, which MLflow in this process has not written: it remembers the places of its own."""
        run = home.start_run("training", "tiny")
        tiny.write(home.artifacts, f"{run}/artifacts/a.json", "{}")
        home.finish(run)
        return run

    @pytest.mark.parametrize("move", [Path.rename, shutil.copytree])
    def test_results_are_read_and_written_in_the_new_place(self, tmp_path, empty_database, move):
        old = home_of(tmp_path / "old" / "runs", empty_database)
        run = self.fill(old)
        before = sorted(p.relative_to(old.home) for p in old.home.rglob("*"))
        (tmp_path / "new 1").mkdir()
        move(old.home, tmp_path / "new 1" / "runs")
        new = Store(tmp_path / "new 1" / "runs")
        assert new.file(run, "a.json").read_text() == "{}"
        assert list(new.experiments()) == ["training"]  # as `ui` and its view look for them
        again = self.fill(new)
        new.log_dict(run, {"b": 1}, "b.json")
        for name, identity in (("a.json", run), ("b.json", run), ("a.json", again)):
            place = new.client.get_run(identity).info.artifact_uri  # as MLflow's own server reads it
            assert place == (new.artifacts / identity / "artifacts").as_uri()
            assert new.file(identity, name).is_relative_to(new.home)
        if old.home.exists():
            assert sorted(p.relative_to(old.home) for p in old.home.rglob("*")) == before
            assert Store(old.home).client.get_run(run).info.artifact_uri.startswith(old.artifacts.as_uri())

    def test_a_home_that_cannot_be_written_is_read(self, tmp_path, empty_database, monkeypatch):
        old = home_of(tmp_path / "old", empty_database)
        run = self.fill(old)
        new = Store(old.home.rename(tmp_path / "new"))
        monkeypatch.setattr(database, "relocate", lambda *_: None)  # as where the file cannot be written
        assert [r.id for r in new.find("training")] == [run]
        assert new.file(run, "a.json").exists()

    def test_experiments_of_others_in_the_same_database_keep_their_places(self, tmp_path, empty_database):
        home = home_of(tmp_path, empty_database)
        home.client.create_experiment("theirs", artifact_location="file:///elsewhere/mlruns/7")
        again = Store(tmp_path)
        assert again.client.get_experiment_by_name("theirs").artifact_location == "file:///elsewhere/mlruns/7"


@pytest.mark.parametrize("name", ["a%20b", "a%41b", "50%", "why?", "a#b&c;d", "é ü"])
def test_any_path_holds_a_home(tmp_path, empty_database, name):
    """Without waiting, without another database, and without another folder."""
    home = home_of(tmp_path / name / "runs", empty_database)
    run = home.start_run("training", "tiny")
    home.log_dict(run, {"a": 1}, "a.json")
    assert home.file(run, "a.json").is_relative_to(tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert database.path_of(home.uri) == home.database


def test_variables_of_mlflow_that_are_not_followed_are_named_once(tmp_path, empty_database, monkeypatch, capsys):
    store.say_what_is_ignored.cache_clear()
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    home = home_of(tmp_path, empty_database)
    home.create("training")
    Store(tmp_path).create("training")
    assert (
        capsys.readouterr().err
        == f"sana-lab: MLFLOW_EXPERIMENT_NAME=mine is ignored: runs are recorded in {home.uri}\n"
    )


class TestTrackingUri:
    """MLFLOW_TRACKING_URI says where runs are recorded; `runs/` is the default."""

    def test_a_database_elsewhere_has_its_artifacts_beside_it(self, tmp_path, empty_database, monkeypatch):
        place = tmp_path / "team" / "m.db"
        place.parent.mkdir()
        shutil.copy(empty_database, place)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place}")
        home = Store(tmp_path / "runs")
        run = home.start_run("training", "tiny")
        home.log_dict(run, {"a": 1}, "a.json")
        assert (home.database, home.file(run, "a.json").is_relative_to(place.parent)) == (place, True)
        assert [r.id for r in home.summaries("training")] == [run]
        assert not (tmp_path / "runs/mlflow.db").exists()

    def test_what_lightning_leaves_in_the_environment_is_no_choice(self, tmp_path, monkeypatch):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", Store(tmp_path / "first").uri)
        assert Store(tmp_path / "second").database == tmp_path / "second/mlflow.db"

    @pytest.mark.parametrize("location", ["./mlruns", "file:///tmp/mlruns"])
    def test_a_folder_of_files_is_refused(self, tmp_path, monkeypatch, location):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", location)
        with pytest.raises(ValueError, match="where MLflow keeps no runs any more; expected http://HOST:PORT"):
            Store(tmp_path)

    def test_a_server_out_of_reach_is_an_error_within_ten_seconds(self, tmp_path, monkeypatch):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        start = time.monotonic()
        with pytest.raises(ValueError, match=r"the MLflow server http://127.0.0.1:9 \(MLFLOW_TRACKING_URI\) cannot be"):
            _ = Store(tmp_path).client
        assert time.monotonic() - start < 10


@pytest.mark.parametrize("port", [-1, 0, 65536, 70000])
def test_a_port_out_of_range_is_refused(port):
    with pytest.raises(ValueError, match=f"port {port} is out of range, expected 1 to 65535"):
        server.free_port("127.0.0.1", port)
