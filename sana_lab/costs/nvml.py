"""Energy, power limit, clocks and driver version of an NVIDIA GPU, through NVML (optional package `nvidia-ml-py`)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from sana_lab.types import Json


class NvmlDevice:
    """One GPU in NVML; values that it does not support are None."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self.nvml, self.handle = nvml, handle

    def joules(self) -> float | None:
        """Energy used since the driver was loaded; the counter is updated some ten times a second."""
        millijoules = self._query(lambda: self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle))
        return None if millijoules is None else millijoules / 1e3

    def facts(self) -> Json:
        """Driver version, power limit in watts, current and maximum clocks in MHz."""
        nvml, handle = self.nvml, self.handle
        kinds = {"sm": nvml.NVML_CLOCK_SM, "memory": nvml.NVML_CLOCK_MEM}
        limit = self._query(lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle))
        return {
            "driver": self._query(nvml.nvmlSystemGetDriverVersion),
            "power_limit_w": None if limit is None else limit / 1e3,
            "clocks_mhz": self._clocks(nvml.nvmlDeviceGetClockInfo, kinds),
            "max_clocks_mhz": self._clocks(nvml.nvmlDeviceGetMaxClockInfo, kinds),
        }

    def _clocks(self, query: Callable[[Any, int], int], kinds: dict[str, int]) -> dict[str, int | None]:
        return {name: self._query(partial(query, self.handle, kind)) for name, kind in kinds.items()}

    def _query(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except self.nvml.NVMLError:
            return None


def find_device(device: torch.device) -> tuple[NvmlDevice | None, str]:
    """The NVML device of a torch device and "", or None and the reason why there is none."""
    if device.type != "cuda":
        return None, f"a {device.type} device has no supported energy counter"
    try:
        import pynvml
    except ImportError:
        return None, "nvidia-ml-py is not installed (pip install nvidia-ml-py)"
    return connect(pynvml, str(torch.cuda.get_device_properties(device).uuid))


def connect(nvml: Any, uuid: str) -> tuple[NvmlDevice | None, str]:
    """The GPU with that UUID; indices are ambiguous, because CUDA's order and visibility differ from the driver's."""
    try:
        nvml.nvmlInit()
        return NvmlDevice(nvml, nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}")), ""
    except nvml.NVMLError as error:
        return None, f"NVML error: {error}"
