"""diffusers' SanaPipeline and SanaSprintPipeline folders as frozen text2image systems."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from sana_lab.checkpoints import files, formats
from sana_lab.checkpoints.build import build, build_on_meta
from sana_lab.config import experiments, guests, specs
from sana_lab.config.validation import SpecError
from sana_lab.pretrained import parts, schedulers
from sana_lab.systems.ema import Average
from sana_lab.systems.text2image import TextToImage

Spec = dict[str, Any]

COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
"""Folders of a complete pipeline."""

SPRINT = "SanaSprintPipeline"
"""The pipeline of a DiT distilled with guidance, sampled by `scm`."""


def load_pipeline(path: Path, *, text: bool = True, text_encoder: Spec | None = None, **options: Any) -> TextToImage:
    """The system of a pipeline's folder; without `text` the text encoder stays on the meta device.

    `text_encoder` changes options of how prompts are read. SpecError if the pipeline is another one or incomplete.
    """
    name = check_pipeline(path)
    variant = options.get("variant")
    dit = formats.recognise(path, "dit", **options)
    autoencoder = formats.recognise(path, "autoencoder", variant=variant)
    text_spec = {**text_encoder_spec(path, variant), **(text_encoder or {})}
    _check_widths(path, dit, autoencoder)
    flow, sampling = schedulers.read_scheduler(files.read_json(path / "scheduler" / "scheduler_config.json"), path)
    _check_sprint(path, name, dit, sampling)
    guests.check([flow, sampling], str(path))
    spec = {"name": "text2image", "dit": dit.spec, "autoencoder": autoencoder.spec, "text_encoder": text_spec, **flow}
    size = files.read_json(path / "transformer" / "config.json").get("sample_size", 32)
    loaded = {"dit": parts.from_released(dit), "autoencoder": parts.from_released(autoencoder)}
    return assemble(spec, loaded, sampling, size, text)


def check_pipeline(path: Path) -> str:
    """The pipeline's class. SpecError if it is of another architecture or lacks a component."""
    name = files.read_json(path / "model_index.json").get("_class_name")
    if name == "SanaPAGPipeline":
        raise SpecError(
            f"{path} is a SanaPAGPipeline, which samples with perturbed-attention guidance, whose scale and blocks it "
            "does not hold; load its DiT: kind='dit', or write SanaPipeline as _class_name in model_index.json and "
            "sample with sampling.pag and sampling.pag_layers"
        )
    if name not in ("SanaPipeline", SPRINT):
        raise SpecError(f"{path} is a {name}, another architecture; the lab reads SanaPipeline and {SPRINT}")
    if missing := [c for c in COMPONENTS if not (path / c).is_dir()]:
        raise SpecError(f"{path} lacks {', '.join(f'{c}/' for c in missing)}; a {name} has {', '.join(COMPONENTS)}")
    return str(name)


def text_encoder_spec(path: Path, variant: str | None = None) -> Spec:
    """Prompt options of a SanaPipeline: lower-cased, with the released instruction."""
    spec = {"name": "llm", "model": str(path.resolve()), **({"variant": variant} if variant else {})}
    if not (path / "text_encoder").is_dir():
        return spec
    return {**spec, "instruction": "released", "lowercase": True}


def _check_widths(path: Path, dit: formats.ReleasedWeights, autoencoder: formats.ReleasedWeights) -> None:
    """SpecError if the transformer does not fit the autoencoder's latents or the text encoder's features."""
    channels, text_dim, latent = dit.supplied["channels"], dit.supplied["text_dim"], autoencoder.spec["latent"]
    if channels != latent:
        raise SpecError(f"{path}: the transformer takes latents of {channels} channels, and the vae makes {latent}")
    width = files.read_json(path / "text_encoder" / "config.json").get("hidden_size")
    if width not in (None, text_dim):
        raise SpecError(f"{path}: the transformer reads text {text_dim} wide, and the text encoder makes it {width}")


def _check_sprint(path: Path, name: str, dit: formats.ReleasedWeights, sampling: Spec) -> None:
    """SpecError unless pipeline, transformer and scheduler are all SANA-Sprint's, or none is."""
    is_sprint = name == SPRINT
    reads_guidance, is_scm = dit.spec["guidance"] is not None, sampling["solver"] == "scm"
    if not reads_guidance == is_scm == is_sprint:
        raise SpecError(
            f"{path} is a {name} whose transformer has guidance_embeds {reads_guidance} and whose scheduler is "
            f"{'SCMScheduler' if is_scm else 'none of Sprint'}; expected {is_sprint} and "
            f"{'SCMScheduler' if is_sprint else 'a flow-matching scheduler'}"
        )


def assemble(spec: Spec, loaded: Mapping[str, nn.Module], sampling: Spec, size: int, text: bool = True) -> TextToImage:
    """A frozen system of the loaded parts, its `experiment` holding the sampling options; `size` is latents a side."""
    system: TextToImage = build_on_meta("system", spec)
    system.requires_grad_(False)
    system.average = Average(system, 0.0)
    for kind, part in loaded.items():
        setattr(system, kind, part.requires_grad_(False))
    if text:
        system.text_encoder = build("text_encoder", spec["text_encoder"]).requires_grad_(False)
        system.to("cpu")  # Lightning keeps the device that the system was built on
    resolved, pixels = specs.resolve("system", spec), size * system.autoencoder.downsample
    setattr(system, "spec", resolved)  # noqa: B010  (nn.Module's attributes are typed as Tensor | Module)
    system.experiment = {
        "system": resolved,
        "sampling": experiments.check_sampling(sampling),
        "data": {"size": pixels},
    }
    return system.eval()
