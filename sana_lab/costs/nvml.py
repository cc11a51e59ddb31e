"""What a GPU's driver says of it: energy, power limit, clocks and version; through NVML, if `nvidia-ml-py` is there."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from sana_lab.types import Json


class Driver:
    """One GPU as NVML knows it; what it does not tell is None."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self.nvml, self.handle = nvml, handle

    def joules(self) -> float | None:
        """All energy since the driver was loaded; the counter moves some ten times a second."""
        found = self._ask(lambda: self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle))
        return None if found is None else found / 1e3

    def facts(self) -> Json:
        """Power limit in watts, clocks in MHz as they are now and at most, and the driver's version."""
        nvml, handle = self.nvml, self.handle
        kinds = {"sm": nvml.NVML_CLOCK_SM, "memory": nvml.NVML_CLOCK_MEM}
        limit = self._ask(lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle))
        return {
            "driver": self._ask(nvml.nvmlSystemGetDriverVersion),
            "power_limit_w": None if limit is None else limit / 1e3,
            "clocks_mhz": self._clocks(nvml.nvmlDeviceGetClockInfo, kinds),
            "max_clocks_mhz": self._clocks(nvml.nvmlDeviceGetMaxClockInfo, kinds),
        }

    def _clocks(self, ask: Callable[[Any, int], int], kinds: dict[str, int]) -> dict[str, int | None]:
        return {name: self._ask(partial(ask, self.handle, kind)) for name, kind in kinds.items()}

    def _ask(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except self.nvml.NVMLError:
            return None


def find(device: torch.device) -> tuple[Driver | None, str]:
    """The driver of a device, or None and why there is none."""
    if device.type != "cuda":
        return None, f"a {device.type} device has no energy counter that is read here"
    try:
        import pynvml
    except ImportError:
        return None, "nvidia-ml-py is not installed (pip install nvidia-ml-py)"
    return connect(pynvml, str(torch.cuda.get_device_properties(device).uuid))


def connect(nvml: Any, uuid: str) -> tuple[Driver | None, str]:
    """The GPU of that identifier: an index would not do, as CUDA's order and visibility are not the driver's."""
    try:
        nvml.nvmlInit()
        return Driver(nvml, nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}")), ""
    except nvml.NVMLError as error:
        return None, f"NVML says: {error}"
