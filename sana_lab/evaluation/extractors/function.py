"""Features by a user's own callable, named `module:attribute`."""

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, final

import torch
from torch import Tensor

from sana_lab.config import digests, guests
from sana_lab.config.ranges import Count
from sana_lab.config.specs import RUNTIME, SpecError
from sana_lab.environment import place
from sana_lab.evaluation import Extractor
from sana_lab.evaluation.extractors.resize import check
from sana_lab.types import Json


@final
class Function(Extractor):
    """Features (B, D) from a callable of uint8 images (B, 3, H, W), which must resize them itself if needed.

    It is identified by its name and the SHA-256 of its module's file, not by other files that it reads.
    """

    def __init__(
        self,
        function: str,  # module:attribute of the callable
        dim: Count | None = None,  # number of features D; None calls it once on a black image of 64 x 64
        version: str = "",  # of weights that it reads from elsewhere; part of its identity
        device: Annotated[str, RUNTIME] = "auto",  # where images are: auto, cpu, cuda, cuda:1 ...
    ) -> None:
        self.name, self.version, self.device = function, version, place(device)
        self.function = _import(function)
        self.source = inspect.getsourcefile(inspect.getmodule(self.function) or importlib)
        self.dim = dim or self._call(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape[1]

    def features(self, images: Tensor) -> Tensor:
        """(B, D) float32. ValueError for another shape."""
        features = self._call(images)
        if features.shape != (len(images), self.dim):
            expected = f"expected ({len(images)}, {self.dim})"
            raise ValueError(f"{self.name} gave {tuple(features.shape)} for {len(images)} images, {expected}")
        return features

    def identity(self) -> Json:
        return {
            "extractor": self.name.rpartition(":")[2].lower(),
            "function": self.name,
            "weights_sha256": digests.sha256(Path(self.source)) if self.source else None,
            "version": self.version,
            "resize": "none",
            "dtype": "float32",
        }

    @torch.no_grad()
    def _call(self, images: Tensor) -> Tensor:
        check(images)
        features = self.function(images.to(self.device))
        if not isinstance(features, Tensor) or features.ndim != 2:
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"{self.name} gave {shape}, expected a tensor (B, D)")
        return features.float()


def _import(name: str) -> Callable[[Tensor], Any]:
    if ":" not in name:
        raise SpecError(f"function is {name!r}, expected module:attribute")
    try:
        target = guests.load(name, "function")
    except ImportError as error:
        raise SpecError(f"{name!r} cannot be imported ({error}); expected module:attribute") from error
    if not callable(target) or isinstance(target, type):
        raise SpecError(f"{name!r} is a {type(target).__name__}, expected a function of images")
    return target
