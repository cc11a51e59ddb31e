"""Released weights in other people's formats: recognised, named, and turned into a part's state."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sana_lab import architectures, files, keys
from sana_lab.layers import sincos_positions
from sana_lab.parts import SpecError

Spec = dict[str, Any]

FOLDERS = {"dit": "transformer", "autoencoder": "vae", "text_encoder": "text_encoder"}
"""Kind of part -> where a diffusers pipeline keeps it."""

NVLABS = (
    "x_embedder.proj.weight",
    "y_embedder.y_proj.fc1.weight",
    "attention_y_norm.weight",
    "blocks.0.mlp.inverted_conv.conv.weight",
)
"""What every DiT of NVlabs' Sana has, and its shape is read from."""

STRANGERS = {
    "double_blocks.": "FLUX",
    "joint_blocks.": "Stable Diffusion 3",
    "model.diffusion_model.": "a Stable Diffusion",
    "transformer_blocks.0.attn.add_q_proj.": "a Stable Diffusion 3 or FLUX of diffusers",
    "adaln_single.": "a PixArt of diffusers",
    "blocks.0.mlp.fc1.": "a PixArt or plain DiT",
    "encoder.down.0.": "a Stable Diffusion autoencoder in its first format",
    "encoder.stages.0.op_list.": "a DC-AE in efficientvit's own format",
    "model.layers.0.": "a language model",
}
"""How tensors of other models begin."""


class Found(NamedTuple):
    """Weights with what is known of them."""

    kind: str
    spec: Spec
    supplied: Spec  # what other parts would tell this one
    tensors: Mapping[str, Tensor]  # not read before they are asked for
    table: Callable[[Spec], keys.Table]
    source: str
    unused: tuple[str, ...] = ()


def find(
    path: Path,
    kind: str | None = None,
    *,
    ema: bool | None = None,
    variant: str | None = None,
    like: Spec | None = None,
    **hints: Any,
) -> Found:
    """A component folder of diffusers (a pipeline's of that kind), or NVlabs' DiT. SpecError for all else.

    `ema` None takes averaged weights where there are any. `hints` are options of the part that a file may not hold;
    `like` is a spec that gives them where the width is none of NVlabs' own.
    """
    if path.is_dir():
        return _in_folder(path, kind, ema=ema, variant=variant, like=like, **hints)
    if path.suffix == ".safetensors":
        if (path.parent / "config.json").is_file() and path.name.startswith("diffusion_pytorch_model"):
            return component(path.parent, files.read_safetensors(path), **hints)
        return nvlabs(files.read_safetensors(path), str(path), like, **hints)
    return nvlabs(chosen(files.read_torch(path), ema, str(path)), str(path), like, **hints)


def _in_folder(
    path: Path, kind: str | None, *, ema: bool | None, variant: str | None, like: Spec | None, **hints: Any
) -> Found:
    if (path / "model_index.json").is_file():
        path = path / FOLDERS[kind or "dit"]
        if not path.is_dir():
            raise SpecError(f"{path.parent} has no {path.name}/; expected a diffusers component there")
    if (path / "config.json").is_file():
        return component(path, None, variant=variant, **hints)
    released = sorted([*path.glob("checkpoints/*.pth"), *path.glob("*.pth")])
    if len(released) != 1:
        inside = ", ".join(sorted(p.name for p in path.iterdir())) or "nothing"
        raise SpecError(f"{path} holds {inside}; expected model_index.json, config.json, or one .pth of NVlabs")
    return find(released[0], kind, ema=ema, like=like, **hints)


def component(folder: Path, tensors: Mapping[str, Tensor] | None, variant: str | None = None, **hints: Any) -> Found:
    """A component folder of diffusers, its class read from config.json."""
    known, spec, supplied = architectures.read(files.read_json(folder / "config.json"), str(folder))
    given = files.component(folder, variant) if tensors is None else tensors
    return Found(known.kind, {**spec, **hints}, supplied, _renamed(given, known), known.table, str(folder))


def _renamed(tensors: Mapping[str, Tensor], known: architectures.Architecture) -> Mapping[str, Tensor]:
    """The first KL autoencoders call the layers of their attention otherwise."""
    old = {k: k for k in tensors if ".attentions.0." in k and k.split(".")[-2] in keys.VAE_OLD}
    if not old or known is not architectures.KNOWN["AutoencoderKL"]:
        return tensors
    modern = {k: k.replace(f".{k.split('.')[-2]}.", f".{keys.VAE_OLD[k.split('.')[-2]]}.") for k in old}
    return {modern.get(k, k): tensors[k] for k in tensors}


def chosen(checkpoint: Any, ema: bool | None, source: str) -> Mapping[str, Tensor]:
    """The state dict of NVlabs' checkpoint: averaged where there is one, unless `ema` says otherwise."""
    if not isinstance(checkpoint, Mapping):
        raise SpecError(f"{source} holds {type(checkpoint).__name__}, expected a state dict")
    averaged, raw = checkpoint.get("state_dict_ema"), checkpoint.get("state_dict")
    if ema and not averaged:
        raise SpecError(f"{source} holds no state_dict_ema, only {', '.join(checkpoint)[:200]}; expected ema=False")
    state = averaged if averaged and ema is not False else raw or checkpoint
    tensors = {k.removeprefix("module."): v for k, v in state.items() if isinstance(v, Tensor)}
    if len(tensors) < len(state):
        odd = [str(k) for k in state if str(k).removeprefix("module.") not in tensors]
        raise SpecError(f"{source} holds more than tensors: {', '.join(odd[:6])}; expected state_dict")
    return tensors


