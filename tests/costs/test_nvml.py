"""What NVML says, through a stand-in with its functions' names: no machine that runs tests has a GPU."""

import sys
from types import SimpleNamespace

import pytest
import torch

from sana_lab.costs.nvml import connect, find_device


class Refused(Exception):
    """As pynvml's NVMLError."""


def nvml(**changes):
    """A card with a counter of 1.5 kJ; `changes` replace functions."""
    clocks = {0: 1700, 2: 2600}
    functions = {
        "NVMLError": Refused,
        "NVML_CLOCK_SM": 0,
        "NVML_CLOCK_MEM": 2,
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
        "nvmlSystemGetDriverVersion": lambda: "580.1",
        "nvmlDeviceGetEnforcedPowerLimit": lambda handle: 700_000,
        "nvmlDeviceGetClockInfo": lambda handle, kind: clocks[kind] - 100,
        "nvmlDeviceGetMaxClockInfo": lambda handle, kind: clocks[kind],
        "nvmlDeviceGetTotalEnergyConsumption": lambda handle: 1_500_000,
    }
    return SimpleNamespace(**{**functions, **changes})


def refuse(*_):
    raise Refused("Not Supported")


def test_facts_and_energy_in_units():
    found, why = connect(nvml(), "GPU-1f")
    assert why == ""
    assert found.handle == "GPU-1f"
    assert found.joules() == 1500
    assert found.facts() == {
        "driver": "580.1",
        "power_limit_w": 700,
        "clocks_mhz": {"sm": 1600, "memory": 2500},
        "max_clocks_mhz": {"sm": 1700, "memory": 2600},
    }


def test_a_card_is_found_by_its_identifier_in_the_drivers_form():
    assert connect(nvml(), "1f")[0].handle == "GPU-1f"


def test_what_a_card_does_not_tell_is_none():
    """As on a slice of a card, which has neither counter nor clocks of its own."""
    found, _ = connect(nvml(nvmlDeviceGetTotalEnergyConsumption=refuse, nvmlDeviceGetClockInfo=refuse), "1f")
    assert found.joules() is None
    assert found.facts()["clocks_mhz"] == {"sm": None, "memory": None}
    assert found.facts()["power_limit_w"] == 700


@pytest.mark.parametrize("missing", ["nvmlInit", "nvmlDeviceGetHandleByUUID"])
def test_a_driver_that_refuses_is_said_so(missing):
    assert connect(nvml(**{missing: refuse}), "1f") == (None, "NVML error: Not Supported")


def test_a_device_without_a_counter_and_a_machine_without_the_package(monkeypatch):
    assert find_device(torch.device("cpu")) == (None, "a cpu device has no supported energy counter")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pip install nvidia-ml-py" in find_device(torch.device("cuda"))[1]
