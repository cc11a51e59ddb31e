"""Other people's text-to-image systems: any diffusers pipeline, to be sampled and measured as ours are."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sana_lab.checkpoints import files, hub
from sana_lab.config.digests import sha256
from sana_lab.config.specs import SpecError
from sana_lab.costs.timing import Call
from sana_lab.diffusion.sampling import generator, noise_like
from sana_lab.types import Json

Watch = Callable[[str, Call], Any]
"""(stage, call) -> what the call gives; it runs the call once."""

Noise = Literal["latents", "generators", "global"]

NETWORKS = {"text": ("text_encoder", "forward"), "denoise": ("transformer", "forward"), "decode": ("vae", "decode")}
"""stage -> how the names of its components begin, and which method of theirs it calls; a unet denoises too."""

LATER = 1
"""Key of the noise that a stochastic scheduler draws, so that it is not that of the beginning again."""


class Peer:
    """A diffusers pipeline under our interface.

    The noise of image i depends on (seed, index i) alone, as for our systems. Where the denoiser works on the latents
    of the autoencoder as they are (Sana, PixArt, Stable Diffusion 1 to 3), they are ours, number by number, rounded to
    the denoiser's dtype: `noise` is "latents". Pipelines that pack or otherwise shape their latents (FLUX) draw them
    from one generator an image: "generators". Those that take neither draw from the global state: "global", and their
    images depend on the batch. `options` are told to every call, such as max_sequence_length. Images with numbers that
    are not finite are refused where they are looked at, so not of `drawn` weights.
    """

    def __init__(
        self, pipeline: Any, folder: Path | None = None, *, options: Json | None = None, drawn: bool = False
    ) -> None:
        self.pipeline, self.folder, self.options, self.drawn = pipeline, folder, options or {}, drawn
        self.accepts = frozenset(inspect.signature(pipeline.__call__).parameters)
        if "prompt" not in self.accepts:
            raise SpecError(f"{self.name} takes no prompt, so it is no text-to-image pipeline")
        pipeline.set_progress_bar_config(disable=True)

    @classmethod
    def load(
        cls,
        reference: str | Path,
        *,
        dtype: torch.dtype | None = None,
        variant: str | None = None,
        device: torch.device | str | None = None,
    ) -> "Peer":
        """From a pipeline's folder or a hub id, safetensors only, on the fastest device; `variant` such as fp16.

        `dtype` None takes float32. SpecError where it is no pipeline, has code of its own, or holds pickles.
        """
        folder = hub.locate(str(reference))
        _check(folder)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(_pipeline(folder, dtype or torch.float32, variant).to(device), folder)

    @property
    def name(self) -> str:
        return type(self.pipeline).__name__

    @property
    def device(self) -> torch.device:
        return self.pipeline.device

    @property
    def noise(self) -> Noise:
        """Where its noise comes from."""
        if "latents" in self.accepts and self._plain():
            return "latents"
        return "generators" if "generator" in self.accepts else "global"

    @property
    def denoiser(self) -> Any:
        """The network that denoises, under either of its usual names; None where it has another."""
        return getattr(self.pipeline, "transformer", None) or getattr(self.pipeline, "unet", None)

    @property
    def networks(self) -> dict[str, nn.Module]:
        """All components with weights, by their names."""
        return {name: part for name, part in self.pipeline.components.items() if isinstance(part, nn.Module)}

    def stage_of(self, name: str) -> str | None:
        """The stage that a component makes, by its name; None for another's, such as a safety checker."""
        name = "transformer" if name.startswith("unet") else name
        return next((stage for stage, (start, _) in NETWORKS.items() if name.startswith(start)), None)

    def stages(self) -> dict[str, nn.ModuleDict]:
        """The networks of each stage that there is."""
        groups = {s: {n: m for n, m in self.networks.items() if self.stage_of(n) == s} for s in NETWORKS}
        return {stage: nn.ModuleDict(group) for stage, group in groups.items() if group}

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        *,
        size: int | tuple[int, int],
        steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        negative: str | Sequence[str] = "",
        batch: int = 16,
    ) -> Tensor:
        """Images (B, 3, H, W) uint8 of `size` pixels, (height, width) where it is two.

        `steps` and `guidance` None are the pipeline's own; both mean what the pipeline means by them. Resolution bins
        are off: images are drawn at the size that is asked for. ValueError for what the pipeline cannot be told.
        """
        indices = list(range(len(prompts)) if indices is None else indices)
        negatives = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
        _check_counts(prompts, negatives, indices)
        asked = {"num_inference_steps": steps, "guidance_scale": guidance}
        given = {name: value for name, value in asked.items() if value is not None} | self._sized(size)
        self._refuse([*given, *(["negative_prompt"] if any(negatives) else [])])
        parts = [slice(i, i + batch) for i in range(0, len(prompts), batch)]
        made = [self._draw(prompts[p], negatives[p], seed, indices[p], given) for p in parts]
        return torch.cat(made)

    def latent_shape(self, size: int | tuple[int, int]) -> tuple[int, int, int]:
        """(channels, h, w) of latents that are taken as they are."""
        height, width = _pair(size)
        factor = self.pipeline.vae_scale_factor
        return self.denoiser.config.in_channels, height // factor, width // factor

    @contextmanager
    def watching(self, watch: Watch) -> Iterator[None]:
        """Within, every call of a stage's network goes through `watch`."""
        with ExitStack() as stack:
            for name, network in self.networks.items():
                stage = self.stage_of(name)
                if stage is not None:
                    stack.enter_context(_patched(network, NETWORKS[stage][1], partial(watch, stage)))
            yield

    def identity(self) -> Json:
        """What its images depend on beside prompts, size, steps and guidance."""
        import diffusers

        scheduler = self.pipeline.scheduler
        return {
            "pipeline": self.name,
            "scheduler": {"name": type(scheduler).__name__, **_plain_data(scheduler.config)},
            "noise": self.noise,
            "dtype": {name: str(next(part.parameters()).dtype)[6:] for name, part in self.networks.items()},
            "weights_sha256": None if self.folder is None else _hashes(self.folder),
            "safety_checker": getattr(self.pipeline, "safety_checker", None) is not None,
            "diffusers": diffusers.__version__,
        }

    def _draw(
        self, prompts: Sequence[str], negatives: Sequence[str], seed: int, indices: Sequence[int], given: Json
    ) -> Tensor:
        told = {"negative_prompt": list(negatives)} if any(negatives) else {}
        fixed = {"output_type": "pt", "use_resolution_binning": False, **self.options}
        kept = {name: value for name, value in fixed.items() if name in self.accepts}
        with torch.random.fork_rng(enabled=self.noise == "global"):
            if self.noise == "global":
                torch.manual_seed(generator(seed, indices[0]).initial_seed())
            noise = self._noise(given, seed, indices)
            images = self.pipeline(prompt=list(prompts), **told, **given, **kept, **noise).images
        return self._to_uint8(images, len(prompts))

    def _noise(self, given: Json, seed: int, indices: Sequence[int]) -> Json:
        if self.noise == "latents":
            shape = self.latent_shape((given["height"], given["width"]))
            latents = noise_like(shape, seed, indices).to(self.device, self.denoiser.dtype)
            later = [generator(seed, i, LATER) for i in indices]
            return {"latents": latents} | ({"generator": later} if "generator" in self.accepts else {})
        return {"generator": [generator(seed, i) for i in indices]} if self.noise == "generators" else {}

    def _plain(self) -> bool:
        """Whether the denoiser takes the autoencoder's latents (B, C, h, w) as they are."""
        channels = getattr(getattr(self.denoiser, "config", None), "in_channels", None)
        vae = getattr(getattr(self.pipeline, "vae", None), "config", {})
        own = channels is not None and channels == vae.get("latent_channels")
        return own and hasattr(self.pipeline, "vae_scale_factor") and not hasattr(self.pipeline, "_pack_latents")

    def _sized(self, size: int | tuple[int, int]) -> Json:
        height, width = _pair(size)
        return {"height": height, "width": width}

    def _refuse(self, names: Sequence[str]) -> None:
        if lost := [name for name in names if name not in self.accepts]:
            raise ValueError(f"{self.name} takes no {', '.join(lost)}")

    def _to_uint8(self, images: Any, count: int) -> Tensor:
        """From [0, 1]; ValueError for other outputs, and for numbers that are not finite."""
        if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[:2] != (count, 3):
            shape = tuple(getattr(images, "shape", ()))
            raise ValueError(f"{self.name} gave a {type(images).__name__} {shape}, expected images ({count}, 3, H, W)")
        if not self.drawn and not images.isfinite().all():
            raise ValueError(f"{self.name} drew numbers that are not finite; try another dtype than {images.dtype}")
        return images.float().mul(255).round().clamp(0, 255).to(torch.uint8)


