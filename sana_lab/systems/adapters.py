"""The interface of adapters (`system.adapter`), small modules that train in place of a DiT's weights."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn

Factors = dict[str, tuple[Tensor, Tensor]]
"""Name of a layer -> down (rank, in) and up (out, rank), which holds the scale: its weight grows by up @ down."""


class Adapter(ABC):
    """Modules beside layers of a DiT, which alone train. Weights files hold the DiT with the adapter merged into it."""

    @abstractmethod
    def check(self, dit: nn.Module) -> None:
        """SpecError for a DiT that it does not fit; ImportError for a missing extra."""

    @abstractmethod
    def inject(self, dit: nn.Module) -> None:
        """Put the adapter's modules into a DiT, and let only them train."""

    @abstractmethod
    def injected(self, dit: nn.Module) -> bool:
        """Whether a DiT has the adapter's modules."""

    @abstractmethod
    def merged(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict with the adapter's tensors merged into those of the plain DiT, under its names."""

    @abstractmethod
    def factors(self, state: Mapping[str, Tensor]) -> Factors:
        """The low-rank change of each layer of a state dict, as files of adapters hold it; {} for other adapters."""
