"""Local paths of models: files and folders unchanged, Hugging Face hub ids from the cache or the hub."""

import re
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from sana_lab.checkpoints.files import TORCH_SUFFIXES, first_line
from sana_lab.config.validation import SpecError, nearest

TIMEOUT = 10.0
"""Seconds for the hub to answer."""

PATTERNS = ("*.json", "*.safetensors", "*.pth", "tokenizer*", "*/tokenizer*")
"""Files of a repository that are downloaded."""


def locate(reference: str) -> Path:
    """The local file or folder of a path or hub id. SpecError says what was tried and what to do."""
    path = Path(reference).expanduser()
    if path.exists():
        return path
    if not is_hub_id(reference):
        hint = nearest(path.name, (p.name for p in path.parent.glob("*")))
        what = "checkpoint" if path.suffix == ".ckpt" else "file or folder"
        raise SpecError(f"there is no {what} {reference!r}; {hint}")
    return _snapshot(reference)


def is_hub_id(reference: str) -> bool:
    """Whether a reference has the form owner/name that the hub allows, and no suffix of a file."""
    is_file = reference.endswith((*TORCH_SUFFIXES, ".safetensors", ".yaml", ".yml", ".json", ".git"))
    words = r"[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?"
    is_id = re.fullmatch(rf"{words}/{words}", reference, re.ASCII) and not re.search(r"\.\.|--", reference)
    return bool(is_id) and not is_file


def _snapshot(name: str) -> Path:
    """The local copy of a hub repository, downloaded if it is not in the cache."""
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except Exception:  # the client raises many classes if the cache has no copy
        owner = Path(name.split("/")[0])
    if owner.is_dir():  # a path that was mistyped: nobody on the hub is asked for it
        hint = nearest(Path(name).name, (p.name for p in owner.glob("*")))
        raise SpecError(f"there is no file or folder {name!r}, and no model of that name in the local cache; {hint}")
    try:
        HfApi().model_info(name, timeout=TIMEOUT)
        return Path(snapshot_download(name, allow_patterns=list(PATTERNS)))
    except Exception as error:  # errors of the client's HTTP library pass through
        folder = name.split("/")[-1]
        raise SpecError(
            f"{name!r} is neither a file or folder here nor in the local Hugging Face cache, and the hub says: "
            f"{first_line(error)}; on a machine with a network run `hf download {name} --local-dir {folder}`, copy the "
            "folder here and give its path. A pipeline needs: model_index.json, transformer/, vae/, text_encoder/, "
            "tokenizer/ and scheduler/ (config.json and *.safetensors each); NVlabs' own release: the .pth alone"
        ) from error
