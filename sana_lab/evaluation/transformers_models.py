"""Evaluation networks of the transformers library from local folders: fp32, frozen, identified by SHA-256."""

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoImageProcessor

from sana_lab.config import digests
from sana_lab.config.specs import SpecError, nearest
from sana_lab.models.text.loading import load_network, read_config
from sana_lab.types import Json

WEIGHTS = ("model.safetensors", "model-*.safetensors", "pytorch_model*.bin")
"""Weight files that transformers reads, in order of preference."""
_PREPROCESSING = ("image_processor_type", "size", "crop_size", "resample", "image_mean", "image_std")


def load(network: Any, folder: str, model_type: str) -> Any:
    """The network that a transformers class reads from a folder. SpecError for a missing folder or another type."""
    _check_folder(folder, model_type)
    actual = read_config(folder).model_type
    if actual != model_type:
        raise SpecError(f"{folder!r} holds a {actual} model, expected a {model_type}")
    return load_network(network, folder, "float32").eval().requires_grad_(False)


def load_processor(folder: str) -> Any:
    """The folder's image processor. SpecError."""
    try:
        return AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise SpecError(f"{folder!r} lacks a preprocessor_config.json that can be read: {reason}") from error


def pixel_values(processor: Any, images: list[Tensor], **options: Any) -> Tensor:
    """Network input (B, 3, h, w) float32 of uint8 (3, H, W) images."""
    return processor(images, return_tensors="pt", input_data_format="channels_first", **options)["pixel_values"]


def preprocessing(processor: Any) -> Json:
    """The settings that pixel values depend on."""
    settings = json.loads(processor.to_json_string())
    return {key: settings[key] for key in _PREPROCESSING if settings.get(key) is not None}


def weights_sha256(folder: str) -> str:
    """SHA-256 of the weight file, as hubs list it; of several files, of their digests in the order of their names."""
    root = Path(folder).expanduser()
    files = next(paths for pattern in WEIGHTS if (paths := sorted(root.glob(pattern))))
    hashes = [digests.sha256(path) for path in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _check_folder(folder: str, model_type: str) -> None:
    root = Path(folder).expanduser()
    if not root.is_dir():
        near = nearest(root.name, (p.name for p in root.parent.glob("*/")))
        raise SpecError(f"there is no folder {folder!r} with a {model_type} model; {near}")
