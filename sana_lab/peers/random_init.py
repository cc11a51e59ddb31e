"""Published pipelines with random weights, for timing, and on the meta device, for counting operations."""

import importlib
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from sana_lab.config.specs import SpecError, nearest
from sana_lab.costs import flops
from sana_lab.costs.flops import count_macs
from sana_lab.models.text.tokenizer import offline_tokenizer
from sana_lab.peers.configs import PEERS, Component
from sana_lab.peers.pipeline import NETWORKS, Peer

CPU = torch.device("cpu")


class Counts(NamedTuple):
    """Operations and shapes of one call of a pipeline."""

    macs: dict[str, int]  # by stage, for one image
    forward: int  # MACs of one row of a denoiser call
    evaluations: int  # denoiser calls
    rows: int  # batch rows per call: 2 if guidance doubles the batch
    tokens: int  # image tokens in the denoiser
    text_tokens: int


def config_of(name: str) -> Component:
    """A published configuration. SpecError with the nearest name."""
    if name not in PEERS:
        raise SpecError(f"no pipeline is known as {name!r}; {nearest(name, PEERS)}")
    return PEERS[name]


def build(name: str, size: int, device: torch.device, dtype: torch.dtype, toy: bool = False) -> Peer:
    """A pipeline with random weights, without reading files; `toy` is a small one with the same component classes.

    All tokenizers are the offline tokenizer with the pipeline's padding to the published lengths, so that text has its
    real length. SD3's position table covers 192 x 192 tokens (3072 px) and is enlarged for larger images.
    """
    config = config_of(name)
    components = {role: _fit_positions(part, size) for role, part in config["components"].items()}
    networks = {role: _network(part, device, dtype, toy) for role, part in components.items()}
    tokenizers = {role: _tokenizer(length) for role, length in config["tokenizers"].items()}
    scheduler = _import(config["scheduler"]["class"])(**config["scheduler"]["config"])
    pipeline = _import(f"diffusers:{config['pipeline']}")(
        **networks, **tokenizers, scheduler=scheduler, **config.get("absent", {})
    )
    return Peer(pipeline, options=config.get("options"), random_init=True)


def count(name: str, prompt: str, size: int, steps: int, guidance: float, toy: bool = False) -> tuple[Peer, Counts]:
    """The pipeline on the meta device, and the operations of one call for one image.

    Tokenizers, loop and scheduler run on the host. Networks have no values: each call is counted from its shapes and
    returns zeros.
    """
    counter = trace(name, prompt, size, steps, guidance, toy)
    with torch.no_grad():
        counter.decode(size)
    return counter.peer, counter.counts()


def trace(
    name: str,
    prompt: str,
    size: int,
    steps: int,
    guidance: float,
    toy: bool = False,
    dtype: torch.dtype = torch.float32,
) -> "CallCounter":
    """The calls of the pipeline on the meta device for one image, without the decoder."""
    peer = build(name, size, torch.device("meta"), dtype, toy)
    arguments: dict[str, Any] = {"height": size, "width": size, "num_inference_steps": steps}
    arguments["guidance_scale"] = guidance
    optional = {"output_type": "latent", "use_resolution_binning": False, **peer.options}
    arguments |= {key: value for key, value in optional.items() if key in peer.accepts}
    counter = CallCounter(peer)
    peer.pipeline.__class__ = type(peer.name, (type(peer.pipeline),), {"_execution_device": CPU, "device": CPU})
    with torch.no_grad(), flops.expanded_masks(nn.ModuleDict(peer.networks)):
        peer.pipeline(prompt=[prompt], **arguments)
    return counter


class NetworkCall(NamedTuple):
    """Calls of a network with arguments of equal shapes."""

    role: str  # component of the pipeline
    key: str  # role and shapes
    args: tuple[Any, ...]  # on the host: token ids and masks as they were, features and latents zeros
    kwargs: Mapping[str, Any]
    times: int


