"""Safe, lazy readers of other people's files: safetensors and their shards, .pth without code, JSON."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sana_lab.config import text_files
from sana_lab.config.archives import check_archive
from sana_lab.config.validation import SpecError

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
"""Suffixes of files that `torch.save` wrote."""

JSON_LIMIT = 2**28
"""Bytes of a JSON file that are read: an index of a million tensors has a tenth."""


class LazyTensors(Mapping[str, Tensor]):
    """name -> tensor of safetensors files; a tensor is memory-mapped when it is accessed, for as long as it lives."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.files = files

    def __getitem__(self, name: str) -> Tensor:
        with open_safetensors(self.files[name]) as file:  # a separate memory map, freed with the tensor
            return read_tensor(file, name, self.files[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


# safetensors


def open_safetensors(path: Path) -> AbstractContextManager[Any]:
    """The opened file. SpecError if it is truncated or not a safetensors file."""
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise SpecError(f"{path} is cut short or is no safetensors file: {error}") from error


def read_tensor(file: Any, name: str, path: Path) -> Tensor:
    """A tensor of an opened safetensors file. SpecError if its bytes are damaged."""
    try:
        return file.get_tensor(name)
    except Exception as error:  # of another class for each kind of damage
        raise SpecError(f"{path}: tensor {name!r} cannot be read: {first_line(error)}") from error


def tensor_names(path: Path) -> list[str]:
    with open_safetensors(path) as file:
        return list(file.keys())


def read_header(path: Path) -> dict[str, Tensor]:
    """Tensors on the meta device in the shapes of a safetensors file, of which only the header is read. SpecError."""
    with open_safetensors(path) as file:
        return {k: torch.empty(file.get_slice(k).get_shape(), device="meta") for k in file.keys()}  # noqa: SIM118


def read_safetensors(path: Path) -> LazyTensors:
    """The tensors of one file, or of the shards listed in an `.index.json`. SpecError if a shard is missing."""
    if not is_index(path):
        return LazyTensors(dict.fromkeys(tensor_names(path), path))
    names_of = read_json(path).get("weight_map")
    if not isinstance(names_of, dict) or not names_of:
        raise SpecError(f"{path} has no weight_map of tensors and their files")
    if outside := [file for file in names_of.values() if not _is_plain(file)]:
        raise SpecError(f"{path} names the file {outside[0]!r}; expected names of files beside it")
    shards = {name: path.parent / file for name, file in names_of.items()}
    if missing := sorted({p.name for p in shards.values() if not p.is_file()}):
        raise SpecError(f"{path.parent} lacks {', '.join(missing)}, which {path.name} names")
    names = {p: set(tensor_names(p)) for p in sorted(set(shards.values()))}
    if misplaced := [name for name, p in shards.items() if name not in names[p]]:
        raise SpecError(f"{path.name} looks for {misplaced[0]} in {shards[misplaced[0]].name}, which does not hold it")
    return LazyTensors({name: p for p in names for name in sorted(names[p])})


def _is_plain(name: Any) -> bool:
    """Whether this is the name of a file and no path to elsewhere."""
    return isinstance(name, str) and name not in ("", ".", "..") and not re.search(r"[/\\\0]|^\w:", name)


def is_index(path: Path) -> bool:
    """Whether a file's name is that of an index of shards, of a variant or none."""
    return re.search(r"\.safetensors\.index\.(\w+\.)?json$", path.name) is not None


def index_of(path: Path) -> Path:
    """The index of which `path` is a shard; any other path unchanged. SpecError if the index is missing."""
    shard = re.fullmatch(r"(\w+)(?:\.(\w+))?-\d{5}-of-(\d{5})\.safetensors", path.name)
    if shard is None:
        return path
    name = f"{shard[1]}.safetensors.index.{f'{shard[2]}.' if shard[2] else ''}json"
    if not (path.parent / name).is_file():
        raise SpecError(f"{path} is one of {int(shard[3])} shards, and their index {name} is not beside it")
    return path.parent / name


# torch.save


def read_torch(path: Path) -> Any:
    """An object written by `torch.save`, with memory-mapped tensors. SpecError if it is truncated or contains code."""
    try:
        check_archive(path)
    except ValueError as error:
        raise SpecError(str(error)) from error
    try:
        with torch.serialization.safe_globals(_numpy_globals()):
            return _load(path)
    except UnpicklingError as error:
        match = re.search(r"(?:GLOBAL|Unsupported class) [`'\"]?([\w.]+)", str(error))
        reason = f"it names {match[1]}" if match else "torch's safe reader refuses it"
        raise SpecError(
            f"{path} is refused: a pickle that holds more than tensors and plain data can run any code ({reason}); "
            "ask for a safetensors file, or a .pth that contains only tensors"
        ) from error
    except Exception as error:  # on other bytes the reader raises anything
        raise SpecError(f"{path} is cut short or is no file of torch.save: {first_line(error)}") from error


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):
            raise
        return torch.load(path, map_location="cpu", weights_only=True)  # the format before torch 1.6


def _numpy_globals() -> list[Any]:
    """Functions that rebuild numpy arrays, under both module names: NVlabs' .pth files contain numpy's random state."""
    rebuild = np._core.multiarray._reconstruct  # type: ignore[attr-defined]
    names = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
    types = (np.ndarray, np.dtype, type(np.dtype(np.uint32)), type(np.dtype(np.uint64)))
    return [*((rebuild, name) for name in names), *types]


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


# JSON


def read_json(path: Path) -> dict[str, Any]:
    """A JSON mapping, in any UTF, with a byte order mark or without. SpecError otherwise."""
    try:
        if (size := path.stat().st_size) > JSON_LIMIT:
            raise SpecError(f"{path} has {size:,} bytes, expected a JSON file of at most {JSON_LIMIT:,}")
        value = json.loads(text_files.read(path))
    except (OSError, ValueError, RecursionError) as error:
        raise SpecError(f"{path} cannot be read as JSON: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise SpecError(f"{path} holds {type(value).__name__}, expected a mapping")
    return value


# Component folders of diffusers


def read_component(folder: Path, variant: str | None = None) -> Mapping[str, Tensor]:
    """The tensors of a diffusers component: single or sharded safetensors, or the older .bin.

    `variant` such as fp16 chooses among several; if there is only one, it is taken. SpecError lists the variants.
    """
    files = _weight_files(folder)
    variants = {v for v, _ in files}
    if variant not in variants:
        variant = _only_variant(folder, variant, variants)
    formats = ("safetensors", "safetensors.index.json", "bin")
    path = next(files[variant, f] for f in formats if (variant, f) in files)
    return read_torch(path) if path.suffix == ".bin" else read_safetensors(path)


def _weight_files(folder: Path) -> dict[tuple[str | None, str], Path]:
    """(variant, format) -> file, or index of shards, under either of diffusers' names for a variant's index."""
    stem = "diffusion_pytorch_model"
    usual = re.compile(rf"{stem}(?:\.(\w+))?\.(safetensors\.index\.json|safetensors|bin)$")
    index = re.compile(rf"{stem}\.safetensors\.index\.(\w+)\.json$")
    files: dict[tuple[str | None, str], Path] = {}
    for path in sorted(folder.iterdir()):
        if match := usual.match(path.name):
            files[match[1], match[2]] = path
        elif match := index.match(path.name):
            files[match[1], "safetensors.index.json"] = path
    return files


def _only_variant(folder: Path, variant: str | None, variants: set[str | None]) -> str | None:
    if variant is None and len(variants) == 1:
        return next(iter(variants))
    if not variants:
        files = ", ".join(sorted(p.name for p in folder.iterdir()))
        raise SpecError(f"{folder} lacks its weights; expected diffusion_pytorch_model.safetensors beside {files}")
    names = ", ".join(sorted(v or "none" for v in variants))
    raise SpecError(f"{folder} has no weights of variant {variant!r}; there is: {names}")
