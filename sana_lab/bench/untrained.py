"""Systems without trained weights, for measurements that do not depend on them."""

from collections.abc import Callable
from typing import Any

import torch

from sana_lab.bench.record import COMPONENTS
from sana_lab.checkpoints.build import build, without_weights
from sana_lab.config.specs import SpecError
from sana_lab.types import Json


def build_untrained(experiment: Json) -> Any:
    """A resolved experiment's text2image system without its weights, on the fastest device; on CUDA in the half
    precision of its training. SpecError if it is not a text2image system, or if its cost depends on its weights."""
    spec = experiment["system"]
    check_cost(experiment)
    check_speed(experiment)
    if not all(isinstance(spec.get(name), dict) for name in COMPONENTS.values()):
        raise SpecError(f"bench measures a text2image system, but this experiment trains {spec['name']!r}")
    cuda = torch.cuda.is_available()
    half = {"bf16": torch.bfloat16, "16-": torch.float16}
    precision = experiment["trainer"]["precision"]
    dtype = next((d for p, d in half.items() if cuda and precision.startswith(p)), torch.float32)
    return untrained_system(spec, torch.device("cuda" if cuda else "cpu"), dtype)


def check_cost(experiment: Json) -> None:
    """SpecError for a step cache: which blocks run depends on trained weights."""
    if (cache := experiment.get("sampling", {}).get("cache")) is not None:
        raise SpecError(
            f"sampling.cache is {cache['name']!r}, whose speed depends on the weights, and these are untrained; "
            "expected null, or a row of an ablation, which is measured with its trained weights"
        )


def check_speed(experiment: Json) -> None:
    """SpecError for products that are simulated, which have no speed."""
    if (mode := experiment.get("sampling", {}).get("quantize", "none")).endswith("_simulated"):
        raise SpecError(
            f"sampling.quantize is {mode!r}, which has no speed of its own; expected none, int8, w8a8 or fp8"
        )


def untrained_system(spec: Json, device: torch.device, dtype: torch.dtype) -> Any:
    """The system of a resolved spec without its weights, constructed on the device."""
    with device:
        return build("system", without_weights(spec)).to(device, dtype)


def with_random_text_encoder(system: Json) -> Json:
    """A system's spec without weights, its pretrained text encoder initialised at random at the published size."""
    bare = without_weights(system)
    return {**bare, "text_encoder": _each_encoder(bare["text_encoder"], _at_random)}


def without_cache(encoder: Json) -> Json:
    """A text encoder's spec without a cache of features, so that each call encodes its prompts."""
    return _each_encoder(encoder, lambda spec: {**spec, "cache": False} if spec["name"] == "llm" else spec)


def _at_random(encoder: Json) -> Json:
    return {**encoder, "random_init": True} if encoder.get("model") else encoder


def _each_encoder(spec: Json, change: Callable[[Json], Json]) -> Json:
    """A text encoder's spec changed, and that of the encoder inside it."""
    inner = spec.get("encoder")
    return change(spec) | ({"encoder": _each_encoder(inner, change)} if isinstance(inner, dict) else {})