class CallCounter:
    """Counter of calls, replacing the forward of a pipeline's text encoders and denoiser on the meta device."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.macs = dict.fromkeys(NETWORKS, 0)
        self.results: dict[str, tuple[int, Any]] = {}  # by shapes: MACs and output of a call
        self.denoiser_calls: list[Mapping[str, Any]] = []
        self.by_shapes: dict[str, NetworkCall] = {}
        self.replaced: list[nn.Module] = []
        for role, network in peer.networks.items():
            if peer.stage_of(role) in ("text", "denoise"):
                self.replaced.append(network)
                network.forward = partial(self.call, role, network.forward)

    def call(self, role: str, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """Count a call, running `forward` once per set of shapes; return host zeros of the outputs' shapes."""
        stage = self.peer.stage_of(role)
        on_meta = tree_map(partial(_to_device, device="meta"), (args, kwargs))
        key = f"{role} {tree_map(_shape, on_meta)}"
        if key not in self.results:
            out: list[Any] = []
            macs = count_macs(lambda: out.append(forward(*on_meta[0], **on_meta[1])))
            self.results[key] = macs, tree_map(_zeros, out[0])
        times = self.by_shapes[key].times if key in self.by_shapes else 0
        self.by_shapes[key] = NetworkCall(role, key, args, kwargs, times + 1)
        macs, result = self.results[key]
        self.macs[str(stage)] += macs
        if stage == "denoise":
            latents = kwargs.get("hidden_states", args[0] if args else None)
            self.denoiser_calls.append({**kwargs, "macs": macs, "latents": latents})
        return result

    def decode(self, size: int) -> None:
        """Count the decoder on the latents of one image."""
        vae: Any = self.peer.networks["vae"]
        side = size // self.peer.pipeline.vae_scale_factor
        latents = torch.empty(1, vae.config.latent_channels, side, side, device="meta")
        self.macs["decode"] += count_macs(lambda: vae.decode(latents))

    def network_calls(self) -> list[NetworkCall]:
        """The calls of text encoders and denoiser by shapes; afterwards the networks have their own forwards again."""
        while self.replaced:
            del self.replaced.pop().forward
        return [*self.by_shapes.values()]

    def counts(self) -> Counts:
        call = self.denoiser_calls[0]
        latents, rows = call["latents"], call["latents"].shape[0]  # (rows, N, C) or (rows, C, h, w)
        config = self.peer.denoiser.config
        tokens = latents.shape[1] if latents.ndim == 3 else latents.shape[2] * latents.shape[3] // config.patch_size**2
        texts = (call.get(key) for key in ("encoder_hidden_states", "encoder_hidden_states_t5"))
        text_tokens = sum(text.shape[1] for text in texts if text is not None)
        return Counts(self.macs, call["macs"] // rows, len(self.denoiser_calls), rows, tokens, text_tokens)


def count_parameters(peer: Peer) -> dict[str, int]:
    """Parameters of all networks (`all`) and of the denoiser (`denoiser`)."""
    return {
        "all": flops.count_parameters(nn.ModuleDict(peer.networks))["total"],
        "denoiser": flops.count_parameters(peer.denoiser)["total"],
    }


def _network(part: Component, device: torch.device, dtype: torch.dtype, toy: bool) -> nn.Module:
    cls = _import(part["class"])
    config = {**part["config"], **(part["toy"] if toy else {})}
    with device:
        network = cls(**config) if part["class"].startswith("diffusers") else cls(cls.config_class(**config))
    return nn.Module.to(network, device, dtype).eval()  # diffusers' `to` warns about modules kept in float32


def _fit_positions(part: Component, size: int) -> Component:
    """The component with a position table large enough for images of this size."""
    limit = part["config"].get("pos_embed_max_size")
    if limit is None:
        return part
    return {**part, "config": {**part["config"], "pos_embed_max_size": max(limit, size // 16)}}


def _tokenizer(length: int) -> Any:
    tokenizer = offline_tokenizer(start=True)
    tokenizer.model_max_length = length
    return tokenizer


def _import(name: str) -> Any:
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise ImportError(f"{attribute} needs {module}: pip install 'sana_lab[diffusers]'") from error


def _to_device(value: Any, device: str) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else value


def _zeros(value: Any) -> Any:
    return torch.zeros(value.shape, dtype=value.dtype, device="cpu") if isinstance(value, Tensor) else value
