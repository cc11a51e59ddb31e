"""Random weights and small or synthetic data, so that the cost of a step can be measured without training or data."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from PIL import Image
from safetensors.torch import save_file

from sana_lab.checkpoints.build import build, without_weights
from sana_lab.config import schema, specs
from sana_lab.models.text.configs import CONFIGS

BATCHES = 4
"""Batches of cached latents, or of synthetic images."""

CAPTION = "a photo of a small red circle to the left of two large blue squares on a wooden table"


def untrained_system(experiment: schema.Config) -> Any:
    """The experiment's system before training, with frozen parts initialised at random; no weights are read."""
    return build("system", random_weights(experiment["system"]))


def random_weights(spec: schema.Config) -> schema.Config:
    """The spec without weights; text encoders of a known shape are initialised at random."""
    return _with_random_text(without_weights(spec))


def _with_random_text(spec: schema.Config) -> schema.Config:
    if spec.get("name") == "llm" and spec.get("model") in CONFIGS and "random_init" in spec:
        return {**spec, "random_init": True}
    return {k: _with_random_text(v) if isinstance(v, dict) else v for k, v in spec.items()}


def small_data(experiment: schema.Config, folder: Path) -> tuple[L.LightningDataModule, list[str]]:
    """The experiment's data reduced to a few batches, with caches in `folder`; and notes on replaced data."""
    spec, notes = _small(experiment["data"], experiment, folder, int(experiment["data"]["batch"]))
    return specs.build("data", spec), notes


def _small(spec: schema.Config, experiment: schema.Config, folder: Path, batch: int) -> tuple[schema.Config, list[str]]:
    if spec["name"] == "folder":
        return _images(spec, folder, batch)
    if "source" not in spec:
        return {**spec, **({"held_out": 1} if "held_out" in spec else {})}, []
    source, notes = _small(spec["source"], experiment, folder, batch)
    small = {**spec, "source": source, "cache": str(folder / spec["name"])}
    if "items" in spec:
        small["items"] = min(spec["items"] or BATCHES * batch, BATCHES * batch)
        notes = [*notes, f"data: {small['items']} images, encoded by an untrained autoencoder"]
    for kind in ("autoencoder", "text_encoder"):
        if kind in spec:
            small[kind] = _with_weights_file(kind, random_weights(spec[kind]), folder)
    return small, notes


def _with_weights_file(kind: str, spec: schema.Config, folder: Path) -> schema.Config:
    """The spec of a text encoder with its random weights in a file, as cached data require; other specs unchanged."""
    part = build(kind, spec)
    if kind == "autoencoder" or part.pretrained:
        return spec
    path = folder / f"{kind}.safetensors"
    save_file({k: v.contiguous().clone() for k, v in part.state_dict().items()}, path)
    return {**spec, "weights": str(path)}


def _images(spec: schema.Config, folder: Path, batch: int) -> tuple[schema.Config, list[str]]:
    """The spec of a folder of images; if it does not exist, of a folder of smooth random images."""
    if Path(spec["root"]).expanduser().is_dir():
        return spec, []
    root = folder / "images"
    root.mkdir()
    random = torch.Generator().manual_seed(0)
    for i in range(BATCHES * min(batch, 16)):
        coarse = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8, generator=random)
        size = (spec["size"], spec["size"])
        Image.fromarray(coarse.numpy()).resize(size, Image.Resampling.BICUBIC).save(root / f"{i}.jpg")
        (root / f"{i}.txt").write_text(CAPTION)
    return {**spec, "root": str(root)}, [f"data: {spec['root']} does not exist; replaced by random images"]
