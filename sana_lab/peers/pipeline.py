"""A diffusers text-to-image pipeline with the sampling interface of sana_lab's systems."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sana_lab.checkpoints import files, hub
from sana_lab.config.digests import sha256
from sana_lab.config.specs import SpecError
from sana_lab.costs.timing import Call
from sana_lab.diffusion.sampling import check_request, generator, noise_like
from sana_lab.types import Json

Watch = Callable[[str, Call], Any]
"""(stage, call) -> the call's result; must run the call exactly once."""

Noise = Literal["latents", "generators", "global"]
"""Source of the pipeline's initial noise: given latents, one generator per image, or the global random state."""

NETWORKS = {"text": ("text_encoder", "forward"), "denoise": ("transformer", "forward"), "decode": ("vae", "decode")}
"""stage -> prefix of its components' names, and the method called by the pipeline. A `unet` is also a denoiser."""

SAMPLER_NOISE = 1
"""Generator key of the noise that a stochastic scheduler adds at each step, distinct from that of the initial noise."""


class Peer:
    """A diffusers pipeline with the sampling interface of sana_lab's systems.

    The noise of image i depends only on (seed, index i). If the denoiser takes the autoencoder's latents unchanged
    (Sana, PixArt, Stable Diffusion 1 to 3), `noise` is "latents": the initial latents of sana_lab's systems, rounded to
    the denoiser's dtype. Pipelines that pack or reshape latents (FLUX) sample them from one generator per image:
    "generators". Pipelines that accept neither use the global random state, "global"; their images depend on the batch.
    """

    def __init__(
        self,
        pipeline: Any,
        folder: Path | None = None,  # folder of its weights, for `identity`; None if built without files
        *,
        options: Json | None = None,  # arguments of every call, such as max_sequence_length
        random_init: bool = False,  # random weights: images need not be finite
    ) -> None:
        self.pipeline, self.folder, self.options, self.random_init = pipeline, folder, options or {}, random_init
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
        """Load a pipeline's folder or hub id, safetensors only.

        `dtype` None is float32, `device` None a GPU if available, `variant` that of the weight files, such as fp16.
        SpecError if the reference is not a pipeline, needs custom code or contains pickles.
        """
        folder = hub.locate(str(reference))
        _check_index(folder)
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
        """Source of the initial noise."""
        if "latents" in self.accepts and self._takes_plain_latents():
            return "latents"
        return "generators" if "generator" in self.accepts else "global"

    @property
    def denoiser(self) -> Any:
        """The denoising network: component `transformer` or `unet`; None if there is neither."""
        return getattr(self.pipeline, "transformer", None) or getattr(self.pipeline, "unet", None)

    @property
    def networks(self) -> dict[str, nn.Module]:
        """All components with weights, by name."""
        return {name: part for name, part in self.pipeline.components.items() if isinstance(part, nn.Module)}

    def stage_of(self, name: str) -> str | None:
        """The stage that a component belongs to, by its name; None for others, such as a safety checker."""
        name = "transformer" if name.startswith("unet") else name
        return next((stage for stage, (start, _) in NETWORKS.items() if name.startswith(start)), None)

    def stages(self) -> dict[str, nn.ModuleDict]:
        """The networks of each stage that the pipeline has."""
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
        """Images (B, 3, H, W) uint8 for B prompts; `size` in pixels, one side or (height, width).

        `steps` and `guidance` have the pipeline's meaning; None is its default. Resolution binning is off, so images
        have exactly this size. `batch` images are generated per call. ValueError for an argument that the pipeline does
        not accept.
        """
        indices = list(range(len(prompts)) if indices is None else indices)
        negatives = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
        check_request(prompts, negatives, indices)
        height, width = _pair(size)
        optional = {"num_inference_steps": steps, "guidance_scale": guidance}
        arguments = {name: value for name, value in optional.items() if value is not None}
        arguments |= {"height": height, "width": width}
        self._check_accepted([*arguments, *(["negative_prompt"] if any(negatives) else [])])
        chunks = [slice(i, i + batch) for i in range(0, len(prompts), batch)]
        images = [self._sample_batch(prompts[c], negatives[c], seed, indices[c], arguments) for c in chunks]
        return torch.cat(images)

    def latent_shape(self, size: int | tuple[int, int]) -> tuple[int, int, int]:
        """(channels, h, w) of the latents of an image, if `noise` is "latents"."""
        height, width = _pair(size)
        factor = self.pipeline.vae_scale_factor
        return self.denoiser.config.in_channels, height // factor, width // factor

    @contextmanager
    def watching(self, watch: Watch) -> Iterator[None]:
        """Context in which every call of a stage's network goes through `watch`."""
        with ExitStack() as stack:
            for name, network in self.networks.items():
                stage = self.stage_of(name)
                if stage is not None:
                    stack.enter_context(_patched(network, NETWORKS[stage][1], partial(watch, stage)))
            yield

    def identity(self) -> Json:
        """Facts that images depend on besides prompts, size, steps and guidance, as plain data."""
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

    def _sample_batch(
        self, prompts: Sequence[str], negatives: Sequence[str], seed: int, indices: Sequence[int], arguments: Json
    ) -> Tensor:
        negative = {"negative_prompt": list(negatives)} if any(negatives) else {}
        constant = {"output_type": "pt", "use_resolution_binning": False, **self.options}
        constant = {name: value for name, value in constant.items() if name in self.accepts}
        with torch.random.fork_rng(enabled=self.noise == "global"):
            if self.noise == "global":
                torch.manual_seed(generator(seed, indices[0]).initial_seed())
            noise = self._noise_arguments(arguments, seed, indices)
            images = self.pipeline(prompt=list(prompts), **negative, **arguments, **constant, **noise).images
        return self._to_uint8(images, len(prompts))

    def _noise_arguments(self, arguments: Json, seed: int, indices: Sequence[int]) -> Json:
        if self.noise == "latents":
            shape = self.latent_shape((arguments["height"], arguments["width"]))
            latents = noise_like(shape, seed, indices).to(self.device, self.denoiser.dtype)
            per_step = [generator(seed, i, SAMPLER_NOISE) for i in indices]
            return {"latents": latents} | ({"generator": per_step} if "generator" in self.accepts else {})
        return {"generator": [generator(seed, i) for i in indices]} if self.noise == "generators" else {}

    def _takes_plain_latents(self) -> bool:
        """Whether the denoiser takes the autoencoder's latents (B, C, h, w) unchanged."""
        channels = getattr(getattr(self.denoiser, "config", None), "in_channels", None)
        vae = getattr(getattr(self.pipeline, "vae", None), "config", {})
        same = channels is not None and channels == vae.get("latent_channels")
        return same and hasattr(self.pipeline, "vae_scale_factor") and not hasattr(self.pipeline, "_pack_latents")

    def _check_accepted(self, arguments: Sequence[str]) -> None:
        if missing := [name for name in arguments if name not in self.accepts]:
            raise ValueError(f"{self.name} takes no {', '.join(missing)}")

    def _to_uint8(self, images: Any, count: int) -> Tensor:
        """Images (count, 3, H, W) from [0, 1] to uint8. ValueError for other outputs and non-finite numbers."""
        if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[:2] != (count, 3):
            shape = tuple(getattr(images, "shape", ()))
            raise ValueError(f"{self.name} gave a {type(images).__name__} {shape}, expected images ({count}, 3, H, W)")
        if not self.random_init and not images.isfinite().all():
            raise ValueError(f"{self.name} gave numbers that are not finite; try another dtype than {images.dtype}")
        return images.float().mul(255).round().clamp(0, 255).to(torch.uint8)


