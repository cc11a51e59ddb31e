"""Released weights in other people's formats: recognised, named, and turned into a part's state."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sana_lab.checkpoints import architectures, files, key_tables
from sana_lab.config import experiments
from sana_lab.config.specs import SpecError
from sana_lab.models.layers import sincos_positions

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
    table: Callable[[Spec], key_tables.Table]
    source: str
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # what was taken of several, left out, or is not in the file


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
    path = files.whole(path)
    if path.is_dir():
        return _in_folder(path, kind, ema=ema, variant=variant, like=like, **hints)
    if path.suffix in (".safetensors", ".json"):
        if (path.parent / "config.json").is_file() and path.name.startswith("diffusion_pytorch_model"):
            return component(path.parent, files.read_safetensors(path), **hints)
        return nvlabs(files.read_safetensors(path), str(path), like, **hints)
    state = chosen(files.read_torch(path), ema, str(path))
    found = nvlabs(state.tensors, str(path), like, beside=state.left, **hints)
    return found._replace(notes=(f"taken: {state.name}", *found.notes))


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
    return Found(known.kind, experiments.merge(spec, hints), supplied, _renamed(given, known), known.table, str(folder))


def _renamed(tensors: Mapping[str, Tensor], known: architectures.Architecture) -> Mapping[str, Tensor]:
    """The first KL autoencoders call the layers of their attention otherwise."""
    old = {k: k for k in tensors if ".attentions.0." in k and k.split(".")[-2] in key_tables.VAE_OLD}
    if not old or known is not architectures.KNOWN["AutoencoderKL"]:
        return tensors
    modern = {k: k.replace(f".{k.split('.')[-2]}.", f".{key_tables.VAE_OLD[k.split('.')[-2]]}.") for k in old}
    return {modern.get(k, k): tensors[k] for k in tensors}


class Chosen(NamedTuple):
    """One state dict of a checkpoint."""

    tensors: Mapping[str, Tensor]
    name: str
    left: list[str]  # what else the checkpoint holds


def chosen(checkpoint: Any, ema: bool | None, source: str) -> Chosen:
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
    if state is checkpoint:
        return Chosen(tensors, "the file's only state", [])
    name, what = ("state_dict_ema", "averaged") if state is averaged else ("state_dict", "raw")
    return Chosen(tensors, f"{name}, the {what} weights", [str(k) for k in checkpoint if k != name and checkpoint[k]])


def nvlabs(
    state: Mapping[str, Tensor], source: str, like: Spec | None = None, beside: Sequence[str] = (), **hints: Any
) -> Found:
    """NVlabs' DiT by its tensors; `beside` is what lay beside them. SpecError says what else it is, or which option it
    does not hold."""
    if lost := [k for k in NVLABS if k not in state]:
        raise SpecError(f"{source} {_stranger(state, lost)}")
    if like is not None and state[NVLABS[0]].shape[0] not in architectures.KNOWN_WIDTHS:
        hints = {"cross_heads": like.get("cross_heads"), "attention": like.get("attention"), **hints}
    if like is not None and _either_time(state):
        hints = {"time_scale": like.get("time_scale"), **hints}
    spec, supplied = nvlabs_spec(state, source, hints)
    left = [*(k for k in state if any(fnmatch(k, pattern) for pattern in key_tables.NVLABS_UNUSED)), *beside]
    notes = [f"left out: {', '.join(left)}"] if left else []
    if "time_scale" not in hints and _either_time(state):
        notes.append("time_scale: 1000 is taken, as in SANA-1.5; a teacher of Sprint has 1 (--set time_scale=1)")
    return Found("dit", spec, supplied, state, key_tables.sana_nvlabs, source, key_tables.NVLABS_UNUSED, tuple(notes))


def _stranger(state: Iterable[str], lost: list[str]) -> str:
    named = {"caption_norm.weight", "transformer_blocks.0.attn1.to_q.weight"}
    if named <= set(state):
        return "holds a SanaTransformer2DModel of diffusers without its config.json, which says what no tensor shows"
    known = next((name for start, name in STRANGERS.items() if any(k.startswith(start) for k in state)), None)
    if known:
        return f"holds {known}, which is another architecture; expected NVlabs' Sana or a diffusers component's folder"
    return f"is no DiT of NVlabs' Sana: {', '.join(lost)} missing; it begins {', '.join(list(state)[:3]) or 'empty'}"


def nvlabs_spec(state: Mapping[str, Tensor], source: str, hints: Spec) -> tuple[Spec, Spec]:
    """The spec of `sana`, and its channels and text width; what the file does not hold comes from `hints`.

    Heads follow from NVlabs' two widths alone. What the network reads of t is 1000 t without norms of q and k (SANA
    1.0), and t with a guidance embedding (Sprint). With norms alone it may be either, SANA-1.5 or Sprint's teacher:
    1000 t is taken at the width of SANA-1.5, as `Found.notes` say, and asked for at any other, which SANA-1.5 has not.
    """
    dim, channels, patch, _ = state["x_embedder.proj.weight"].shape
    heads = hints.get("cross_heads", architectures.KNOWN_WIDTHS.get(dim))
    _check_hints(dim, heads, source, hints)
    sprint = "cfg_embedder.mlp.0.weight" in state
    if _either_time(state) and dim != WIDTH_1_5 and hints.get("time_scale") is None:
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
        **positions(state.get("pos_embed"), source, hints),
        **({"time_scale": 1.0, "guidance": 0.1} if sprint else {"time_scale": 1000.0}),
    }
    supplied = {"channels": channels, "text_dim": state["y_embedder.y_proj.fc1.weight"].shape[1]}
    return experiments.merge(spec, hints), supplied


WIDTH_1_5 = 2240
"""Of SANA-1.5's DiTs, both of them."""


