"""Other people's pipelines at their published shapes, their weights drawn at random: for speed, which does not depend
on weights; and counted on the meta device, where there are none."""

import importlib
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from sana_lab.config.specs import SpecError, nearest
from sana_lab.costs.flops import count_macs, parameters, whole_masks
from sana_lab.models.text.tokenizer import offline_tokenizer
from sana_lab.peers.configs import PEERS, Part
from sana_lab.peers.pipeline import NETWORKS, Peer

CPU = torch.device("cpu")


class Counts(NamedTuple):
    """What a pipeline's call comes to, by shapes."""

    macs: dict[str, int]  # by stage, of one image
    forward: int  # MACs of one row of a denoiser's call
    evaluations: int  # calls of the denoiser
    rows: int  # of each: 2 where guidance doubles the batch
    tokens: int  # of the image, in the denoiser
    text_tokens: int


def known(name: str) -> Part:
    """A published pipeline. SpecError with the nearest name."""
    if name not in PEERS:
        raise SpecError(f"no pipeline is known as {name!r}; {nearest(name, PEERS)}")
    return PEERS[name]


def draw(name: str, size: int, device: torch.device, dtype: torch.dtype, toy: bool = False) -> Peer:
    """The pipeline with random weights on a device, without any file; `toy` is a small one of the same kind.

    Its tokenizers are the offline one's, padded to the published lengths as the pipeline pads: texts are as long as the
    real ones. SD3's table of positions ends at 192 x 192 tokens (3072 px): above that it is made as large as needed.
    """
    spec = known(name)
    parts = {role: _sized(part, size) for role, part in spec["components"].items()}
    networks = {role: _network(part, device, dtype, toy) for role, part in parts.items()}
    tokenizers = {role: _tokenizer(length) for role, length in spec["tokenizers"].items()}
    scheduler = _find(spec["scheduler"]["class"])(**spec["scheduler"]["config"])
    pipeline = _find(f"diffusers:{spec['pipeline']}")(
        **networks, **tokenizers, scheduler=scheduler, **spec.get("absent", {})
    )
    return Peer(pipeline, options=spec.get("options"), drawn=True)


def count(name: str, prompt: str, size: int, steps: int, guidance: float, toy: bool = False) -> tuple[Peer, Counts]:
    """The pipeline on the meta device, and what one call of it comes to.

    The pipeline itself runs, on the host: its tokenizers, its loop, its scheduler. Its networks hold no numbers: each
    call of one is counted by shapes and gives zeros.
    """
    peer = draw(name, size, torch.device("meta"), torch.float32, toy)
    told: dict[str, Any] = {"height": size, "width": size, "num_inference_steps": steps, "guidance_scale": guidance}
    fixed = {"output_type": "latent", "use_resolution_binning": False, **peer.options}
    told |= {key: value for key, value in fixed.items() if key in peer.accepts}
    tally = Tally(peer)
    peer.pipeline.__class__ = type(peer.name, (type(peer.pipeline),), {"_execution_device": CPU, "device": CPU})
    with torch.no_grad(), whole_masks(nn.ModuleDict(peer.networks)):
        peer.pipeline(prompt=[prompt], **told)
        tally.decode(size)
    return peer, tally.counts()


class Tally:
    """Stands between a pipeline and its networks on the meta device, and counts what they are asked."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.macs = dict.fromkeys(NETWORKS, 0)
        self.known: dict[str, tuple[int, Any]] = {}  # by shapes: what a call comes to, and what it gives
        self.asked: list[Mapping[str, Any]] = []  # of the denoiser
        for role, network in peer.networks.items():
            if peer.stage_of(role) in ("text", "denoise"):
                network.forward = partial(self.call, role, network.forward)

    def call(self, role: str, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """One call: counted once for its shapes, and zeros of its outputs' shapes on the host."""
        stage = self.peer.stage_of(role)
        given = tree_map(partial(_moved, device="meta"), (args, kwargs))
        key = f"{role} {tree_map(_shape, given)}"
        if key not in self.known:
            out: list[Any] = []
            macs = count_macs(lambda: out.append(forward(*given[0], **given[1])))
            self.known[key] = macs, tree_map(_zeros, out[0])
        macs, result = self.known[key]
        self.macs[str(stage)] += macs
        if stage == "denoise":
            self.asked.append({**kwargs, "macs": macs, "x": kwargs.get("hidden_states", args[0] if args else None)})
        return result

    def decode(self, size: int) -> None:
        """The decoder alone, of latents of that size."""
        vae: Any = self.peer.networks["vae"]
        side = size // self.peer.pipeline.vae_scale_factor
        latents = torch.empty(1, vae.config.latent_channels, side, side, device="meta")
        self.macs["decode"] += count_macs(lambda: vae.decode(latents))

    def counts(self) -> Counts:
        first = self.asked[0]
        x, rows = first["x"], first["x"].shape[0]
        config = self.peer.denoiser.config
        tokens = x.shape[1] if x.ndim == 3 else x.shape[2] * x.shape[3] // config.patch_size**2
        texts = (first.get(key) for key in ("encoder_hidden_states", "encoder_hidden_states_t5"))
        length = sum(text.shape[1] for text in texts if text is not None)
        return Counts(self.macs, first["macs"] // rows, len(self.asked), rows, tokens, length)


def params(peer: Peer) -> dict[str, int]:
    """Parameters of all networks and of the denoiser."""
    return {
        "all": parameters(nn.ModuleDict(peer.networks))["total"],
        "denoiser": parameters(peer.denoiser)["total"],
    }


def _network(part: Part, device: torch.device, dtype: torch.dtype, toy: bool) -> nn.Module:
    kind = _find(part["class"])
    config = {**part["config"], **(part["toy"] if toy else {})}
    with device:
        made = kind(**config) if part["class"].startswith("diffusers") else kind(kind.config_class(**config))
    return nn.Module.to(made, device, dtype).eval()  # not diffusers' own, which warns of what is to stay in float32


def _sized(part: Part, size: int) -> Part:
    """With a table of positions that is large enough."""
    most = part["config"].get("pos_embed_max_size")
    if most is None:
        return part
    return {**part, "config": {**part["config"], "pos_embed_max_size": max(most, size // 16)}}


def _tokenizer(length: int) -> Any:
    made = offline_tokenizer(start=True)
    made.model_max_length = length
    return made


def _find(name: str) -> Any:
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise ImportError(f"{attribute} needs {module}: pip install 'sana_lab[diffusers]'") from error


def _moved(value: Any, device: str) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else value


def _zeros(value: Any) -> Any:
    return torch.zeros(value.shape, dtype=value.dtype, device="cpu") if isinstance(value, Tensor) else value