def is_pipeline(reference: str | Path) -> bool:
    """Whether it names a pipeline's folder here, or could be one on the hub."""
    path = Path(reference)
    return (path / "model_index.json").is_file() or (not path.exists() and hub.is_hub_id(str(reference)))


@contextmanager
def _patched(owner: nn.Module, name: str, watch: Callable[[Call], Any]) -> Iterator[None]:
    """The method replaced by one that goes through `watch`, with the same signature; afterwards as before."""
    original, own = getattr(owner, name), vars(owner).get(name)

    @wraps(original)
    def watched(*args: Any, **kwargs: Any) -> Any:
        return watch(lambda: original(*args, **kwargs))

    setattr(owner, name, watched)
    try:
        yield
    finally:
        delattr(owner, name)
        if own is not None:
            setattr(owner, name, own)


def _check(folder: Path) -> None:
    """A pipeline of diffusers' own classes: its index says so before anything is loaded."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise SpecError(f"{folder} is no diffusers pipeline: it has no model_index.json")
    name = files.read_json(index).get("_class_name")
    if not isinstance(name, str):
        raise SpecError(f"{folder} brings a pipeline class of its own ({name}), and code from a folder is not run")


def _pipeline(folder: Path, dtype: torch.dtype, variant: str | None) -> Any:
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise ImportError("a pipeline needs diffusers: pip install 'sana_lab[diffusers]'") from error
    options = {"dtype": dtype, "variant": variant, "use_safetensors": True, "trust_remote_code": False}
    try:
        return DiffusionPipeline.from_pretrained(str(folder), local_files_only=True, **options)
    except (OSError, ValueError, AttributeError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise SpecError(f"{folder} cannot be loaded as a diffusers pipeline: {first}") from error


def _check_counts(prompts: Sequence[str], negatives: Sequence[str], indices: Sequence[int]) -> None:
    if isinstance(prompts, str) or not prompts or not all(isinstance(p, str) for p in prompts):
        raise ValueError(f"prompts is {prompts!r}, expected a list with at least one text")
    if len(negatives) != len(prompts) or len(indices) != len(prompts):
        given = f"{len(prompts)} prompts, {len(negatives)} negative prompts and {len(indices)} indices"
        raise ValueError(f"{given} were given, expected as many of each")


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _hashes(folder: Path) -> dict[str, str]:
    """Of every file of weights below a folder."""
    return {p.relative_to(folder).as_posix(): sha256(p) for p in sorted(folder.rglob("*.safetensors"))}


def _plain_data(config: Any) -> Json:
    """What of a scheduler's configuration is plain."""
    return {k: v for k, v in config.items() if isinstance(v, str | int | float | bool | None)}