def is_pipeline(reference: str | Path) -> bool:
    """Whether a reference is a pipeline's folder, or could be a hub id."""
    path = Path(reference)
    return (path / "model_index.json").is_file() or (not path.exists() and hub.is_hub_id(str(reference)))


@contextmanager
def _patched(owner: nn.Module, name: str, watch: Callable[[Call], Any]) -> Iterator[None]:
    """Replace a method by one with the same signature that goes through `watch`; restore it afterwards."""
    original, override = getattr(owner, name), vars(owner).get(name)

    @wraps(original)
    def watched(*args: Any, **kwargs: Any) -> Any:
        return watch(lambda: original(*args, **kwargs))

    setattr(owner, name, watched)
    try:
        yield
    finally:
        delattr(owner, name)
        if override is not None:
            setattr(owner, name, override)


def _check_index(folder: Path) -> None:
    """SpecError unless the folder's index names a class of diffusers, before anything is loaded."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise SpecError(f"{folder} is no diffusers pipeline: it has no model_index.json")
    entries = files.read_json(index)
    name = entries.get("_class_name")
    if not isinstance(name, str):
        raise SpecError(f"{folder} has a custom pipeline class ({name}), and code from a folder is not run")
    for component, entry in entries.items():
        is_class = isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)
        if is_class and not _is_library(entry[0]):
            raise SpecError(
                f"{folder}: {component} is {entry}, code from outside diffusers and transformers, which a folder may "
                "not bring"
            )


def _is_library(name: str) -> bool:
    """Whether the classes of a component are diffusers', of one of its pipelines, or transformers'."""
    if name in ("diffusers", "transformers"):
        return True
    diffusers = find_spec("diffusers")
    places = diffusers.submodule_search_locations if diffusers else None
    return name.isidentifier() and any(Path(place, "pipelines", name).is_dir() for place in places or ())


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


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each weight file below a folder."""
    return {p.relative_to(folder).as_posix(): sha256(p) for p in sorted(folder.rglob("*.safetensors"))}


def _plain_data(config: Any) -> Json:
    """The entries of a scheduler's configuration that are plain data."""
    return {k: v for k, v in config.items() if isinstance(v, str | int | float | bool | None)}
