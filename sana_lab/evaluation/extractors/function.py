"""Features of one's own: any callable, named `module:attribute`."""

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, final

import torch
from torch import Tensor

from sana_lab.config.digests import sha256
from sana_lab.config.specs import RUNTIME, SpecError, nearest
from sana_lab.environment import place
from sana_lab.evaluation import Extractor
from sana_lab.evaluation.extractors.resize import check
from sana_lab.types import Json


@final
class Function(Extractor):
    """What `function` makes of uint8 images (B, 3, H, W): (B, D), resized in there if at all.

    Without `dim` it is asked once, with a black picture of 64 pixels a side. It is known by its name and its module's
    file; weights that it reads from elsewhere are its own to vouch for: give `version` another value where they change.
    """

    def __init__(
        self, function: str, dim: int | None = None, version: str = "", device: Annotated[str, RUNTIME] = "auto"
    ) -> None:
        self.name, self.version, self.device = function, version, place(device)
        self.function = _find(function)
        self.source = inspect.getsourcefile(inspect.getmodule(self.function) or importlib)
        self.dim = dim or self._called(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape[1]

    def features(self, images: Tensor) -> Tensor:
        """ValueError where the callable gives another shape."""
        found = self._called(images)
        if found.shape != (len(images), self.dim):
            expected = f"expected ({len(images)}, {self.dim})"
            raise ValueError(f"{self.name} gave {tuple(found.shape)} for {len(images)} images, {expected}")
        return found

    def identity(self) -> Json:
        return {
            "extractor": self.name.rpartition(":")[2].lower(),
            "function": self.name,
            "weights_sha256": sha256(Path(self.source)) if self.source else None,
            "version": self.version,
            "resize": "none",
            "dtype": "float32",
        }

    @torch.no_grad()
    def _called(self, images: Tensor) -> Tensor:
        check(images)
        found = self.function(images.to(self.device))
        if not isinstance(found, Tensor) or found.ndim != 2:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"{self.name} gave {shape}, expected a tensor (B, D)")
        return found.float()


def _find(name: str) -> Callable[[Tensor], Any]:
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, ValueError) as error:
        raise SpecError(f"{name!r} cannot be imported ({error}); expected module:attribute") from error
    except AttributeError as error:
        near = nearest(attribute, vars(importlib.import_module(module)))
        raise SpecError(f"module {module!r} has no {attribute!r}; {near}") from error
    if not callable(found) or isinstance(found, type):
        raise SpecError(f"{name!r} is a {type(found).__name__}, expected something to call with images")
    return found
