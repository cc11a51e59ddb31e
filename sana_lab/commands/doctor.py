"""Command `sana-lab doctor`: versions, devices, Triton, the store, the disk, and what optional packages would add."""

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

from sana_lab import environment
from sana_lab.commands.listing import HOME, runs
from sana_lab.tracking.store import Store

NEEDED = ("torch", "torchvision", "lightning", "transformers", "mlflow", "safetensors", "pydantic", "omegaconf")

OPTIONAL = {
    "diffusers": 'parity with diffusers, `bench` of its pipelines: pip install "sana_lab[diffusers]"',
    "torchao": 'sampling.quantize=int8 and w8a8: pip install "sana_lab[quantize]"',
    "peft": 'system.adapter=lora: pip install "sana_lab[lora]"',
    "optuna": '`search:` of an ablation: pip install "sana_lab[search]"',
    "pyarrow": 'data in Parquet files: pip install "sana_lab[parquet]"',
    "ray": 'executor ray: pip install "sana_lab[ray]"',
    "submitit": 'executor slurm: pip install "sana_lab[slurm]"',
    "tensorboard": "trainer.logger=tensorboard: pip install tensorboard",
    "wandb": "trainer.logger=wandb: pip install wandb",
}
"""Package -> what it would add, and how to install it."""

LEAST_GB = 5
"""Free disk below which a sweep may run out of space."""


def main() -> int:
    """Print a line for each thing, those that need care marked `!`; exit status 1 if one does."""
    lines = [*_versions(), *_devices(), *_store(), *_disk(), *_optional()]
    for good, topic, words in lines:
        print(f"{' ' if good else '!'} {topic:<13} {words}")
    return 0 if all(good for good, *_ in lines) else 1


Line = tuple[bool, str, str]


def _versions() -> Iterator[Line]:
    yield True, "sana_lab", f"{version('sana_lab') or 'source without installation'}, {Path(__file__).parents[1]}"
    yield True, "Python", f"{platform.python_version()} on {platform.platform()}"
    for name in NEEDED:
        installed = version(name)
        yield installed is not None, name, installed or "missing: pip install sana_lab"


def version(package: str) -> str | None:
    """The version of an installed package; None if missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> Iterator[Line]:
    import torch

    cores, threads = environment.cores(), torch.get_num_threads()
    yield True, "CPU", f"{cores} cores, {threads} threads, {torch.backends.cpu.get_cpu_capability()}"
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    words = ", ".join(f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB)" for gpu in gpus)
    yield True, "GPU", words or "none: everything runs on the CPU; the paper's model sizes are too slow to train there"
    triton = version("triton")
    kernels = "kernels are used on the GPU" if triton and gpus else "kernels need a GPU; plain torch is used"
    yield bool(triton or not gpus), "triton", f"{triton or 'missing'}: {kernels}"


def _store() -> Iterator[Line]:
    try:
        store = Store(HOME)
    except ValueError as error:  # of a variable that names no store
        yield False, "runs", str(error)
        return
    writable = os.access(HOME if HOME.is_dir() else HOME.absolute().parent, os.W_OK)
    place = store.server or (store.database if not store.moves else HOME.absolute())
    if store.is_empty():
        yield writable, "runs", f"{place}: none yet"
        return
    try:
        yield writable, "runs", f"{place}: {len(runs())} runs"
    except Exception as error:  # a damaged or foreign database, by whatever name sqlite gives it; a lost server
        yield False, "runs", f"{store.server or store.database} cannot be read: {error}"


def _disk() -> Iterator[Line]:
    place = HOME if HOME.is_dir() else Path()
    free = shutil.disk_usage(place).free / 1e9
    yield free >= LEAST_GB, "disk", f"{free:.0f} GB free at {place.absolute()}"


def _optional() -> Iterator[Line]:
    for name, words in OPTIONAL.items():
        installed = version(name)
        yield True, name, installed or f"not installed; would add {words}"
