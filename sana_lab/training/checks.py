"""Checks of an experiment before its first step: ranges, parts, sizes, and weights that do not fit."""

import platform
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sana_lab.checkpoints import files, formats, hub, weights
from sana_lab.checkpoints.build import build_on_meta, with_weights
from sana_lab.checkpoints.meta import on_meta
from sana_lab.config import experiments, limits, schema, specs
from sana_lab.config.memo import reuse
from sana_lab.config.registry import WEIGHTED
from sana_lab.config.specs import SpecError
from sana_lab.costs import too_large
from sana_lab.data.bucketed import Bucketed
from sana_lab.data.buckets import Shape, shapes
from sana_lab.diffusion import guidance
from sana_lab.diffusion.flow import Flow
from sana_lab.diffusion.sampling import Sampling
from sana_lab.models.attention import Mixer, lacks_backward
from sana_lab.models.autoencoders.discriminator import LEAST_SIZE
from sana_lab.ops import backend
from sana_lab.systems import System, compile, quantize
from sana_lab.training import loggers, parent, ranks, strategies, teachers

STANDALONE = ("autoencoder", "text_encoder")
"""Kinds of parts that are built without sizes of another part."""

SHAPE_OPTIONS = {"dim", "depth", "patch", "widths", "latent"}
"""Options that are determined by the shapes of released weights."""


def check(experiment: schema.Config, elsewhere: int | None = None) -> System:
    """Build everything on the meta device to find errors before training; the system there.

    `elsewhere` is the number of devices of another machine that trains, where `check_here` checks what it has; None is
    this machine. SpecError, ImportError for missing extras.
    """
    quantize.check(experiment["sampling"]["quantize"], here=elsewhere is None)
    limits.check_trainer(experiment["trainer"])
    loggers.check(experiment["trainer"]["logger"])
    limits.check_evaluation(experiment["eval"])
    if elsewhere is None:
        check_accelerator(experiment["trainer"]["accelerator"])
    experiments.prerequisites(experiment)
    try:
        system, optimizers = reuse(("on meta", experiment["system"]), lambda: system_on_meta(experiment["system"]))
        flow, sampling = system.flow or Flow(), experiment["sampling"]
        times = reuse(("times", id(system), sampling), lambda: Sampling(**sampling).network_times(flow))
        if (dit := system.part("dit")) is not None:
            guidance.check_times(dit, times)
    except ValueError as error:  # the lab's or torch's, of an option of a part
        raise SpecError(str(error)) from error
    check_trainer(experiment["trainer"], system, optimizers)
    check_points(experiment, system)
    check_prompts(experiment["prompts"], system)
    count = ranks.count(experiment, elsewhere)
    strategies.check(experiment, system, count)
    if elsewhere is None:
        check_machine(experiment, system, count)
    check_budget(experiment, system)
    if system.part("autoencoder") is not None or system.part("dit") is not None:
        check_sizes(experiment, system)
    system.check_sampling(experiment)
    check_guests(experiment, system)
    for kind, part in parts_with_weights(experiment, system):
        check_weights(part, part.spec["weights"], kind)
    parent.check(system, experiment)
    check_adapter(experiment, system)
    check_frozen(experiment, system)
    if (methods := system.part("methods")) is not None and methods.specs:
        check_methods(experiment, system, methods)
    return system


def check_guests(experiment: schema.Config, system: System) -> None:
    """SpecError if a part of the user's own breaks a rule of its kind."""
    from sana_lab.contracts import preflight  # here, as it knows every kind of part

    preflight.check_guests(experiment, system)


def check_here(experiment: schema.Config) -> None:
    """What depends on this machine, of an experiment that another one has checked. SpecError, ValueError."""
    quantize.check(experiment["sampling"]["quantize"])
    check_accelerator(experiment["trainer"]["accelerator"])
    system, _ = system_on_meta(experiment["system"])
    count = ranks.count(experiment)
    strategies.check(experiment, system, count)
    check_machine(experiment, system, count)


def check_machine(experiment: schema.Config, system: System, devices: int) -> None:
    """SpecError for what the devices, the compiler or the memory of this machine cannot do."""
    options = experiment["trainer"]
    cuda = reuse(("cuda",), torch.cuda.is_available) and options["accelerator"] != "cpu"
    check_kernels(torch.device("cuda" if cuda else "cpu"), system)
    if options["compile"]:
        compile.check_compiler("cuda" if cuda else "cpu")
    too_large.check_experiment(experiment, devices)


