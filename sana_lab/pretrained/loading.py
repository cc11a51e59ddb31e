"""Released weights in, as a part or a whole system of ours; ours out again. The verbs `import` and `export`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sana_lab.checkpoints import files, formats, key_tables, weights
from sana_lab.checkpoints.build import build
from sana_lab.config import experiments, registry, specs
from sana_lab.config.specs import SpecError
from sana_lab.pretrained import restore
from sana_lab.pretrained.export import write
from sana_lab.systems.ema import Average
from sana_lab.systems.text2image import TextToImage

Spec = dict[str, Any]

COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")


def load(
    reference: str | Path,
    kind: str | None = None,
    *,
    ema: bool | None = None,
    variant: str | None = None,
    dtype: torch.dtype | None = None,
    **hints: Any,
) -> Any:
    """A part with its `.spec`, or a whole text2image system, from a path or hub id, in evaluation mode.

    Read are NVlabs' .pth, diffusers' SanaPipeline and component folders (of a pipeline one component alone, where
    `kind` is dit, autoencoder or text_encoder), and the lab's own .ckpt and weights files. `ema` None takes averaged
    weights where a .pth has them. `variant` is diffusers' (fp16). Numbers stay in the file's dtype, mapped and not
    copied, unless `dtype` is given. `hints` are options of the part that a file does not hold, such as cross_heads. A
    loaded pipeline is frozen: to train on, give it as `weights:` in an experiment. SpecError where it is other.
    """
    found = _load(files.whole(files.find(str(reference))), kind, ema=ema, variant=variant, **hints)
    return found if dtype is None else found.to(dtype)


def _load(path: Path, kind: str | None, **options: Any) -> Any:
    if path.suffix == ".ckpt":
        return _part(restore.from_checkpoint(path), kind, path)
    if path.suffix == ".safetensors" and (card := weights.card(path)):
        told = options.get("text_encoder")
        return _part(imported(path, card, told) if "parts" in card else restore.from_weights(path), kind, path)
    return _released(path, kind, **options)[0]


def _released(path: Path, kind: str | None, text: bool = True, **options: Any) -> tuple[Any, tuple[str, ...]]:
    """What lies there in other people's formats, and what is to be said of it."""
    if kind == "text_encoder":
        return build("text_encoder", text_spec(path, options.get("variant"))), ()
    if kind is None and (path / "model_index.json").is_file():
        return pipeline(path, text=text, **options), ()
    found = formats.find(path, kind, **options)
    return built(found, kind), found.notes


def _part(found: Any, kind: str | None, path: Path) -> Any:
    if kind is None or (hasattr(found, "spec") and kind in registry.BASES and _is(found, kind)):
        return found
    if not hasattr(found, kind):
        raise SpecError(f"{path} holds a {type(found).__name__}, which has no {kind}")
    return getattr(found, kind)


def _is(part: Any, kind: str) -> bool:
    return part.spec["name"] in registry.TABLE[kind]


def built(found: formats.Found, kind: str | None = None) -> nn.Module:
    """The part that those weights are of, on the meta device first, so that nothing is allocated twice."""
    if kind not in (None, found.kind):
        raise SpecError(f"{found.source} holds a {found.kind} ({found.spec['name']}), and a {kind} was asked for")
    part = _empty(found.kind, found.spec, found.supplied)
    return _filled(part, formats.state_for(part, found))


def _empty(kind: str, spec: Spec, supplied: Spec) -> nn.Module:
    with torch.device("meta"):
        return specs.build(kind, spec, **supplied)


