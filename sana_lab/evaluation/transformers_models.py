"""Networks of the transformers library from a folder of this machine, to judge with: fp32, frozen, known by a hash."""

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoImageProcessor

from sana_lab.config.digests import sha256
from sana_lab.config.specs import SpecError, nearest
from sana_lab.models.text.loading import load_network, read_config
from sana_lab.types import Json

WEIGHTS = ("model.safetensors", "model-*.safetensors", "pytorch_model*.bin")
"""Which files transformers reads, the first kind that is there."""
_PREPARATION = ("image_processor_type", "size", "crop_size", "resample", "image_mean", "image_std")


def load(network: Any, folder: str, model_type: str) -> Any:
    """The network that a transformers class reads from a folder. SpecError says what is missing or of another kind."""
    _check_folder(folder, model_type)
    found = read_config(folder).model_type
    if found != model_type:
        raise SpecError(f"{folder!r} holds a {found} model, expected a {model_type}")
    return load_network(network, folder, "float32").eval().requires_grad_(False)


def load_processor(folder: str) -> Any:
    """What makes a picture into the network's input, as the folder says. SpecError."""
    try:
        return AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise SpecError(f"{folder!r} lacks a preprocessor_config.json that can be read: {reason}") from error


def prepared(processor: Any, images: list[Tensor], **options: Any) -> Tensor:
    """Pixel values (B, 3, h, w) float32 of uint8 (3, H, W) pictures."""
    return processor(images, return_tensors="pt", input_data_format="channels_first", **options)["pixel_values"]


def preprocessing(processor: Any) -> Json:
    """What the pixel values depend on."""
    settings = json.loads(processor.to_json_string())
    return {key: settings[key] for key in _PREPARATION if settings.get(key) is not None}


def weights_sha256(folder: str) -> str:
    """Of the file of weights, as hubs list it; of the digests of several, in the order of their names."""
    place = Path(folder).expanduser()
    files = next(found for pattern in WEIGHTS if (found := sorted(place.glob(pattern))))
    digests = [sha256(path) for path in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _check_folder(folder: str, model_type: str) -> None:
    place = Path(folder).expanduser()
    if not place.is_dir():
        near = nearest(place.name, (p.name for p in place.parent.glob("*/")))
        raise SpecError(f"there is no folder {folder!r} with a {model_type} model; {near}")
