"""Folders that diffusers loads: a component of one of our parts, or the pipeline of a text2image system."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn

from sana_lab.checkpoints import architectures, formats, rename_keys
from sana_lab.config import atomic_write, experiments
from sana_lab.config.validation import SpecError
from sana_lab.diffusion.flow import Flow
from sana_lab.models.autoencoders import Autoencoder
from sana_lab.models.dit import Dit
from sana_lab.models.text.llm import Llm
from sana_lab.pretrained import export_notes, loading, parts, schedulers
from sana_lab.pretrained.fold_normalisation import fold
from sana_lab.systems.text2image import TextToImage

Spec = dict[str, Any]

VERSION = "0.42.0"
"""Version of diffusers whose format is written."""


class Component(NamedTuple):
    """The contents of a component's folder."""

    config: Spec
    state: Mapping[str, Tensor]  # under diffusers' names


def export(
    model: str | Path | nn.Module,
    folder: str | Path,
    part: str | None = None,  # dit or autoencoder: that part of a system alone
) -> list[str]:
    """Write a system or part, or the model of that name, to a new or empty folder for diffusers.

    A text2image system becomes a SanaPipeline (a SanaSprintPipeline if its DiT is distilled with guidance), a part,
    also the only one of another system, its component. Returned are sentences on what runs differently in diffusers.
    SpecError, before anything is written, where diffusers has no such model.
    """
    name = "CHECKPOINT" if isinstance(model, nn.Module) else str(model)
    model = model if isinstance(model, nn.Module) else loading.open_model(str(model))
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SpecError(f"{folder} exists and is not empty; expected a new folder")
    with atomic_write.replacing_folder(folder.absolute()) as partial:
        if isinstance(model, TextToImage) and part is None:
            return _write_pipeline(model, partial, f"sana-lab export {name} {folder} --part")
        network = _part(model, part)
        _write_component(_component(network), partial)
        return export_notes.dit_notes(network) if isinstance(network, Dit) else []


def _part(model: nn.Module, kind: str | None) -> Dit | Autoencoder:
    """The part of that kind, or the only one. SpecError where there is none."""
    children = dict(model.named_children())
    part = next((children[k] for k in formats.FOLDERS if k in children and kind in (None, k)), None)
    part = model if part is None and kind is None else part
    if not isinstance(part, Dit | Autoencoder):
        name = type(model).__name__
        what = f"{'an' if name[0] in 'AEIOU' else 'a'} {name}" + (f" without {kind}" if kind else "")
        raise SpecError(f"{what} cannot be exported; expected a text2image system, dit or autoencoder")
    return part


def _component(part: nn.Module) -> Component:
    """A part's configuration and tensors in diffusers. SpecError if diffusers has no such model."""
    spec, state = _uniform_normalisation(part)
    name, architecture = architectures.class_of(spec)
    config = architecture.write(spec, parts.supplied(part))
    header = {"_class_name": name, "_diffusers_version": VERSION}
    return Component({**header, **config}, rename_keys.to_theirs(state, architecture.table(spec)))


def _uniform_normalisation(part: nn.Module) -> tuple[Spec, dict[str, Tensor]]:
    """Spec and state with one shift and one scale for all channels, as diffusers has them."""
    spec: Any = part.spec
    if not isinstance(part, Autoencoder) or spec["name"] not in architectures.CLASSES:
        return spec, part.state_dict()
    shift, scale = (_uniform(v) for v in (part.shift, part.scale))
    if shift is None or scale is None:
        return fold(part)
    return {**spec, "shift": shift, "scale": scale}, part.state_dict()


def _uniform(values: Tensor) -> float | None:
    """The value (to 6 decimals) that all channels share, or None."""
    is_uniform = torch.allclose(values, values[:1].expand_as(values), rtol=1e-5, atol=1e-7)
    return round(values[0].item(), 6) if is_uniform else None


def _write_component(component: Component, folder: Path) -> None:
    _write_json(folder / "config.json", component.config)
    state = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format).cpu()
        for name, tensor in component.state.items()
    }
    save_torch_state_dict(state, folder, filename_pattern="diffusion_pytorch_model{suffix}.safetensors")


def _write_pipeline(system: TextToImage, folder: Path, part_command: str) -> list[str]:
    """Write all components and the index; the notes that `export` returns."""
    _check_system(system, part_command)
    components = {kind: _component(getattr(system, kind)) for kind in ("dit", "autoencoder")}
    if system.dit.spec["position"] == "none":  # else sample_size is the grid of the position embedding
        components["dit"].config["sample_size"] = latent_side(system)
    text, flow, sampling = system.text_encoder, system.flow, sampling_of(system)
    assert isinstance(text, Llm)
    assert isinstance(flow, Flow)
    is_sprint = system.dit.distilled
    scheduler = schedulers.write_scm(VERSION) if is_sprint else schedulers.write_scheduler(flow, sampling, VERSION)
    for kind, component in components.items():
        _write_component(component, folder / formats.FOLDERS[kind])
    text.network.save_pretrained(folder / "text_encoder")
    text.tokenizer.save_pretrained(folder / "tokenizer")
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index = {
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", type(text.network).__name__],
        "tokenizer": ["transformers", type(text.tokenizer).__name__],
        "transformer": ["diffusers", components["dit"].config["_class_name"]],
        "vae": ["diffusers", components["autoencoder"].config["_class_name"]],
    }
    name = "SanaSprintPipeline" if is_sprint else "SanaPipeline"
    _write_json(folder / "model_index.json", {"_class_name": name, "_diffusers_version": VERSION, **index})
    notes = export_notes.pipeline_notes(text, system.dit, flow, sampling)
    size = latent_side(system) * system.autoencoder.downsample
    (folder / "README.md").write_text(export_notes.readme(name, notes, size, sampling))
    return notes


def _check_system(system: TextToImage, part_command: str) -> None:
    """SpecError where a SanaPipeline cannot consist of such parts, with the command that exports them alone."""
    alone = f"export a part alone: {part_command} dit (or autoencoder)"
    encoder: Any = system.text_encoder
    if not isinstance(encoder, Llm):
        raise SpecError(
            "SanaPipeline reads its text with a decoder-only model, text_encoder llm; this system's is "
            f"{encoder.spec['name']}; {alone}"
        )
    autoencoder: Any = system.autoencoder.spec
    if autoencoder["name"] != "dcae":
        raise SpecError(f"SanaPipeline's autoencoder is AutoencoderDC (dcae), this system's a vae; {alone}")
    if not isinstance(system.flow, Flow):
        raise SpecError(
            f"SanaPipeline's schedulers are for flow matching, and this system predicts noise (ddpm); {alone}"
        )
    if system.flow.prediction != "velocity":
        raise SpecError(
            f"SanaPipeline's schedulers are for predictions of the velocity, and this system predicts data; {alone}"
        )


def sampling_of(system: TextToImage) -> Spec:
    """The complete sampling options of a system's experiment, or the defaults."""
    return experiments.check_sampling((system.experiment or {}).get("sampling", {}))


def latent_side(system: TextToImage) -> int:
    """Latents a side of its training images; without an experiment, of the position embedding."""
    if system.experiment is None:
        return system.dit.spec["base"] * system.dit.patch
    return experiments.image_size(system.experiment["data"]) // system.autoencoder.downsample


def _write_json(path: Path, value: Spec) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")