def check_adapter(experiment: schema.Config, system: System) -> None:
    """SpecError for an adapter beside a DiT of random weights, or with a text encoder that is told to train."""
    if system.adapter is None:
        return
    if experiment["parent"]["weights"] is None and not experiment["system"]["dit"].get("weights"):
        raise SpecError(
            "system.adapter trains beside a DiT that stays as it is, and this one has no weights; expected "
            "parent.weights, or system.dit.weights"
        )
    if experiment["trainer"]["strategy"] == "fsdp2":
        raise SpecError("trainer.strategy is 'fsdp2', and adapters are not sharded; expected ddp")
    if experiment["system"].get("train_text"):
        raise SpecError("system.train_text is true, and system.adapter trains alone; expected null")


def check_frozen(experiment: schema.Config, system: System) -> None:
    """SpecError for a DiT, or an encoder inside the text encoder, that keeps random weights."""
    options, text = experiment["system"], system.part("text_encoder")
    if options.get("train_dit") is False and not (options["dit"].get("weights") or experiment["parent"]["weights"]):
        raise SpecError(
            "system.train_dit is false, and the DiT has no weights; expected system.dit: experiment:NAME, or "
            "parent.weights"
        )
    for name in getattr(text, "frozen", ()):
        inner = text.get_submodule(name)
        if not (inner.pretrained or "weights" in inner.spec):
            raise SpecError(
                f"system.text_encoder.{name} {inner.spec['name']!r} is frozen and has not learned anything yet; "
                "expected experiment:NAME, its `model` or `weights`, or train_encoder: true"
            )


def check_methods(experiment: schema.Config, system: System, methods: Any) -> None:
    """SpecError if a training method does not fit the model; teachers that are trained first are left out."""
    teachers.check(experiment)
    data = experiments.source_of(experiment["data"])
    missing = [name for name in experiments.referenced(methods.specs) if parent.trained_weights(name) is None]
    methods.specs = [spec for spec in methods.specs if not {*experiments.referenced(spec)} & {*missing}]
    try:
        with on_meta():
            batch, images = experiment["data"].get("batch"), gives_images(experiment["data"])
            system.build_methods(int(data["size"]), batch, images, buckets=bucket_shapes(experiment["data"]))
            system.configure_optimizers()
    except (ValueError, OSError) as error:
        raise SpecError(str(error)) from error
    for method in methods:
        method.check_sampling(experiment["sampling"])
    changing = [method.name for method in methods if method.changes_forward]
    if changing and experiment["trainer"]["compile"]:
        raise SpecError(
            f"method {changing[0]!r} changes the forward pass of blocks, and trainer.compile is true; expected false"
        )


def gives_images(data: schema.Config) -> bool:
    """Whether batches of a data spec hold images: of caches, if `latents` has `images`."""
    return "source" not in data or (data.get("images", True) and gives_images(data["source"]))


def bucket_shapes(data: schema.Config) -> list[Shape]:
    """Shapes of the images of batches in aspect-ratio buckets of a data spec; [] if all are squares. ValueError."""
    target, source = specs.find("data", data["name"]), experiments.source_of(data)
    bucketed = isinstance(target, type) and issubclass(target, Bucketed) and source.get("buckets", "none") != "none"
    return shapes(source["size"], source["multiple"]) if bucketed else []


def system_on_meta(spec: schema.Config) -> tuple[System, Any]:
    """A system and its optimisers, checked, without memory."""
    with on_meta():
        system: System = specs.build("system", spec)
        system.check()
        too_large.check_parameters(system)
        check_mixers(system)
        return system, system.configure_optimizers()


def check_budget(experiment: schema.Config, system: System) -> None:
    """SpecError for a training within a time of a system whose rate follows steps alone."""
    if (seconds := experiment["trainer"]["max_seconds"]) is None:
        return
    if getattr(system, "schedule", "constant") != "constant" and not system.decays_by_time:
        raise SpecError(
            f"trainer.max_seconds is {seconds:g}, and system.schedule {system.schedule!r} follows the number of steps; "
            "expected constant"
        )


