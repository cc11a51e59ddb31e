"""Processes of a training by other launchers than the lab's, and devices that a machine does not have."""

import subprocess
import sys
from pathlib import Path

import pytest
import two_processes
from safetensors.torch import load_file

from sana_lab.config import experiments
from sana_lab.config.validation import SpecError
from sana_lab.training import ranks, train

SCRIPT = """
import sys

import lightning as L
from safetensors.torch import save_file

from sana_lab.config import experiments, specs

if __name__ == "__main__":
    devices, strategy, file = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    experiment = experiments.load("cached")
    L.seed_everything(0, verbose=False)
    system, data = specs.build("system", experiment["system"]), specs.build("data", experiment["data"])
    trainer = L.Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, max_steps=4, max_epochs=-1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, num_sanity_val_steps=0,
    )
    trainer.fit(system, datamodule=data)
    if trainer.is_global_zero:
        save_file(system.trained(), file)
"""


@pytest.mark.slow
def test_a_trainer_of_ones_own_starts_processes_by_lightnings_launcher(here: Path):
    two_processes.write(here)
    (here / "own.py").write_text(SCRIPT)
    for devices, strategy, name in (("1", "auto", "one"), ("2", "ddp", "two")):
        command = [sys.executable, "own.py", devices, strategy, f"{name}.safetensors"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
    one, two = (load_file(here / f"{name}.safetensors") for name in ("one", "two"))
    assert two_processes.largest_difference(one, two) < 1e-4


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two GPUs, as far as `ranks` asks for them."""
    monkeypatch.setattr(ranks, "_present", lambda accelerator: (2, "GPUs"))


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ("8", "trainer.devices is 8, and this machine has 2 GPUs; expected at most 2"),
        ("0,3", "trainer.devices names device 3, and this machine has 2 GPUs; expected numbers from 0 to 1"),
    ],
)
def test_more_devices_than_there_are_is_an_error_before_any_work(here: Path, gpus: None, devices: str, message: str):
    two_processes.write(here)
    experiment = experiments.load("tiny", [f"trainer.devices='{devices}'", "trainer.accelerator=auto"])
    with pytest.raises(SpecError, match=message):
        train.train(experiment)
    assert not (here / "runs").exists()


def test_the_devices_that_there_are_do(gpus: None):
    for devices in ("auto", 1, 2, "2", "1,", "0,1"):
        ranks.check_available({"devices": devices, "accelerator": "auto"})


def test_torchrun_with_more_processes_than_devices(gpus: None, monkeypatch: pytest.MonkeyPatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SpecError, match="torchrun started 8 processes here, and this machine has 2 GPUs"):
        ranks.check_available({"devices": "auto", "accelerator": "gpu"})


def test_on_a_cpu_there_are_as_many_as_cores(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    ranks.check_available({"devices": 4, "accelerator": "cpu"})
    with pytest.raises(SpecError, match=r"trainer\.devices is 5, and this machine has 4 CPU cores; expected at most 4"):
        ranks.check_available({"devices": 5, "accelerator": "cpu"})
