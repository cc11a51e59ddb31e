"""Files from elsewhere: none runs code, however it names it; the user's own experiment still loads what it trained."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from sana_lab.checkpoints import weights
from sana_lab.checkpoints.networks import trained
from sana_lab.config import experiments, guests, specs
from sana_lab.config.validation import SpecError
from sana_lab.pretrained import loading
from sana_lab.shapes.networks import Attributes
from sana_lab.training import train

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


@pytest.fixture
def folder(here: Path) -> Path:
    """A working directory with a module that leaves a trace where it is imported."""
    sys.modules.pop("evil_guest", None)
    (here / "evil_guest.py").write_text(CODE)
    tiny.write_experiment(here)
    return here


def put(config: Any, path: str, value: Any) -> Any:
    """The configuration with another value at a dotted path."""
    config = copy.deepcopy(config)
    *keys, last = path.split(".")
    inner = config
    for key in keys:
        inner = inner[key]
    inner[last] = value
    return config


PLACES = {
    "system.dit.attention": EVIL,
    "system.dit.attention.name": EVIL,
    "system.name": EVIL,
    "system.optimizer": EVIL,
    "data": EVIL,
    "sampling.solver": EVIL,
    "eval.measures": ["clip_shapes", EVIL],
    "eval.rfid": {"name": "function", "function": EVIL},
    "system.autoencoder": "experiment:mine",
    "system.autoencoder.weights": "experiment:./mine.yaml",
}


@pytest.mark.parametrize("place", PLACES)
def test_a_card_names_no_code(folder: Path, place: str):
    (folder / "mine.yaml").write_text(f"base: tiny\nsystem: {{dit: {{attention: '{EVIL}'}}}}\n")
    (folder / "experiments" / "mine.yaml").write_text((folder / "mine.yaml").read_text())
    config = put(experiments.load("tiny"), place, PLACES[place])
    weights.write(folder / "a.safetensors", {"dit.a": torch.zeros(1)}, {"experiment": "tiny", "config": config})
    with pytest.raises(SpecError, match=r"which a file may not|which a path is not"):
        loading.open_model("a.safetensors")
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("name", ["./mine.yaml", "../mine", "/downloads/mine.yaml", "mine", 3])
def test_a_card_names_no_recipe_with_code(folder: Path, name: Any):
    """Neither by its path nor one of the user's own that has a guest."""
    (folder / "mine.yaml").write_text(f"base: tiny\nsystem: {{dit: {{attention: '{EVIL}'}}}}\n")
    (folder / "experiments" / "mine.yaml").write_text((folder / "mine.yaml").read_text())
    weights.write(folder / "a.safetensors", {"dit.a": torch.zeros(1)}, {"experiment": name, "hash": "0"})
    for load in (loading.load, lambda path: trained(path, Attributes)):
        with pytest.raises(SpecError, match=r"which a file may not|which a path is not"):
            load("a.safetensors")
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("place", ["dit.attention", "dit.attention.name", "optimizer", "optimizer.name"])
def test_a_checkpoint_names_no_code(folder: Path, place: str):
    options = {k: v for k, v in experiments.load("tiny")["system"].items() if k != "name"}
    checkpoint = {"hyper_parameters": put(options, place, EVIL), "average": {}, "state_dict": {}}
    torch.save(checkpoint, folder / "a.ckpt")
    with pytest.raises(SpecError, match="which a file may not"):
        loading.load("a.ckpt")
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("place", ["parts.dit.spec.attention", "sampling.solver", "parts.dit.supplied.channels"])
def test_an_imported_file_names_no_code(folder: Path, place: str):
    dit = {"spec": specs.resolve("dit", tiny.DIT), "supplied": {"channels": 4, "text_dim": 12}}
    card = put({"imported": "x", "parts": {"dit": dit}, "sampling": {"solver": "euler"}}, place, EVIL)
    weights.write(folder / "a.safetensors", {"dit.a": torch.zeros(1)}, card)
    with pytest.raises(SpecError, match="which a file may not"):
        loading.load("a.safetensors")
    assert not (folder / "ran").exists()


def test_what_a_guest_has_trained_resumes_and_loads_by_the_users_experiment(folder: Path):
    own = [f"system.dit.attention={EVIL}", "prompts=[]"]
    path = train.train(experiments.load("tiny", own))
    state = weights.read(path)
    path.unlink()
    assert train.train(experiments.load("tiny", own)) == path  # from its last checkpoint
    assert all(torch.equal(tensor, state[name]) for name, tensor in weights.read(path).items())
    system = loading.open_model("tiny", own)
    assert type(system.dit.blocks[0].attention).__name__ == "Part"
    for file in (path, *path.parent.glob("*.ckpt")):
        with pytest.raises(SpecError, match=r"asks for 'evil_guest:Part', .* give that experiment's name"):
            loading.open_model(str(file))
    with guests.brought_by("b"), pytest.raises(SpecError, match="b asks for"):
        loading.open_model("tiny", own)