def check_objective(experiment: schema.Config) -> None:
    """SpecError for steps of training of a DiT that reads guidance, which no objective of the lab teaches."""
    dit, steps = experiment["system"].get("dit"), experiment["trainer"]["max_steps"]
    if isinstance(dit, dict) and dit.get("guidance") is not None and steps:
        raise SpecError(
            f"system.dit.guidance is {dit['guidance']:g}, of a DiT distilled with guidance, and no objective here "
            f"distils; expected trainer.max_steps=0, which takes its weights as they are, not {steps}"
        )


def check_accelerator(name: str) -> None:
    """SpecError if this machine has no such accelerator."""
    available = {"cuda": reuse(("cuda",), torch.cuda.is_available), "mps": torch.backends.mps.is_available()}
    if not available.get(name, name != "gpu" or any(available.values())):
        raise SpecError(f"trainer.accelerator is {name!r}, which this machine does not have; expected auto or cpu")


def check_trainer(options: schema.Config, system: System, optimizers: Any) -> None:
    """SpecError for trainer options that exclude each other."""
    if options["compile"]:
        compile.check(system)
    groups = [g for o in (optimizers if isinstance(optimizers, list) else [optimizers]) for g in o.param_groups]
    if options["accumulate"] > 1 and not system.automatic_optimization:
        raise SpecError(
            f"trainer.accumulate is {options['accumulate']}, and this system (an autoencoder with adversarial loss) "
            "steps its optimisers by hand at every batch; expected 1"
        )
    if options["precision"] == "16-mixed" and not system.automatic_optimization:
        raise SpecError(
            "trainer.precision is '16-mixed', and this system (an autoencoder with adversarial loss) steps its "
            "optimisers by hand, so that scaled gradients would be clipped; expected bf16-mixed"
        )
    if options["precision"] == "16-mixed" and options["gradient_clip"] and any(g.get("fused") for g in groups):
        raise SpecError(
            "a fused optimizer unscales the gradients of precision 16-mixed itself, after they should be clipped; "
            "expected system.optimizer.fused null, precision bf16-mixed, or trainer.gradient_clip 0"
        )


def warn_slow_precision(options: schema.Config) -> None:
    """Warning where a CPU without instructions for bfloat16 is to train in it (options of `trainer:`)."""
    cuda = reuse(("cuda",), torch.cuda.is_available) and options["accelerator"] != "cpu"
    precision, x86 = options["precision"], platform.machine() in ("x86_64", "AMD64")
    slow = x86 and not cuda and precision.startswith("bf16") and not torch.cpu._is_avx512_bf16_supported()
    if slow and options["max_steps"]:
        warnings.warn(
            f"trainer.precision is {precision!r}, and this CPU has no AVX-512 BF16: products in bfloat16 are slower "
            "than in float32, without AVX-512 many times; expected trainer.precision=32-true",
            stacklevel=2,
        )


def check_points(experiment: schema.Config, system: System) -> None:
    """SpecError for points of curves that never come, or of a system that cannot be evaluated."""
    if limits.point_steps(experiment) and not system.evaluates:
        raise SpecError(f"eval.at and eval.every need an evaluation, and {type(system).__name__} has none")


def check_prompts(prompts: list[str], system: System) -> None:
    """SpecError if the text encoder reads certain prompts alone, such as classes, and one of these is none of them."""
    known = getattr(system.part("text_encoder"), "prompts", None)
    if known is not None and (unknown := [prompt for prompt in prompts if prompt and prompt not in known]):
        raise SpecError(
            f"prompts has {unknown[0]!r}, which is none of the {len(known)} that the text encoder reads; "
            f"{specs.nearest(unknown[0], known)}"
        )


def check_kernels(device: torch.device, system: nn.Module) -> None:
    """SpecError if a part has the backend triton and the device cannot run it."""
    reuse(("kernels", str(device), id(system)), lambda: _check_kernels(device, system))


def _check_kernels(device: torch.device, system: nn.Module) -> None:
    for name, module in system.named_modules():
        if getattr(module, "backend", None) == "triton" and (missing := backend.missing_for(device)):
            raise SpecError(f"{name} has backend 'triton', which needs {missing}; expected auto or torch")


