"""Verbs about the lab itself, from an empty folder."""

import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sana_lab import __main__
from sana_lab.ablation import plan
from sana_lab.commands import check, completion, doctor, examples, listing, new
from sana_lab.config import experiments, registry
from sana_lab.config.specs import SpecError

if TYPE_CHECKING:
    from stand_in_server import Server

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader")  # mlflow 3.17 with sqlalchemy 2.1


def words(*prefix: str) -> list[str]:
    return completion.complete(__main__.parser(), prefix)


# new


@pytest.mark.parametrize("kind", new.CLASSES)
def test_a_new_part_keeps_the_contract_of_its_kind(kind: str, here: Path, capsys: pytest.CaptureFixture[str]):
    new.main("part", f"mine_{kind}", kind)
    part = capsys.readouterr().out.split()[-1]
    assert part.partition(":")[0] == f"mine_{kind}"
    assert check.main(part) == 0
    assert "note" not in capsys.readouterr().out  # every option has a comment


def test_a_new_experiment_and_ablation_load(here: Path):
    new.main("experiment", "mine")
    new.main("ablation", "sets/mine")
    assert experiments.load("mine")["trainer"]["max_steps"] == 200
    assert [trial.label for trial in plan.load("sets/mine").trials] == ["softmax", "linear"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("part", "my-part"), "no name of a Python module"),
        (("part", "mine", "atention"), "did you mean 'attention'"),
        (("ablation", "../mine"), "letters, digits"),
        (("ablation", ".mine"), "letters, digits"),
        (("experiment", "mine", "attention"), "--kind is of a part"),
    ],
)
def test_a_name_that_cannot_be(arguments: tuple[str, ...], message: str, here: Path):
    with pytest.raises(SpecError, match=message):
        new.main(*arguments)
    assert list(here.iterdir()) == []


def test_a_file_that_exists_is_left_alone(here: Path):
    (here / "mine.py").write_text("x = 1\n")
    with pytest.raises(SpecError, match="exists already"):
        new.main("part", "mine")
    assert (here / "mine.py").read_text() == "x = 1\n"


# list


@pytest.mark.parametrize("what", listing.KINDS)
def test_what_there_is(what: str, here: Path, capsys: pytest.CaptureFixture[str]):
    listing.main(what)
    out = capsys.readouterr().out
    assert what in out
    assert (what == "runs") == ("record runs here" in out)


def test_every_shipped_recipe_says_what_it_is(here: Path):
    rows = [*listing.recipes("experiments"), *listing.recipes("ablations")]
    assert [name for name, purpose in rows if not purpose] == []
    assert "paper/block_design" in dict(rows)


def test_runs_are_listed_from_the_database(runs: Path, capsys: pytest.CaptureFixture[str]):
    from sana_lab.tracking.store import Store

    store = Store(runs)
    store.finish(store.start_run("sweep", "a row"))
    assert [row[:3] for row in listing.runs()] == [("sweep", "a row", "FINISHED")]


