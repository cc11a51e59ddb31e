"""Folders that diffusers reads: a component of one of our parts, or a whole SanaPipeline of a text2image system."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn

from sana_lab.checkpoints import architectures, formats, key_tables
from sana_lab.config import experiments
from sana_lab.config.specs import SpecError, name_of
from sana_lab.diffusion.flow import Flow
from sana_lab.models.autoencoders import Autoencoder
from sana_lab.models.dit import Dit
from sana_lab.models.text.llm import Llm
from sana_lab.pretrained.fold_normalisation import folded
from sana_lab.systems.text2image import TextToImage

Spec = dict[str, Any]

VERSION = "0.42.0"
"""Of diffusers, whose format is written."""

SCHEDULER: Spec = {
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "final_sigmas_type": "zero",
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
}


def write(model: nn.Module, folder: Path) -> list[str]:
    """Write a system or a part into a folder that is new or empty; what diffusers will do otherwise, in sentences.

    SpecError where diffusers has no such model, before anything is written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SpecError(f"{folder} is there and not empty; expected a new folder")
    if isinstance(model, TextToImage):
        return _pipeline(model, folder)
    model = next((p for p in (getattr(model, k, None) for k in formats.FOLDERS) if isinstance(p, nn.Module)), model)
    if not isinstance(model, Dit | Autoencoder):
        raise SpecError(
            f"a {type(model).__name__} cannot be exported; expected a text2image system, dit or autoencoder"
        )
    _write_component(_component(model), folder)
    return _dit_notes(model) if isinstance(model, Dit) else []


class Component(NamedTuple):
    """What a component's folder holds."""

    config: Spec
    state: Mapping[str, Tensor]  # under diffusers' names


def _component(part: nn.Module) -> Component:
    """A part as diffusers has it. SpecError where it has no such model."""
    spec, state = _plain(part)
    supplied = {"channels": part.channels, "text_dim": part.text_dim} if isinstance(part, Dit) else {}
    name, known = architectures.class_of(spec)
    said = {"_class_name": name, "_diffusers_version": VERSION, **known.write(spec, supplied)}
    return Component(said, key_tables.to_theirs(state, known.table(spec)))


def _plain(part: nn.Module) -> tuple[Spec, dict[str, Tensor]]:
    """Spec and state with one shift and one scale for all channels, as diffusers has them."""
    given: Any = part.spec
    if not isinstance(part, Autoencoder) or given["name"] not in architectures.NAMES:
        return given, part.state_dict()
    shift, scale = (_one(v) for v in (part.shift, part.scale))
    if shift is None or scale is None:
        return folded(part)
    return {**given, "shift": shift, "scale": scale}, part.state_dict()


def _one(values: Tensor) -> float | None:
    """The number that all channels share, if they do."""
    same = torch.allclose(values, values[:1].expand_as(values), rtol=1e-5, atol=1e-7)
    return round(values[0].item(), 6) if same else None


def _write_component(component: Component, folder: Path) -> None:
    _write_json(folder / "config.json", component.config)
    state = component.state
    whole = {k: v.detach().clone(memory_format=torch.contiguous_format).cpu() for k, v in state.items()}
    save_torch_state_dict(whole, folder, filename_pattern="diffusion_pytorch_model{suffix}.safetensors")


def _pipeline(system: TextToImage, folder: Path) -> list[str]:
    parts = {kind: _component(getattr(system, kind)) for kind in ("dit", "autoencoder")}
    if system.dit.spec["position"] == "none":  # else the size is that of the position embedding
        parts["dit"].config["sample_size"] = _side(system)
    _check(system, parts)
    scheduler = _scheduler(system)
    for kind, component in parts.items():
        _write_component(component, folder / formats.FOLDERS[kind])
    text: Any = system.text_encoder
    text.network.save_pretrained(folder / "text_encoder")
    text.tokenizer.save_pretrained(folder / "tokenizer")
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index = {
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", type(text.network).__name__],
        "tokenizer": ["transformers", type(text.tokenizer).__name__],
        "transformer": ["diffusers", parts["dit"].config["_class_name"]],
        "vae": ["diffusers", parts["autoencoder"].config["_class_name"]],
    }
    _write_json(folder / "model_index.json", {"_class_name": "SanaPipeline", "_diffusers_version": VERSION, **index})
    notes = _notes(system)
    (folder / "README.md").write_text(_readme(system, notes))
    return notes


def _check(system: TextToImage, parts: dict[str, Component]) -> None:
    """SpecError where no SanaPipeline is made of such parts."""
    if not isinstance(system.text_encoder, Llm):
        raise SpecError("SanaPipeline reads its text with a decoder-only model, text_encoder llm; this system's is t5")
    if parts["autoencoder"].config["_class_name"] != "AutoencoderDC":
        raise SpecError(
            "SanaPipeline's autoencoder is AutoencoderDC (dcae), this system's a vae; export its parts alone"
        )
    if system.dit.spec["guidance"] is not None:
        raise SpecError("SanaPipeline gives its DiT no guidance, and this one was distilled with it; export it alone")
    if not isinstance(system.flow, Flow):
        raise SpecError("SanaPipeline's schedulers are for flow matching, and this system predicts noise (ddpm)")