def check_mixers(system: nn.Module) -> None:
    """SpecError if the mixer of a block has no backward, so that the blocks below would not train."""
    mixers = {type(m): (name, m) for name, m in system.named_modules() if isinstance(m, Mixer)}
    for name, mixer in mixers.values():
        if lacks_backward(mixer):
            part = f"{type(mixer).__module__}:{type(mixer).__qualname__}"
            raise SpecError(
                f"{name} ({part}) has no backward: no gradient reaches its input; expected differentiable operations, "
                "without torch.no_grad, detach or a kernel that registers no gradient"
            )


def check_sizes(experiment: schema.Config, system: System) -> None:
    """SpecError if the size of training images or `eval.bench_size` is not a multiple of downsampling x patch."""
    dit, autoencoder = system.part("dit"), system.part("autoencoder")
    downsample = getattr(system if autoencoder is None else autoencoder, "downsample", 1)
    patch = 1 if dit is None else dit.patch
    size, source = experiments.image_size(experiment["data"]), experiments.source_of(experiment["data"])
    check_size(size, downsample, patch)
    if source.get("buckets", "none") != "none":
        check_size(source["multiple"], downsample, patch, "`multiple` of data 'pictures',")
    if system.part("discriminator") is not None and size < LEAST_SIZE:
        raise SpecError(f"data.size {size} is too small for the discriminator; expected at least {LEAST_SIZE}")
    if dit is not None and experiment["eval"]["bench_size"]:
        check_size(experiment["eval"]["bench_size"], downsample, patch, "eval.bench_size")


def check_size(size: int, downsample: int, patch: int, option: str = "data.size") -> None:
    """SpecError if `size` pixels is not a multiple of `downsample` x `patch`."""
    unit = downsample * patch
    if size % unit:
        nearest = max(1, round(size / unit)) * unit
        raise SpecError(
            f"{option} {size} is not a multiple of {unit} (autoencoder {downsample} x patch {patch}); "
            f"the nearest is {nearest}"
        )


def parts_with_weights(experiment: schema.Config, system: System) -> Iterator[tuple[str, Any]]:
    """(kind, part on the meta device) of every part of system and data whose spec says `weights`."""
    parts = {kind: part for kind in WEIGHTED if (part := system.part(kind)) is not None}
    absent = {k: v for k, v in experiment["system"].items() if k not in parts}
    others = [(k, s) for k, s in (*_specs(absent), *_specs(experiment["data"])) if _names_weights(s)]
    for kind, part in (*parts.items(), *((kind, build_on_meta(kind, spec)) for kind, spec in others)):
        yield from ((kind, each) for each in with_weights(kind, part))


def _names_weights(spec: schema.Config) -> bool:
    """Whether a spec or one inside says `weights`."""
    return bool(spec.get("weights")) or any(_names_weights(v) for v in spec.values() if isinstance(v, dict))


def _specs(value: schema.Config) -> Iterator[tuple[str, schema.Config]]:
    inner = [(k, v) for k, v in value.items() if isinstance(v, dict)]
    yield from ((k, v) for k, v in inner if k in STANDALONE)
    for _, v in inner:
        yield from _specs(v)


def check_weights(part: nn.Module, reference: str, kind: str) -> None:
    """SpecError if a file or folder of weights is missing or has other shapes; only its header is read.

    Weights of an experiment that is not trained yet, and of a hub, are not checked.
    """
    if reference.startswith("experiment:"):
        path = parent.trained_weights(reference.removeprefix("experiment:"))
    elif formats.is_released(reference):
        check_released(part, reference, kind)
        return
    else:
        path = weights.find(reference)
    if path is not None:
        weights.load_state(part, files.read_header(path), f"{kind}.", reference)  # both on the meta device


def check_released(part: Any, reference: str, kind: str) -> None:
    """SpecError if released weights are of another kind or shape; a hub id that is not a local file is not checked."""
    if Path(reference).expanduser().exists() or not hub.is_hub_id(reference):
        other = formats.recognise(hub.locate(reference), kind, like=part.spec)
        formats.check_kind(kind, other, reference)
        for key in SHAPE_OPTIONS & other.spec.keys() & part.spec.keys():
            if other.spec[key] != part.spec[key]:
                raise SpecError(
                    f"{reference!r} has {key} {other.spec[key]!r}, and the spec of the {kind} says {part.spec[key]!r}"
                )
        formats.check_agree(part.spec, other)
