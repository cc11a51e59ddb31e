"""`sana-lab profile` on tiny systems: phases add up, nothing is left behind, bad input ends in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from sana_lab import __main__
from sana_lab.config import experiments
from sana_lab.profiler import profile
from sana_lab.profiler.phases import SAMPLING, TRAINING

PARTS = {"autoencoder": tiny.VAE_2X, "text_encoder": tiny.T5}
PICTURES = {"name": "folder", "root": "data/none", "size": 16, "held_out": 1}
LATENTS = {"name": "latents", "source": PICTURES, "items": 1000, "batch": 4, "autoencoder": tiny.VAE_2X}
CACHED = {
    "system": {"name": "dit", "dit": {**tiny.DIT, "checkpointing": "selective"}, **PARTS},
    "data": {"name": "features", "source": LATENTS, "text_encoder": tiny.T5, "batch": 4},
    "trainer": {"accelerator": "cpu", "accumulate": 2},
}


@pytest.fixture
def folder(here: Path) -> Path:
    sizes = {"data.size": 16, "system.dit.depth": 2, "system.autoencoder.widths": [8, 8]}
    tiny.write_experiment(here, changes=sizes)
    tiny.write_experiment(here, "cached", changes=CACHED)
    return here


def assert_adds_up(record: dict[str, Any], phases: dict[str, str]) -> None:
    """Means to the mean step, shares to one."""
    assert list(record["phases"]) == list(phases)
    assert sum(p["mean_ms"] for p in record["phases"].values()) == pytest.approx(record["step"]["mean_ms"])
    assert sum(p["share"] for p in record["phases"].values()) == pytest.approx(1)
    for spread in (record["step"], record["unwatched"]):
        assert 0 < spread["least_ms"] <= spread["low_ms"] <= spread["median_ms"] <= spread["high_ms"]


def test_a_training_step_by_phase(folder: Path, capsys: pytest.CaptureFixture[str]):
    files = ["--json", "out.json", "--trace", "trace.json"]
    assert __main__.main(["profile", "tiny", "--steps", "2", "--warmup", "1", "--top", "4", *files]) == 0
    said = capsys.readouterr().out
    record = json.loads((folder / "out.json").read_text())
    assert_adds_up(record, TRAINING)
    never = {"dit: blocks", "autoencoder decode"}
    assert {name for name, phase in record["phases"].items() if not phase["mean_ms"]} == never
    assert record["phases"]["backward"]["share"] > 0.05
    assert record["host_syncs"] == {"per_step": 0, "where": {}}
    assert record["peak_mib"] > record["weights_mib"] > 0
    assert len(record["operators"]) == 4
    assert 0 < sum(o["share"] for o in record["operators"]) <= 1
    assert record["operators"][0]["name"].startswith("aten::")
    assert said == profile.table(record) + "\n"
    assert all(f"\n{name}" in said for name in TRAINING if name not in never)
    assert json.loads((folder / "trace.json").read_text())["traceEvents"]
    assert sorted(p.name for p in folder.iterdir()) == ["experiments", "out.json", "trace.json"]


def test_cached_features_and_pictures_that_are_not_here(folder: Path):
    record = profile.profile_training(experiments.load("cached"), steps=2, warmup=0, top=0)
    assert_adds_up(record, TRAINING)
    assert record["phases"]["text encoding"]["mean_ms"] == record["phases"]["autoencoder encode"]["mean_ms"] == 0
    assert record["phases"]["data loading"]["mean_ms"] > 0
    assert record["operators"] == []
    assert "data: data/none does not exist; replaced by random images" in record["notes"]
    assert "a step is one batch, of 2 that are accumulated" in record["notes"]
    assert [p.name for p in folder.iterdir()] == ["experiments"]


def test_an_image_by_phase(folder: Path):
    record = profile.profile_sampling(experiments.load("tiny"), steps=2, warmup=0, top=2)
    assert_adds_up(record, SAMPLING)
    assert {name for name, phase in record["phases"].items() if not phase["mean_ms"]} == {"dit: blocks"}
    assert "a step is one image of 16 px, 2 denoising steps, every prompt new, no CUDA graphs" in record["notes"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo only hides it
def test_compiled_blocks_are_one_phase(folder: Path):
    record = profile.profile_training(experiments.load("tiny", ["trainer.compile=true"]), steps=2, warmup=1)
    assert record["phases"]["dit: blocks"]["mean_ms"] > 0
    assert record["phases"]["dit: attention"]["mean_ms"] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tiny", "--steps", "0"], "--steps is 0 (int), expected int in [1, 10000000]; the nearest is 1"),
        (["tiny", "--warmup", "-1"], "--warmup is -1 (int), expected int in [0, 10000000]"),
        (["tiny", "--json", "none/out.json"], "cannot write none/out.json: there is no folder"),
        (["tiny", "--trace", "experiments"], "cannot write experiments: it is a folder"),
        (["tyny"], "there is no experiment 'tyny'; did you mean 'tiny'?"),
        (["tiny", "system.dit.dim=30"], "30 is not a multiple"),
        (
            ["cached", "--sampling"],
            "'dit' does not; expected text2image",
        ),
    ],
)
def test_mistakes_end_in_one_line(folder: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]):
    assert __main__.main(["profile", *arguments]) == 1
    said = capsys.readouterr().err
    assert said.startswith("sana-lab: ")
    assert said.count("\n") == 1
    assert words in said