def _scheduler(system: TextToImage) -> Spec:
    solver, given = _sampling(system)["solver"], {"_diffusers_version": VERSION}
    if name_of(solver) == "euler":
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", **given, "shift": _shift(system)}
    order = solver.get("order", 2) if isinstance(solver, dict) and solver["name"] == "dpmpp" else 2
    given |= {"_class_name": "DPMSolverMultistepScheduler", **SCHEDULER}
    return {**given, "flow_shift": _shift(system), "solver_order": order}


def _shift(system: TextToImage) -> float:
    assert isinstance(system.flow, Flow)
    return system.flow.shift if (given := _sampling(system)["shift"]) is None else given


def _sampling(system: TextToImage) -> Spec:
    return experiments.check_sampling((system.experiment or {}).get("sampling", {}))


def _side(system: TextToImage) -> int:
    """Latents a side of the pictures that it was trained on; of a bare system, of its position embedding."""
    if system.experiment is None:
        return system.dit.spec["base"] * system.dit.patch
    return experiments.image_size(system.experiment["data"]) // system.autoencoder.downsample


def _notes(system: TextToImage) -> list[str]:
    """What SanaPipeline does otherwise, unless it is told when it is called."""
    text = system.text_encoder
    assert isinstance(text, Llm)
    nvlabs = "the lab's null condition is seen through the prompt's mask (nvlabs), SanaPipeline's through its own."
    cut = f"Prompts have at most {text.max_tokens} tokens: pass max_sequence_length={text.max_tokens}."
    return [
        _instruction_note(text),
        *([cut] if text.max_tokens != 300 else []),
        *([] if text.lowercase else ["diffusers writes every prompt in lower case; the lab did not."]),
        *([f"In guidance {nvlabs}"] if text.null == "nvlabs" else []),
        *_sampling_notes(system),
        *_dit_notes(system.dit),
    ]


def _instruction_note(text: Llm) -> str:
    if text.instruction_option == "released":
        return "Prompts were read with an instruction, SanaPipeline's own default of complex_human_instruction."
    said = repr([text.instruction] if text.instruction else None)
    return f"Prompts were read with an instruction of their own: pass complex_human_instruction={said}."


def _sampling_notes(system: TextToImage) -> list[str]:
    flow, how = system.flow, _sampling(system)
    assert isinstance(flow, Flow)
    solver, interval, euler = name_of(how["solver"]), how["guidance_interval"], name_of(how["solver"]) == "euler"
    grid = "flow_match" if euler else "even"
    said = {
        f"diffusers begins at t = 0.999, the lab at {flow.start:g}.": not euler and flow.start != 0.999,
        "diffusers tells the network times rounded down to 1/1000, the lab exact ones.": (
            not euler and flow.model_time == "exact"
        ),
        "diffusers' Flow-Euler has a grid of its own, the lab sampled on an even one (grid: flow_match is theirs).": (
            euler and how["grid"] != grid
        ),
        "The lab sampled on the grid flow_match, diffusers' Flow-DPM-Solver on an even one.": (
            not euler and how["grid"] != grid
        ),
        "The lab guided from t {:g} to {:g} alone, SanaPipeline does everywhere.".format(*interval or (0, 1)): (
            interval is not None
        ),
        f"The lab samples with {solver}, this folder with Flow-DPM-Solver of order 2.": (
            solver not in ("dpmpp", "euler")
        ),
    }
    return [note for note, true in said.items() if true]


def _dit_notes(dit: Dit) -> list[str]:
    spec = dit.spec
    if not spec["cross_norm"] or spec["cross_norm_eps"] == 1e-5:
        return []
    return [f"diffusers' norms of q and k in cross-attention add 1e-5, this model's {spec['cross_norm_eps']:g}."]


def _readme(system: TextToImage, notes: list[str]) -> str:
    settings, size = _sampling(system), _side(system) * system.autoencoder.downsample
    steps, guidance = settings["steps"], settings["guidance"]
    call = f"    pipe('a red circle', height={size}, width={size}, use_resolution_binning=False,\n"
    call += f"         num_inference_steps={steps}, guidance_scale={guidance})"
    lines = ["# A model of sana_lab for diffusers' SanaPipeline", "", *(f"- {note}" for note in notes), ""]
    return "\n".join([*lines, "    pipe = SanaPipeline.from_pretrained(FOLDER)", call, ""])


def _write_json(path: Path, value: Spec) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")
