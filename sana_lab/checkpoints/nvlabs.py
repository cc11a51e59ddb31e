"""NVlabs' own checkpoints of SANA: the state dict chosen, and the spec of `sana` inferred from its tensors."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor

from sana_lab.checkpoints import key_tables, state_dicts
from sana_lab.checkpoints.state_dicts import ChosenState
from sana_lab.config.validation import SpecError

Spec = dict[str, Any]
State = Mapping[str, Tensor]

REQUIRED_KEYS = (
    "x_embedder.proj.weight",
    "y_embedder.y_proj.fc1.weight",
    "attention_y_norm.weight",
    "blocks.0.mlp.inverted_conv.conv.weight",
)
"""Tensors that every SANA DiT of NVlabs has and whose shapes the spec is inferred from."""

OTHER_MODELS = {
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
"""Prefix of tensor names -> the model that has them."""

HEADS_OF_WIDTH = {1152: 16, 2240: 20}
"""Width of a released DiT -> heads of its cross-attention, which no tensor's shape shows."""

WIDTH_1_5 = 2240
"""Width of both SANA-1.5 DiTs."""


def choose_state(checkpoint: Any, ema: bool | None, source: str) -> ChosenState:
    """The averaged state dict of a checkpoint if it has one, the raw one if not or where `ema` is false. SpecError.

    For another model, its state dict, so that `check_architecture` can name the model.
    """
    if not isinstance(checkpoint, Mapping):
        raise SpecError(f"{source} holds {type(checkpoint).__name__}, expected a state dict")
    if chosen := state_dicts.choose(checkpoint, REQUIRED_KEYS, ema, source):
        return chosen
    averaged, raw = checkpoint.get("state_dict_ema"), checkpoint.get("state_dict")
    if ema and not averaged:
        raise SpecError(f"{source} holds no state_dict_ema, only {', '.join(checkpoint)[:200]}; expected ema=False")
    state = averaged if averaged and ema is not False else raw or checkpoint
    tensors = _tensors(state, source)
    if state is checkpoint:
        return ChosenState(tensors, "the file's only state", ())
    name, what = ("state_dict_ema", "averaged") if state is averaged else ("state_dict", "raw")
    ignored = tuple(str(k) for k in checkpoint if k != name and checkpoint[k])
    return ChosenState(tensors, f"{name}, the {what} weights", ignored)


