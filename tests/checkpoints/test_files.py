"""Weights files: single, sharded, of a variant; code, truncation and missing shards are refused."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_peers
import torch
from safetensors.torch import save_file
from tiny_peers import NVLABS_HINTS, close, nvlabs_state, velocities

from sana_lab.checkpoints import files
from sana_lab.config.validation import SpecError
from sana_lab.pretrained import loading


@pytest.mark.parametrize(
    ("layout", "files"), [("sharded", 3), ("bin", 0), ("fp16 alone", 1), ("fp16 chosen", 2), ("sharded fp16", 2)]
)
def test_files_of_a_component(tmp_path: Path, layout: str, files: int):
    model = tiny_peers.sana_transformer()
    is_half = "fp16" in layout
    options: dict[str, Any] = {"max_shard_size": "100KB"} if "sharded" in layout else {}
    if layout == "fp16 chosen":
        tiny_peers.saved(model, tmp_path / "t")
    model = model.half() if is_half else model
    options |= {"safe_serialization": layout != "bin", "variant": "fp16" if is_half else None}
    folder = tiny_peers.saved(model, tmp_path / "t", **options)
    assert len(list(folder.glob("*.safetensors"))) == files
    dit = loading.load(folder, variant="fp16" if layout == "fp16 chosen" else None)
    assert {p.dtype for p in dit.parameters()} == {torch.float16 if is_half else torch.float32}
    assert close(*velocities(dit.float(), model.float()))
    if layout == "fp16 chosen":
        with pytest.raises(SpecError, match="variant 'bf16'; there is: fp16, none"):
            loading.load(folder, variant="bf16")


def test_shards_by_their_index_or_by_one_of_them(tmp_path: Path):
    model = tiny_peers.sana_transformer()
    folder = tiny_peers.saved(model, tmp_path / "t", max_shard_size="100KB")
    shards = sorted(folder.glob("*.safetensors"))
    for path in (folder / "diffusion_pytorch_model.safetensors.index.json", shards[1]):
        assert loading.is_model(str(path))
        assert close(*velocities(loading.load(path), model))
    (folder / "diffusion_pytorch_model.safetensors.index.json").unlink()
    with pytest.raises(SpecError, match=r"one of 3 shards, .* index diffusion_pytorch_model.safetensors.index"):
        loading.load(shards[1])


class Code:
    """An object whose unpickling runs a shell command."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.proof}",)


@pytest.mark.parametrize("suffix", ["pth", "ckpt", "bin"])
def test_code_in_a_pickle_does_not_run(tmp_path: Path, suffix: str):
    path = tmp_path / f"a.{suffix}"
    torch.save({"state_dict": {"x_embedder.proj.weight": Code(tmp_path / "proof")}}, path)
    with pytest.raises(SpecError, match=r"refused: .* can run any code \(it names posix.system\)"):
        loading.load(path)
    path.write_bytes(pickle.dumps(Code(tmp_path / "proof"), 2))
    with pytest.raises(SpecError, match="can run any code"):
        loading.load(path)
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors", "a.ckpt"])
def test_a_truncated_file_is_refused(tmp_path: Path, name: str):
    state, path = nvlabs_state(tiny_peers.sana_transformer()), tmp_path / name
    save_file(state, path) if name.endswith("safetensors") else torch.save({"state_dict": state}, path)
    content = path.read_bytes()
    for end in (0, 7, 1000, -100):
        path.write_bytes(content[:end])
        with pytest.raises(SpecError, match=f"{name} is cut short"):
            loading.load(path, **NVLABS_HINTS)


def test_missing_or_truncated_shards_are_named(tmp_path: Path):
    folder = tiny_peers.saved(tiny_peers.sana_transformer(), tmp_path / "t", max_shard_size="100KB")
    last = sorted(folder.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-10])
    with pytest.raises(SpecError, match=f"{last.name} is cut short"):
        loading.load(folder)
    last.unlink()
    with pytest.raises(SpecError, match=f"lacks {last.name}, which diffusion_pytorch_model.safetensors.index.json"):
        loading.load(folder)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_json_in_any_utf(tmp_path: Path, encoding: str):
    path = tmp_path / "config.json"
    path.write_bytes('{"name": "Größe"}'.encode(encoding))
    assert files.read_json(path) == {"name": "Größe"}


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe{", b'{"a": "\xe9"}', b'{"a": "\x00"}'])
def test_json_that_cannot_be_read_is_one_line_with_its_path(tmp_path: Path, content: bytes):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(SpecError, match=r"config\.json") as caught:
        files.read_json(path)
    assert "\n" not in str(caught.value)