def _either_time(state: Mapping[str, Tensor]) -> bool:
    """Whether no tensor shows if the network reads t or 1000 t."""
    return "blocks.0.attn.q_norm.weight" in state and "cfg_embedder.mlp.0.weight" not in state


def _check_hints(dim: int, heads: int | None, source: str, hints: Spec) -> None:
    """SpecError where a width is none of NVlabs' and not all is given that no tensor shows."""
    attention = hints.get("attention")
    if heads is not None and (dim in architectures.KNOWN_WIDTHS or "head_dim" in dict(attention or {})):
        return
    known = ", ".join(f"{h} of width {w}" for w, h in architectures.KNOWN_WIDTHS.items())
    raise SpecError(
        f"{source} is {dim} wide, and does not hold how many heads its cross-attention has (known are {known}) nor how "
        "wide those of its self-attention are; expected the options cross_heads and attention.head_dim"
    )


def positions(saved: Tensor | None, source: str, hints: Spec) -> Spec:
    """What the saved buffer (1, N, dim) shows: zeros where the model has no positions, else grid and interpolation."""
    if saved is None or "position" in hints:
        return {}
    if not saved.any():
        return {"position": "none"}
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
    state = key_tables.to_ours(own, found.tensors, found.table(spec), found.source, found.unused)
    rest = {k: v for k, v in own.items() if k not in state}
    assert not rest.keys() - {"shift", "scale"}, rest.keys()
    return state | {k: torch.full(v.shape, found.spec.get(k, spec[k]), dtype=v.dtype) for k, v in rest.items()}


def check_agree(spec: Spec, found: Found) -> None:
    """SpecError where a spec reads these weights otherwise than they were trained, in a way that no shape shows."""
    for key in UNSEEN:
        if key in found.spec and found.spec[key] != spec.get(key) and _matters(key, found.spec):
            raise SpecError(f"{found.source} has {key} {found.spec[key]!r}, and the spec says {spec.get(key)!r}")
    given, expected = (s.get("attention", {}) for s in (spec, found.spec))
    if "head_dim" in expected and given.get("head_dim") != expected["head_dim"]:
        raise SpecError(f"{found.source} has heads of {expected['head_dim']}, the spec of {given.get('head_dim')}")


UNSEEN = (
    *("cross_heads", "time_scale", "guidance", "position", "base", "interpolation", "cross_norm_eps"),  # sana
    *("groups", "middle_attention"),  # vae
    *("head_dim", "last"),  # dcae
)
"""Options that change what a model computes and no shape of its tensors."""


def _matters(key: str, spec: Spec) -> bool:
    """Whether an option changes anything beside the others."""
    if key in ("base", "interpolation"):
        return spec.get("position") == "sincos"
    return key != "cross_norm_eps" or spec["cross_norm"]