def test_runs_are_listed_from_where_the_environment_says(
    here: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from sana_lab.tracking.store import Store

    (here / "elsewhere").mkdir()
    shutil.copy(empty_database, here / "elsewhere/lab.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{here}/elsewhere/lab.db")
    store = Store("runs")
    store.finish(store.start_run("sweep", "a row"))
    assert [row[:3] for row in listing.runs()] == [("sweep", "a row", "FINISHED")]
    monkeypatch.setattr(doctor, "LEAST_GB", 0)
    assert doctor.main() == 0
    assert f"{here}/elsewhere/lab.db: 1 runs" in capsys.readouterr().out


def test_runs_of_the_lab_are_listed_from_a_server(
    server: "Server", monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    store = server.store()
    store.finish(store.start_run("sweep", "a row"))
    server.create_run("0", run_name="of another program")
    assert [row[:3] for row in listing.runs()] == [("sweep", "a row", "FINISHED")]
    monkeypatch.setattr(doctor, "LEAST_GB", 0)
    assert doctor.main() == 0
    assert f"{store.server}: 1 runs" in capsys.readouterr().out


def test_a_server_that_does_not_answer_is_named(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert doctor.main() == 1
    assert "! runs          http://127.0.0.1:9 cannot be read: the MLflow server" in capsys.readouterr().out
    assert __main__.main(["list", "runs"]) == 1
    assert "cannot be reached" in capsys.readouterr().err
    assert __main__.main(["list"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("runs ")]
    assert line.split()[1] == "?"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "./mlruns")
    assert doctor.main() == 1
    assert "MLFLOW_TRACKING_URI is './mlruns'" in capsys.readouterr().out


@pytest.mark.parametrize(("verb", "name"), [("train", "shapes_sana"), ("ablate", "quickstart")])
def test_a_verb_without_its_recipe_lists_them(verb: str, name: str, here: Path, capsys: pytest.CaptureFixture[str]):
    assert __main__.main([verb]) == 2
    assert name in capsys.readouterr().out


def test_the_recipe_may_follow_an_option():
    options = __main__.parse(["train", "--dry-run", "shapes", "seed=1"])
    assert (options.experiment, options.overrides, options.dry_run) == ("shapes", ["seed=1"], True)


# doctor, version, help, completion


def test_doctor_names_what_is_missing(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "OPTIONAL", {"no_such_package": "nothing: pip install nothing"})
    monkeypatch.setattr(doctor, "LEAST_GB", 0)
    assert doctor.main() == 0
    out = capsys.readouterr().out
    assert "no_such_package not installed; would add nothing" in " ".join(out.split())
    (here / "runs").mkdir()
    (here / "runs/mlflow.db").write_text("this is no database" * 100)
    assert doctor.main() == 1
    assert "! runs" in capsys.readouterr().out


def test_doctor_names_the_package_of_every_extra():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = {name: words for name, words in project["optional-dependencies"].items() if name != "dev"}
    assert len(extras) > 5
    for name, (requirement, *_) in extras.items():
        package = requirement.partition(">")[0]
        assert f'pip install "sana_lab[{name}]"' in doctor.OPTIONAL[package]


def test_doctor_counts_cores_where_the_system_has_no_affinity(monkeypatch: pytest.MonkeyPatch):
    """As on macOS."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert f"{os.cpu_count()} cores" in next(doctor._devices())[2]


def test_version(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="0"):
        __main__.main(["--version"])
    assert capsys.readouterr().out.startswith("sana-lab 0.")


@pytest.mark.parametrize("verb", __main__.VERBS)
def test_every_verb_has_two_examples_that_parse(verb: str):
    assert len(examples.EXAMPLES[verb]) == 2
    for line in examples.EXAMPLES[verb]:
        command = next(part for part in line.replace('eval "$(', "&& ").split("&& ") if "sana-lab" in part)
        given = shlex.split(command.split(" > ")[0].removesuffix(')"'))
        assert given[0] == "sana-lab"
        assert __main__.parse(given[1:]).verb == verb


def test_words_of_the_command_line():
    assert "ablate" in words("ab")
    assert words("train", "shapes_sana_1") == ["shapes_sana_128"]
    assert words("cache", "shapes_sana_1") == ["shapes_sana_128"]
    assert words("parts", "solver", "dp") == ["dpmpp"]
    assert "--dry-run" in words("train", "shapes", "--")
    assert words("list", "ab") == ["ablations"]
    assert words("no-such-verb", "") == []


def test_completion_in_a_shell(here: Path):
    script = completion.SCRIPTS["bash"]
    stub = f'sana-lab() {{ {sys.executable} -m sana_lab "$@"; }}\n'
    probe = 'COMP_WORDS=(sana-lab parts attention li); COMP_CWORD=3; _sana_lab; echo "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", stub + script + probe], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["linear"]


def test_kinds_of_examples_are_kinds():
    assert new.CLASSES.keys() <= registry.TABLE.keys()


def test_extending_shows_the_examples():
    """Each is complete in at most 40 lines, and the page holds it word for word."""
    page = Path(__file__).parents[2] / "docs/extending.md"
    for kind in new.CLASSES:
        source = (new.TEMPLATES / f"{kind}.py").read_text()
        assert source in page.read_text(), f"docs/extending.md shows another example of {kind}"
        assert len(source.splitlines()) <= 40