def _tensors(state: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """The tensors by name without DistributedDataParallel's prefix. SpecError for other content."""
    tensors = {state_dicts.unwrapped(k): v for k, v in state.items() if isinstance(v, Tensor)}
    if len(tensors) < len(state):
        others = [str(k) for k in state if state_dicts.unwrapped(str(k)) not in tensors]
        raise SpecError(f"{source} holds more than tensors: {', '.join(others[:6])}; expected state_dict")
    return tensors


def check_architecture(state: State, source: str) -> None:
    """SpecError that names the other model, where these are not the tensors of a SANA DiT of NVlabs."""
    names = set(state)
    missing = [k for k in REQUIRED_KEYS if k not in names]
    if not missing:
        return
    if names >= {"caption_norm.weight", "transformer_blocks.0.attn1.to_q.weight"}:
        raise SpecError(
            f"{source} holds a SanaTransformer2DModel of diffusers without its config.json, which says what no tensor "
            "shows"
        )
    if other := next((m for prefix, m in OTHER_MODELS.items() if any(k.startswith(prefix) for k in names)), None):
        raise SpecError(
            f"{source} holds {other}, which is another architecture; expected NVlabs' Sana or a diffusers component's "
            "folder"
        )
    first = ", ".join(list(state)[:3]) or "empty"
    raise SpecError(f"{source} is no DiT of NVlabs' Sana: {', '.join(missing)} missing; it begins {first}")


def with_hints_of(spec: Spec | None, state: State, hints: Spec) -> Spec:
    """`hints`, and from an experiment's `spec` those options that this file does not determine."""
    if spec is None:
        return hints
    if state[REQUIRED_KEYS[0]].shape[0] not in HEADS_OF_WIDTH:
        hints = {"cross_heads": spec.get("cross_heads"), "attention": spec.get("attention"), **hints}
    if is_time_ambiguous(state):
        hints = {"time_scale": spec.get("time_scale"), **hints}
    return hints


def infer_spec(state: State, source: str, hints: Spec) -> tuple[Spec, Spec]:
    """The spec of `sana`, and (channels, text_dim) as `supplied`. SpecError names the options that `hints` must give.

    Heads follow from the two released widths only. The network reads 1000 t without norms of q and k (SANA 1.0) and t
    with a guidance embedding (Sprint). With norms only it may be SANA-1.5 (1000 t) or a teacher of Sprint (t): 1000 t
    is assumed at the width of SANA-1.5, and at any other width `hints` must give `time_scale`.
    """
    dim, channels, patch, _ = state["x_embedder.proj.weight"].shape
    heads = hints.get("cross_heads", HEADS_OF_WIDTH.get(dim))
    _check_hints(dim, heads, source, hints)
    is_sprint = "cfg_embedder.mlp.0.weight" in state
    if is_time_ambiguous(state) and dim != WIDTH_1_5 and hints.get("time_scale") is None:
        raise SpecError(
            f"{source} norms q and k, and does not hold whether its network reads 1000 t, as SANA-1.5, or t, as the "
            "teachers of Sprint; expected the option time_scale, 1000 or 1"
        )
    spec = {
        "name": "sana",
        "dim": dim,
        "depth": 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks.")),
        "patch": patch,
        "attention": {"name": "linear", "head_dim": 32, "qk_norm": "blocks.0.attn.q_norm.weight" in state},
        "ffn": {"name": "mix", "ratio": state["blocks.0.mlp.inverted_conv.conv.weight"].shape[0] / 2 / dim},
        "cross_heads": heads,
        "cross_norm": "blocks.0.cross_attn.q_norm.weight" in state,
        "cross_norm_eps": 1e-6,
        **_positions(state.get("pos_embed"), source, hints),
        **({"time_scale": 1.0, "guidance": 0.1} if is_sprint else {"time_scale": 1000.0}),
    }
    supplied = {"channels": channels, "text_dim": state["y_embedder.y_proj.fc1.weight"].shape[1]}
    return spec, supplied


def notes(state: State, ignored: Iterable[str], hints: Spec) -> list[str]:
    """Notes on omitted tensors and assumptions."""
    unused = [k for k in state if any(fnmatch(k, pattern) for pattern in key_tables.NVLABS_UNUSED)]
    left_out = [*unused, *ignored]
    sentences = [f"left out: {', '.join(left_out)}"] if left_out else []
    if "time_scale" not in hints and is_time_ambiguous(state):
        sentences.append("time_scale: 1000 is taken, as in SANA-1.5; a teacher of Sprint has 1 (--set time_scale=1)")
    return sentences


def is_time_ambiguous(state: State) -> bool:
    """Whether no tensor shows if the network reads t or 1000 t."""
    return "blocks.0.attn.q_norm.weight" in state and "cfg_embedder.mlp.0.weight" not in state


def _check_hints(dim: int, heads: int | None, source: str, hints: Spec) -> None:
    """SpecError if heads follow neither from the width nor from `hints`."""
    attention = hints.get("attention") or {}
    first = attention[0] if isinstance(attention, list) else attention
    if heads is not None and (dim in HEADS_OF_WIDTH or "head_dim" in dict(first)):
        return
    known = ", ".join(f"{h} of width {w}" for w, h in HEADS_OF_WIDTH.items())
    raise SpecError(
        f"{source} is {dim} wide, and does not hold how many heads its cross-attention has (known are {known}) nor how "
        "wide those of its self-attention are; expected the options cross_heads and attention.head_dim"
    )


def _positions(buffer: Tensor | None, source: str, hints: Spec) -> Spec:
    """Position options of the saved buffer (1, N, dim): "none" if it is zero, else the grid and interpolation whose
    sine-cosine table it is."""
    from sana_lab.models.layers import sincos_positions

    if buffer is None or "position" in hints:
        return {}
    if not buffer.any():
        return {"position": "none"}
    base, dim = round(buffer.shape[1] ** 0.5), buffer.shape[2]
    table = buffer[0].float().unflatten(0, (base, base))
    for interpolation in (0.5, 1.0, 2.0, 4.0):
        if torch.allclose(sincos_positions(base, base, dim, base, interpolation, buffer.device), table, atol=0.01):
            return {"position": "sincos", "base": base, "interpolation": interpolation}
    raise SpecError(
        f"{source} has a position embedding of {base} x {base} tokens that is no sine-cosine interpolated by 0.5, 1, 2 "
        "or 4; expected the options position, base and interpolation"
    )
