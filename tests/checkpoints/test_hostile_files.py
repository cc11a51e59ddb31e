"""Damaged and hostile files: one line each, before memory or time is lost."""

import json
import struct
import zipfile
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file

from sana_lab.checkpoints import files, hub, weights
from sana_lab.config import experiments
from sana_lab.config.validation import SpecError


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/passwd", "sub/a.safetensors", "..", "", "C:a", "b\\a", 3])
def test_an_index_names_files_beside_it(tmp_path: Path, name: object):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    (tmp_path / "in").mkdir()
    index = tmp_path / "in" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(SpecError, match="expected names of files beside it"):
        files.read_safetensors(index)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000, "\xff", "3"])
def test_a_broken_index(tmp_path: Path, text: str):
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(text, encoding="latin-1")
    with pytest.raises(SpecError, match=r"has no weight_map|cannot be read as JSON|expected a mapping"):
        files.read_safetensors(index)


@pytest.mark.parametrize("keep", [0, 4, 8, 20, -1])
def test_a_truncated_file(tmp_path: Path, keep: int):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(SpecError, match=r"a\.safetensors is cut short"):
        weights.read(path)


@pytest.mark.parametrize("size", [2**30, 2**40, 2**63, 2**64 - 1])
def test_a_header_that_says_it_is_huge(tmp_path: Path, size: int):
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", size) + b"{}")
    with pytest.raises(SpecError, match=r"a\.safetensors is cut short"):
        files.read_safetensors(path)


@pytest.mark.parametrize("card", ["[", "3", "[" * 50_000, "null", '"text"'])
def test_a_broken_card(tmp_path: Path, card: str):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", {"card": card})
    with pytest.raises(SpecError, match=r"has a card that"):
        weights.card(tmp_path / "a.safetensors")


@pytest.mark.parametrize("kind", ["compressed", "overlapping"])
def test_an_archive_that_unpacks_to_more_than_it_is(tmp_path: Path, kind: str):
    torch.save({"a": torch.zeros(2**20)}, tmp_path / "a.pth")
    path = tmp_path / "bomb.pth"
    if kind == "compressed":
        with zipfile.ZipFile(tmp_path / "a.pth") as whole, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
            for entry in whole.infolist():
                bomb.writestr(entry.filename, whole.read(entry))
    else:
        content = bytearray((tmp_path / "a.pth").read_bytes())
        at = content.find(b"PK\x01\x02")  # the first entry of the directory, whose sizes are at 20 and 24
        content[at + 20 : at + 28] = struct.pack("<II", 2**31, 2**31)
        path.write_bytes(content)
    with pytest.raises(SpecError, match=r"is refused: it (compresses|says it holds)"):
        files.read_torch(path)
    assert files.read_torch(tmp_path / "a.pth")["a"].numel() == 2**20


@pytest.mark.parametrize(
    "name", ["../a", "a/../b", "./a", "/a/b", "a/..", "~/a", "a/b..c", "a--b/c", "a/b.git", "a/.b"]
)
def test_a_path_is_no_hub_id(name: str):
    assert not hub.is_hub_id(name)


def test_a_mistyped_path_is_not_looked_for_on_the_hub(here: Path, monkeypatch: pytest.MonkeyPatch):
    (here / "models" / "sana").mkdir(parents=True)
    monkeypatch.setattr(hub, "HfApi", lambda: pytest.fail("the hub was asked"))
    with pytest.raises(SpecError, match=r"no file or folder 'models/sanaa', .*; did you mean 'sana'\?"):
        hub.locate("models/sanaa")


@pytest.mark.parametrize("ring", [("a",), ("a", "b"), ("a", "b", "c")])
def test_a_ring_of_weights_is_one_line_at_once(here: Path, ring: tuple[str, ...]):
    (here / "experiments").mkdir()
    (here / "experiments" / "tiny.yaml").write_text(tiny.EXPERIMENT)
    for name, other in zip(ring, (*ring[1:], ring[0]), strict=True):
        recipe = f"base: tiny\nsystem: {{autoencoder: {{weights: 'experiment:{other}'}}}}\n"
        (here / "experiments" / f"{name}.yaml").write_text(recipe)
    with pytest.raises(SpecError, match=r"experiments take weights from each other: a ->|: b -> "):
        experiments.load("a")


def test_a_reference_in_a_list_is_a_reference():
    assert experiments.referenced({"measures": [{"weights": "experiment:a"}, "clip"]}) == ["a"]
