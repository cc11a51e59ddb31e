"""Guests: code that the user's own YAML may name and a file from elsewhere may not, in any form."""

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from sana_lab.config import experiments, guests, specs
from sana_lab.config.validation import SpecError

EVIL = "evil_guest:Part"
CODE = """
from pathlib import Path

from sana_lab.models.attention import Attention

Path("ran").touch()


class Part(Attention):
    def __init__(self, head_dim: int = 8, *, dim: int) -> None:
        super().__init__(dim, head_dim, qk_norm=False)

    def mix(self, q, k, v):
        return v.mean(1, keepdim=True).expand_as(v)
"""
FORMS: dict[str, Any] = {
    "mapping": {"dit": {"attention": {"name": EVIL}}},
    "bare": {"dit": {"attention": EVIL}},
    "list": {"eval": {"measures": ["clip_score", EVIL]}},
    "list of mappings": {"eval": {"measures": [{"name": EVIL}]}},
    "list of lists": {"eval": {"measures": [[EVIL]]}},
    "tuple": {"eval": {"measures": (EVIL,)}},
    "solver": {"sampling": {"solver": EVIL}},
    "option of a part": {"extractor": {"name": "function", "function": EVIL}},
    "odd name": {"dit": {"attention": "an odd-module: Part"}},
    "path-like name": {"dit": {"name": "a/b:Part"}},
    "experiment as a part": {"dit": "experiment:mine"},
    "experiment as a name": {"dit": {"name": "experiment:mine"}},
    "experiment by its path": {"dit": {"name": "sana", "weights": "experiment:/downloads/evil.yaml"}},
    "experiment above": {"dit": {"name": "sana", "weights": "experiment:../evil"}},
    "experiment beside": {"dit": {"name": "sana", "weights": "experiment:evil.yaml"}},
}


@pytest.mark.parametrize("form", FORMS)
def test_what_a_file_may_not_name(form: str):
    with pytest.raises(SpecError, match=r"which a file may not|which a path is not"):
        guests.check(FORMS[form], "a.safetensors")


def test_what_a_file_may_say():
    guests.check(
        {
            "dit": {"name": "sana", "attention": "linear", "weights": "experiment:paper/one"},
            "text_encoder": {"name": "llm", "model": "C:\\models\\gemma", "instruction": "say: {}"},
            "prompts": ["a sign: hello"],
            "eval": {"measures": [{"name": "clip_score", "device": "cuda:1"}]},
            "autoencoder": {"weights": "/data:1/vae.safetensors"},
        },
        "a.safetensors",
    )


def test_the_door_is_shut_for_what_a_file_brings(here: Path):
    (here / "evil_guest.py").write_text(CODE)
    with guests.brought_by("a.safetensors"), pytest.raises(SpecError, match=r"a.safetensors asks for"):
        specs.find("attention", EVIL)
    assert guests.locate("evil_guest") is not None
    assert not (here / "ran").exists()


def test_a_recipe_of_the_users_own_that_a_file_names_runs_no_code(here: Path):
    (here / "evil_guest.py").write_text(CODE)
    (here / "experiments").mkdir()
    recipe = f"base: shapes\nsystem: {{dit: {{attention: '{EVIL}'}}}}\n"
    (here / "experiments" / "mine.yaml").write_text(recipe)
    with guests.brought_by("a.safetensors"), pytest.raises(SpecError, match="which a file may not"):
        experiments.load("mine")
    assert not (here / "ran").exists()


@pytest.mark.parametrize("name", [":Part", "..relative:Part", "no_such_module:Part", "json:", "json:lods"])
def test_a_name_of_nothing_is_one_line(name: str, here: Path):
    with pytest.raises(SpecError, match=r"names no module|there is no module|has no"):
        specs.find("attention", name)


@pytest.fixture
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The console script that an installation writes: its own folder is first on the import path."""
    project = Path(__file__).parents[2] / "pyproject.toml"
    module, function = tomllib.loads(project.read_text())["project"]["scripts"]["sana-lab"].split(":")
    path = tmp_path_factory.mktemp("bin") / "sana-lab"
    path.write_text(f"import sys\nfrom {module} import {function}\nsys.exit({function}())\n")
    return path


def test_the_installed_command_takes_parts_from_the_working_directory(here: Path, script: Path):
    """README's example, from an ordinary folder."""
    (here / "evil_guest.py").write_text(CODE)
    command = [sys.executable, script, "train", "shapes", f"system.dit.attention={EVIL}", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=here, check=False)
    assert done.returncode == 0, done.stderr
    assert f"name: {EVIL}" in done.stdout
    assert (here / "ran").exists()