def nvlabs(state: Mapping[str, Tensor], source: str, like: Spec | None = None, **hints: Any) -> Found:
    """NVlabs' DiT by its tensors. SpecError says what else it is, or which option it does not hold."""
    if lost := [k for k in NVLABS if k not in state]:
        raise SpecError(f"{source} {_stranger(state, lost)}")
    if like is not None and state[NVLABS[0]].shape[0] not in architectures.KNOWN_WIDTHS:
        hints = {"cross_heads": like.get("cross_heads"), "attention": like.get("attention"), **hints}
    spec, supplied = nvlabs_spec(state, source, hints)
    return Found("dit", spec, supplied, state, keys.sana_nvlabs, source, keys.NVLABS_UNUSED)


def _stranger(state: Iterable[str], lost: list[str]) -> str:
    named = {"caption_norm.weight", "transformer_blocks.0.attn1.to_q.weight"}
    if named <= set(state):
        return "holds a SanaTransformer2DModel of diffusers without its config.json, which says what no tensor shows"
    known = next((name for start, name in STRANGERS.items() if any(k.startswith(start) for k in state)), None)
    if known:
        return f"holds {known}, which is another architecture; expected NVlabs' Sana or a diffusers component's folder"
    return f"is no DiT of NVlabs' Sana: {', '.join(lost)} missing; it begins {', '.join(list(state)[:3]) or 'empty'}"


def nvlabs_spec(state: Mapping[str, Tensor], source: str, hints: Spec) -> tuple[Spec, Spec]:
    """The spec of `sana`, and its channels and text width; what the file does not hold comes from `hints`."""
    dim, channels, patch, _ = state["x_embedder.proj.weight"].shape
    heads = hints.get("cross_heads", architectures.KNOWN_WIDTHS.get(dim))
    if heads is None:
        known = ", ".join(f"{h} of width {w}" for w, h in architectures.KNOWN_WIDTHS.items())
        raise SpecError(
            f"{source} is {dim} wide, and does not hold how many heads its cross-attention has (known are {known}); "
            "expected the option cross_heads"
        )
    sprint = "cfg_embedder.mlp.0.weight" in state
    spec = {
        "name": "sana",
        "dim": dim,
        "depth": 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks.")),
        "patch": patch,
        "attention": {"name": "linear", "head_dim": 32, "qk_norm": "blocks.0.attn.q_norm.weight" in state},
        "ffn": {"name": "mix", "ratio": state["blocks.0.mlp.inverted_conv.conv.weight"].shape[0] / 2 / dim},
        "cross_heads": heads,
        "cross_norm": "blocks.0.cross_attn.q_norm.weight" in state,
        **positions(state.get("pos_embed"), source, hints),
        **({"time_scale": 1.0, "guidance": 0.1} if sprint else {}),
    }
    return {**spec, **hints}, {"channels": channels, "text_dim": state["y_embedder.y_proj.fc1.weight"].shape[1]}


def positions(saved: Tensor | None, source: str, hints: Spec) -> Spec:
    """What the saved buffer (1, N, dim) shows: zeros where the model has no positions, else grid and interpolation."""
    if saved is None or "position" in hints or not saved.any():
        return {}
    base, dim = round(saved.shape[1] ** 0.5), saved.shape[2]
    table = saved[0].float().unflatten(0, (base, base))
    for interpolation in (0.5, 1.0, 2.0, 4.0):
        if torch.allclose(sincos_positions(base, base, dim, base, interpolation, saved.device), table, atol=0.01):
            return {"position": "sincos", "base": base, "interpolation": interpolation}
    raise SpecError(
        f"{source} has a position embedding of {base} x {base} tokens that is no sine-cosine interpolated by 0.5, 1, 2 "
        "or 4; expected the options position, base and interpolation"
    )


def state_for(part: nn.Module, found: Found) -> dict[str, Tensor]:
    """The part's whole state from those weights: views of the files where a tensor is ours as it is."""
    own: dict[str, Tensor] = part.state_dict()
    spec: Any = part.spec
    state = keys.to_ours(own, found.tensors, found.table(spec), found.source, found.unused)
    rest = {k: v for k, v in own.items() if k not in state}
    assert not rest.keys() - {"shift", "scale"}, rest.keys()
    return state | {k: torch.full(v.shape, found.spec.get(k, spec[k]), dtype=v.dtype) for k, v in rest.items()}


def check_agree(spec: Spec, found: Found) -> None:
    """SpecError where a spec reads these weights otherwise than they were trained, in a way that no shape shows."""
    for key in ("cross_heads", "time_scale", "guidance"):
        if key in found.spec and found.spec[key] != spec[key]:
            raise SpecError(f"{found.source} has {key} {found.spec[key]!r}, and the spec says {spec[key]!r}")
    given, expected = (s.get("attention", {}) for s in (spec, found.spec))
    if "head_dim" in expected and given.get("head_dim") != expected["head_dim"]:
        raise SpecError(f"{found.source} has heads of {expected['head_dim']}, the spec of {given.get('head_dim')}")
