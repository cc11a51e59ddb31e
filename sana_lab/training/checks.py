"""What an experiment can get wrong, found before any work: ranges, parts, sizes, and weights that do not fit."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sana_lab.checkpoints import files, formats, hub, weights
from sana_lab.config import experiments, limits, schema, specs
from sana_lab.config.registry import WEIGHTED
from sana_lab.config.specs import SpecError
from sana_lab.diffusion.flow import Flow
from sana_lab.diffusion.sampling import Sampling
from sana_lab.ops import backend
from sana_lab.systems import System, compile, quantize

ALONE = ("autoencoder", "text_encoder")
"""Kinds of parts that can be built without another one to tell them sizes."""

SIZES = {"dim", "depth", "patch", "widths", "latent"}
"""Options that the shapes of released weights settle."""


def check(experiment: schema.Config) -> None:
    """Build everything on the meta device, so that what cannot work is said before any work. SpecError, ImportError."""
    quantize.check(experiment["sampling"]["quantize"])
    limits.check_trainer(experiment["trainer"])
    limits.check_evaluation(experiment["eval"])
    accelerator(experiment["trainer"]["accelerator"])
    experiments.needed(experiment)
    try:
        with torch.device("meta"):
            system: System = specs.build("system", experiment["system"])
            system.check()
            used = system.configure_optimizers()
        Sampling(**experiment["sampling"]).network_times(system.flow or Flow())
    except ValueError as error:  # ours or torch's: what a part says of its options
        raise SpecError(str(error)) from error
    how(experiment["trainer"], system, used)
    if system.part("autoencoder") is not None:
        sizes(experiment, system)
    for kind, part in loaded(experiment, system):
        fits(part, part.spec["weights"], kind)


def accelerator(name: str) -> None:
    """SpecError where this machine has none of that kind."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(name, name != "gpu" or any(there.values())):
        raise SpecError(f"trainer.accelerator is {name!r}, which this machine does not have; expected auto or cpu")


def how(options: schema.Config, system: System, used: Any) -> None:
    """SpecError for ways to train that cannot be had together, or not on this machine."""
    cuda = torch.cuda.is_available() and options["accelerator"] != "cpu"
    kernels(torch.device("cuda" if cuda else "cpu"), system)
    if options["compile"]:
        compile.check(system, "cuda" if cuda else "cpu")
    groups = [g for o in (used if isinstance(used, list) else [used]) for g in o.param_groups]
    if options["precision"] == "16-mixed" and options["gradient_clip"] and any(g.get("fused") for g in groups):
        raise SpecError(
            "a fused optimizer unscales the gradients of precision 16-mixed itself, after they were to be clipped; "
            "expected system.optimizer.fused null, precision bf16-mixed, or trainer.gradient_clip 0"
        )


def kernels(device: torch.device, system: nn.Module) -> None:
    """SpecError where a part insists on Triton's kernels and they cannot run: `auto` would take what can."""
    for name, module in system.named_modules():
        if getattr(module, "backend", None) == "triton" and (missing := backend.missing_for(device)):
            raise SpecError(f"{name} has backend 'triton', which needs {missing}; expected auto or torch")


def sizes(experiment: schema.Config, system: System) -> None:
    """SpecError where the pictures of training, or those that costs are measured on, do not divide."""
    dit, downsample = system.part("dit"), system.part("autoencoder").downsample
    patch = 1 if dit is None else dit.patch
    divides(experiments.image_size(experiment["data"]), downsample, patch)
    if dit is not None and experiment["eval"]["bench_size"]:
        divides(experiment["eval"]["bench_size"], downsample, patch, "eval.bench_size")


def divides(size: int, downsample: int, patch: int, what: str = "data.size") -> None:
    """SpecError where images of that size do not make whole latents and patches."""
    unit = downsample * patch
    if size % unit:
        near = max(1, round(size / unit)) * unit
        raise SpecError(
            f"{what} {size} is not a multiple of {unit} (autoencoder {downsample} x patch {patch}); "
            f"the nearest is {near}"
        )


def loaded(experiment: schema.Config, system: System) -> Iterator[tuple[str, Any]]:
    """(kind, part on the meta device) of every part of system and data whose spec says `weights`."""
    parts = {kind: part for kind in WEIGHTED if (part := system.part(kind)) is not None}
    yield from ((kind, part) for kind, part in parts.items() if part.spec.get("weights"))
    absent = {k: v for k, v in experiment["system"].items() if k not in parts}
    for kind, spec in (*_specs(absent), *_specs(experiment["data"])):
        if spec.get("weights"):
            with torch.device("meta"):
                yield kind, specs.build(kind, spec)


def _specs(value: schema.Config) -> Iterator[tuple[str, schema.Config]]:
    inner = [(k, v) for k, v in value.items() if isinstance(v, dict)]
    yield from ((k, v) for k, v in inner if k in ALONE)
    for _, v in inner:
        yield from _specs(v)


def fits(part: nn.Module, reference: str, kind: str) -> None:
    """SpecError where a file or folder of weights is not there, or holds other shapes; only its header is read.

    What an experiment is still to train, and what a hub holds, cannot be looked at yet.
    """
    if reference.startswith("experiment:"):
        path = left_by(reference.removeprefix("experiment:"))
    elif formats.is_released(reference):
        released(part, reference, kind)
        return
    else:
        path = weights.find(reference)
    if path is not None:
        weights.load_state(part, files.read_header(path), f"{kind}.", reference)  # both on the meta device


def left_by(name: str) -> Path | None:
    """The weights that an experiment has left, if any; where its data are not here it cannot be known."""
    experiment = experiments.load(name)
    try:
        return weights.ready(experiment)
    except ValueError:
        return None


def released(part: Any, reference: str, kind: str) -> None:
    """The same of other people's formats; hub ids are looked up when they are needed."""
    if Path(reference).expanduser().exists() or not hub.is_hub_id(reference):
        other = formats.recognise(hub.locate(reference), kind, like=part.spec)
        formats.check_kind(kind, other, reference)
        for key in SIZES & other.spec.keys() & part.spec.keys():
            if other.spec[key] != part.spec[key]:
                raise SpecError(
                    f"{reference!r} has {key} {other.spec[key]!r}, and the spec of the {kind} says {part.spec[key]!r}"
                )
        formats.check_agree(part.spec, other)