def _filled(part: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    part.load_state_dict(state, assign=True)
    return part.eval()


# A diffusers pipeline


def pipeline(path: Path, *, text: bool = True, text_encoder: Spec | None = None, **options: Any) -> TextToImage:
    """The text2image system of a SanaPipeline's folder, without its text encoder's weights where `text` is false."""
    check_pipeline(path)
    variant = options.get("variant")
    dit, autoencoder = (
        formats.find(path, "dit", **options),
        formats.find(path, "autoencoder", variant=variant, ema=None),
    )
    spoken = {**text_spec(path, variant), **(text_encoder or {})}
    _check_widths(path, dit, autoencoder)
    flow, sampling = read_scheduler(files.read_json(path / "scheduler" / "scheduler_config.json"), path)
    spec = {"name": "text2image", "dit": dit.spec, "autoencoder": autoencoder.spec, "text_encoder": spoken, **flow}
    size = files.read_json(path / "transformer" / "config.json").get("sample_size", 32)
    return assemble(spec, {"dit": built(dit), "autoencoder": built(autoencoder)}, sampling, size, text)


def check_pipeline(path: Path) -> None:
    """SpecError where a pipeline is of another architecture, or lacks a component."""
    name = files.read_json(path / "model_index.json").get("_class_name")
    if name == "SanaSprintPipeline":
        raise SpecError(f"{path} is a SanaSprintPipeline, whose sampler the lab has not; load its DiT: kind='dit'")
    if name == "SanaPAGPipeline":
        raise SpecError(
            f"{path} is a SanaPAGPipeline, which draws with perturbed-attention guidance, and the lab has none; load "
            "its DiT: kind='dit', or to draw without it write SanaPipeline as _class_name in model_index.json"
        )
    if name != "SanaPipeline":
        raise SpecError(f"{path} is a {name}, another architecture; the lab reads SanaPipeline")
    if lost := [c for c in COMPONENTS if not (path / c).is_dir()]:
        raise SpecError(f"{path} lacks {', '.join(f'{c}/' for c in lost)}; a {name} has {', '.join(COMPONENTS)}")


def text_spec(path: Path, variant: str | None = None) -> Spec:
    """How a SanaPipeline reads its prompts: the released instruction, lower-cased."""
    spec = {"name": "llm", "model": str(path.resolve()), **({"variant": variant} if variant else {})}
    if not (path / "text_encoder").is_dir():
        return spec
    return {**spec, "instruction": "released", "lowercase": True}


def _check_widths(path: Path, dit: formats.Found, autoencoder: formats.Found) -> None:
    given, made = dit.supplied["channels"], autoencoder.spec["latent"]
    if given != made:
        raise SpecError(f"{path}: the transformer takes latents of {given} channels, and the vae makes {made}")
    width = files.read_json(path / "text_encoder" / "config.json").get("hidden_size")
    if width not in (None, dit.supplied["text_dim"]):
        text_dim = dit.supplied["text_dim"]
        raise SpecError(f"{path}: the transformer reads text {text_dim} wide, and the text encoder makes it {width}")


def read_scheduler(given: Mapping[str, Any], path: Path) -> tuple[Spec, Spec]:
    """The flow's and the sampling's options. SpecError where diffusers would sample in a way that the lab has not."""
    name = given.get("_class_name")
    released = {"start": 0.999, "model_time": "released"}
    if name == "DPMSolverMultistepScheduler":
        _expect(given, path, DPM)
        solver = {"name": "dpmpp", "order": given.get("solver_order", 2)}
        return {"shift": float(given.get("flow_shift", 1.0)), **released}, {"solver": solver}
    if name == "FlowMatchEulerDiscreteScheduler":
        _expect(given, path, EULER)
        return {"shift": float(given.get("shift", 1.0)), **released}, {"solver": "euler", "grid": "flow_match"}
    raise SpecError(f"{path} samples with {name}; the lab has DPMSolverMultistepScheduler's and FlowMatchEuler's")


DPM: Spec = {
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "final_sigmas_type": "zero",
    "lower_order_final": True,
    "euler_at_final": False,
    "thresholding": False,
    "use_dynamic_shifting": False,
    "num_train_timesteps": 1000,
}
EULER: Spec = {
    "use_dynamic_shifting": False,
    "stochastic_sampling": False,
    "num_train_timesteps": 1000,
    "shift_terminal": None,
    "invert_sigmas": False,
}
GRIDS: Spec = dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"), False)
"""What the schedulers must say for ours to do the same; what is left out is so by default, but for DPM's first two."""


def _expect(given: Mapping[str, Any], path: Path, expected: Spec) -> None:
    for key, value in {**expected, **GRIDS}.items():
        said = given.get(key, {"prediction_type": "epsilon", "use_flow_sigmas": False}.get(key, value))
        if said != value and (said or value):  # null is false
            raise SpecError(f"{path}: the scheduler has {key} {said!r}; the lab's has {value!r} alone")


def assemble(spec: Spec, made: Mapping[str, nn.Module], sampling: Spec, size: int, text: bool = True) -> TextToImage:
    """A frozen system of loaded parts; `size` is latents a side. `experiment` says how it is sampled."""
    with torch.device("meta"):
        system: TextToImage = specs.build("system", spec)
    system.requires_grad_(False)
    system.average = Average(system, 0.0)
    for kind, part in made.items():
        setattr(system, kind, part.requires_grad_(False))
    if text:
        system.text_encoder = build("text_encoder", spec["text_encoder"]).requires_grad_(False)
        system.to("cpu")  # Lightning keeps the device that it was made on
    resolved, pixels = specs.resolve("system", spec), size * system.autoencoder.downsample
    setattr(system, "spec", resolved)  # noqa: B010  (torch's modules are typed as if they held nothing else)
    system.experiment = {
        "system": resolved,
        "sampling": experiments.check_sampling(sampling),
        "data": {"size": pixels},
    }
    return system.eval()


# Files that `import` writes


def imported(path: Path, card: Mapping[str, Any], text_encoder: Spec | None = None) -> Any:
    """What `write_import` wrote: a part, or a system whose text encoder lies where it lay."""
    for part in card["parts"].values():
        restore.known_names(part["spec"], str(path))
    restore.known_names(card.get("system"), str(path))
    tensors = files.read_safetensors(path)
    made = {kind: _from_import(path, tensors, kind, **part) for kind, part in card["parts"].items()}
    if "system" not in card:
        return next(iter(made.values()))
    system = experiments.merge(card["system"], {"text_encoder": text_encoder or {}})
    return assemble(system, made, card["sampling"], card["size"])


def _from_import(path: Path, tensors: Mapping[str, Tensor], kind: str, spec: Spec, supplied: Spec) -> nn.Module:
    part = _empty(kind, spec, supplied)
    expected = {f"{kind}.{k}": tuple(v.shape) for k, v in part.state_dict().items()}
    given = {k: tensors[k] for k in tensors if k.startswith(f"{kind}.")}
    if problems := key_tables.odd(expected, given):
        raise SpecError(f"{path} does not fit: {'; '.join(problems)}")
    return _filled(part, {k.removeprefix(f"{kind}."): v for k, v in given.items()})


# The verbs


def opened(name: str, overrides: Sequence[str] = (), variant: str | None = None) -> Any:
    """A trained experiment, or a file, folder or hub id that `load` reads, and `variant` of its files.

    Of the latter only sampling, and how a pipeline reads its prompts, can change.
    """
    if not is_model(name):
        experiment = experiments.load(name, overrides)
        return restore.restore(experiment, weights.find_trained(experiment, name))
    told = experiments.apply({}, (o for o in overrides if o.startswith("text_encoder.")))
    changes = [o for o in overrides if not o.startswith("text_encoder.")]
    system = load(name, variant=variant, **told)
    if not overrides:
        return system
    if getattr(system, "experiment", None) is None or any(not o.startswith("sampling.") for o in changes):
        raise SpecError(
            f"{' '.join(overrides)} changes an experiment, and {name!r} is a checkpoint, which is as it is: of a "
            "system, sampling.* alone can change, and of a pipeline text_encoder.*"
        )
    changed = experiments.apply({"sampling": system.experiment["sampling"]}, changes)["sampling"]
    system.experiment = {**system.experiment, "sampling": experiments.check_sampling(changed)}
    return system


def is_model(name: str) -> bool:
    """Whether a name means a file, folder or hub id, rather than an experiment.

    A folder beside an experiment of that name, such as its pictures, is meant where it looks like a model's, or where
    the name has a slash.
    """
    path = Path(name)
    if name.endswith((*files.TORCH, ".safetensors")) or files.is_index(path):
        return True
    known = any((root / f"{name}.yaml").is_file() for root in experiments.roots("experiments"))
    if path.is_dir():
        return not known or "/" in name or any((path / f).is_file() for f in ("model_index.json", "config.json"))
    return files.is_hub_id(name) and not known


def export(model: str | Path | nn.Module, folder: str | Path) -> list[str]:
    """Write a system or part, or the model of that name, as a folder for diffusers; what runs otherwise there.

    A text2image system becomes a SanaPipeline, a part its component. SpecError where diffusers has no such model.
    """
    return write(model if isinstance(model, nn.Module) else opened(str(model)), Path(folder))
