"""Other people's files, read safely: tensors and plain data, never code, and not before they are asked for."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi, snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sana_lab.config.specs import SpecError, nearest

TORCH = (".pth", ".pt", ".bin", ".ckpt")
_SECONDS = 10.0  # for the hub to answer
_WANTED = ("*.json", "*.safetensors", "*.pth", "tokenizer*", "*/tokenizer*")


class Tensors(Mapping[str, Tensor]):
    """name -> tensor of safetensors files, mapped into memory when it is asked for and for as long as it is kept."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.files = files

    def __getitem__(self, name: str) -> Tensor:
        with opened(self.files[name]) as file:  # an own mapping for each: it goes when its tensor does
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def opened(path: Path) -> AbstractContextManager[Any]:
    """A safetensors file. SpecError where it is none, or is cut short."""
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise SpecError(f"{path} is cut short or is no safetensors file: {error}") from error


def is_index(path: Path) -> bool:
    """Whether a file's name is that of an index of shards, maybe of a variant."""
    return re.search(r"\.safetensors\.index\.(\w+\.)?json$", path.name) is not None


def names(path: Path) -> list[str]:
    with opened(path) as file:
        return list(file.keys())


def read_safetensors(path: Path) -> Tensors:
    """The tensors of one file, or of the shards that an `.index.json` names. SpecError where a shard is missing."""
    if not is_index(path):
        return Tensors(dict.fromkeys(names(path), path))
    shards = {name: path.parent / file for name, file in read_json(path).get("weight_map", {}).items()}
    if lost := sorted({p.name for p in shards.values() if not p.is_file()}):
        raise SpecError(f"{path.parent} lacks {', '.join(lost)}, which {path.name} names")
    held = {p: set(names(p)) for p in sorted(set(shards.values()))}
    if wrong := [name for name, p in shards.items() if name not in held[p]]:
        raise SpecError(f"{path.name} looks for {wrong[0]} in {shards[wrong[0]].name}, which does not hold it")
    return Tensors({name: p for p, known in held.items() for name in sorted(known)})


def whole(path: Path) -> Path:
    """The index of the shards of which a path is one, else the path. SpecError where it is not beside it."""
    shard = re.fullmatch(r"(\w+)(?:\.(\w+))?-\d{5}-of-(\d{5})\.safetensors", path.name)
    if shard is None:
        return path
    name = f"{shard[1]}.safetensors.index.{f'{shard[2]}.' if shard[2] else ''}json"
    if not (path.parent / name).is_file():
        raise SpecError(f"{path} is one of {int(shard[3])} shards, and their index {name} is not beside it")
    return path.parent / name


def read_torch(path: Path) -> Any:
    """What `torch.save` wrote, tensors mapped, not read. SpecError where it holds code, or is cut short."""
    try:
        with torch.serialization.safe_globals(_numpy()):
            return _load(path)
    except UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|Unsupported class) [`'\"]?([\w.]+)", str(error))
        what = f"it names {found[1]}" if found else "torch's safe reader refuses it"
        raise SpecError(
            f"{path} is refused: a pickle that holds more than tensors and plain data can run any code ({what}); "
            "ask for a safetensors file, or a .pth of tensors alone"
        ) from error
    except Exception as error:  # on other bytes the reader raises anything
        raise SpecError(f"{path} is cut short or is no file of torch.save: {_line(error)}") from error


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):
            raise
        return torch.load(path, map_location="cpu", weights_only=True)  # the format before torch 1.6


def _numpy() -> list[Any]:
    """The plain arrays in which NVlabs keeps the state of numpy's random numbers, under both of numpy's names."""
    rebuild = np._core.multiarray._reconstruct  # type: ignore[attr-defined]
    old = [(rebuild, "numpy.core.multiarray._reconstruct"), (rebuild, "numpy._core.multiarray._reconstruct")]
    return [*old, np.ndarray, np.dtype, type(np.dtype(np.uint32)), type(np.dtype(np.uint64))]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON mapping. SpecError where it is none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SpecError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise SpecError(f"{path} holds {type(found).__name__}, expected a mapping")
    return found


def component(folder: Path, variant: str | None = None) -> Mapping[str, Tensor]:
    """The tensors of a diffusers component: single or sharded safetensors, or the older .bin.

    `variant` such as fp16 chooses among several; where there is one alone it is taken. SpecError lists what there is.
    """
    stem = "diffusion_pytorch_model"
    pattern = re.compile(rf"{stem}(?:\.(\w+))?\.(safetensors\.index\.json|safetensors|bin)$")
    alternate = re.compile(rf"{stem}\.(safetensors|bin)\.index\.(\w+)\.json$")
    found: dict[tuple[str | None, str], Path] = {}
    for path in sorted(folder.iterdir()):
        if match := pattern.match(path.name):
            found[match[1], match[2]] = path
        elif (match := alternate.match(path.name)) and match[1] == "safetensors":
            found[match[2], "safetensors.index.json"] = path
    have = {v for v, _ in found}
    chosen = variant if variant in have else None if variant is None and None in have else _only(folder, variant, have)
    path = next(found[chosen, k] for k in ("safetensors", "safetensors.index.json", "bin") if (chosen, k) in found)
    return read_torch(path) if path.suffix == ".bin" else read_safetensors(path)


def _only(folder: Path, variant: str | None, have: set[str | None]) -> str | None:
    if variant is None and len(have) == 1:
        return next(iter(have))
    if not have:
        inside = ", ".join(sorted(p.name for p in folder.iterdir()))
        raise SpecError(f"{folder} lacks its weights; expected diffusion_pytorch_model.safetensors beside {inside}")
    known = ", ".join(sorted(v or "none" for v in have))
    raise SpecError(f"{folder} has no weights of variant {variant!r}; there is: {known}")


def find(reference: str) -> Path:
    """The file or folder that a path or hub id means. SpecError says what was tried and what to do."""
    path = Path(reference).expanduser()
    if path.exists():
        return path
    if not is_hub_id(reference):
        near = nearest(path.name, (p.name for p in path.parent.glob("*")))
        what = "checkpoint" if path.suffix == ".ckpt" else "file or folder"
        raise SpecError(f"there is no {what} {reference!r}; {near}")
    return _from_hub(reference)


def is_hub_id(reference: str) -> bool:
    """Whether it could be owner/name of the hub; a file's ending says it is none."""
    ending = reference.endswith((*TORCH, ".safetensors", ".yaml", ".yml"))
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", reference)) and not ending


def _from_hub(name: str) -> Path:
    """The local copy of a hub repository, fetched where there is none and the hub answers."""
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except Exception:  # whatever the client raises: it is not here
        pass
    try:
        HfApi().model_info(name, timeout=_SECONDS)
        return Path(snapshot_download(name, allow_patterns=list(_WANTED)))
    except Exception as error:  # the hub's client lets the errors of its HTTP library through
        folder = name.split("/")[-1]
        raise SpecError(
            f"{name!r} is neither a file or folder here nor in the local Hugging Face cache, and the hub says: "
            f"{_line(error)}; on a machine with a network run `hf download {name} --local-dir {folder}`, bring the "
            "folder here and give its path. Needed of a pipeline: model_index.json, transformer/, vae/, text_encoder/, "
            "tokenizer/ and scheduler/ (config.json and *.safetensors each); of NVlabs' own: the .pth alone"
        ) from error


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
