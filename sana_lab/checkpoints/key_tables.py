"""Names of tensors in other people's files: one table per format, read in both directions.

A row says where one of our modules (or single tensors) lies there. Several names are stacked, in this order, into one
of ours. `conv` marks what is a 1x1 convolution there and a linear layer here, `linear` the reverse. Rows of parts that
a model has not are never asked for.
"""

from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from fnmatch import fnmatch
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sana_lab.config.specs import SpecError

Spec = dict[str, Any]


class There(NamedTuple):
    """Where it lies in the other format."""

    names: tuple[str, ...]
    shape: Literal["same", "conv", "linear"] = "same"


Table = dict[str, There]


def at(*names: str) -> There:
    return There(names)


def conv(*names: str) -> There:
    return There(names, "conv")


def linear(*names: str) -> There:
    return There(names, "linear")


# SANA's DiT: diffusers' SanaTransformer2DModel, and NVlabs' .pth

SANA_DIFFUSERS: Table = {
    "patch_embed.proj": at("patch_embed.proj"),
    "time_embed.mlp.0": at("time_embed.emb.timestep_embedder.linear_1"),
    "time_embed.mlp.2": at("time_embed.emb.timestep_embedder.linear_2"),
    "time_block.1": at("time_embed.linear"),
    "caption_embed.mlp.0": at("caption_projection.linear_1"),
    "caption_embed.mlp.2": at("caption_projection.linear_2"),
    "caption_embed.norm": at("caption_norm"),
    "head.table": at("scale_shift_table"),
    "head.linear": at("proj_out"),
}
SPRINT_DIFFUSERS: Table = {
    "time_embed.mlp.0": at("time_embed.timestep_embedder.linear_1"),
    "time_embed.mlp.2": at("time_embed.timestep_embedder.linear_2"),
    "guidance_embed.mlp.0": at("time_embed.guidance_embedder.linear_1"),
    "guidance_embed.mlp.2": at("time_embed.guidance_embedder.linear_2"),
}
"""What differs where guidance is embedded."""

SANA_DIFFUSERS_BLOCK: Table = {
    "table": at("scale_shift_table"),
    "attention.qkv": at("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attention.norm_q": at("attn1.norm_q"),
    "attention.norm_k": at("attn1.norm_k"),
    "attention.proj": at("attn1.to_out.0"),
    "cross.q": at("attn2.to_q"),
    "cross.kv": at("attn2.to_k", "attn2.to_v"),
    "cross.norm_q": at("attn2.norm_q"),
    "cross.norm_k": at("attn2.norm_k"),
    "cross.proj": at("attn2.to_out.0"),
    "ffn.expand": conv("ff.conv_inverted"),
    "ffn.depthwise": at("ff.conv_depth"),
    "ffn.project": conv("ff.conv_point"),
}
"""blocks.N here, transformer_blocks.N there."""

SANA_NVLABS: Table = {
    "patch_embed.proj": at("x_embedder.proj"),
    "time_embed.mlp.0": at("t_embedder.mlp.0"),
    "time_embed.mlp.2": at("t_embedder.mlp.2"),
    "guidance_embed.mlp.0": at("cfg_embedder.mlp.0"),
    "guidance_embed.mlp.2": at("cfg_embedder.mlp.2"),
    "time_block.1": at("t_block.1"),
    "caption_embed.mlp.0": at("y_embedder.y_proj.fc1"),
    "caption_embed.mlp.2": at("y_embedder.y_proj.fc2"),
    "caption_embed.norm": at("attention_y_norm"),
    "head.table": at("final_layer.scale_shift_table"),
    "head.linear": at("final_layer.linear"),
}
SANA_NVLABS_BLOCK: Table = {
    "table": at("scale_shift_table"),
    "attention.qkv": at("attn.qkv"),
    "attention.norm_q": at("attn.q_norm"),
    "attention.norm_k": at("attn.k_norm"),
    "attention.proj": at("attn.proj"),
    "cross.q": at("cross_attn.q_linear"),
    "cross.kv": at("cross_attn.kv_linear"),
    "cross.norm_q": at("cross_attn.q_norm"),
    "cross.norm_k": at("cross_attn.k_norm"),
    "cross.proj": at("cross_attn.proj"),
    "ffn.expand": conv("mlp.inverted_conv.conv"),
    "ffn.depthwise": at("mlp.depth_conv.conv"),
    "ffn.project": conv("mlp.point_conv.conv"),
}
"""blocks.N on both sides."""

NVLABS_UNUSED = ("pos_embed", "y_embedder.y_embedding", "logvar_linear.*")
"""Positions are computed here, the null caption is the text encoder's, and the loss's uncertainty is for training."""

# DC-AE: diffusers' AutoencoderDC

DCAE: Table = {
    "encoder.stem": at("encoder.conv_in"),
    "encoder.stem.conv": at("encoder.conv_in.conv"),
    "encoder.head": at("encoder.conv_out"),
    "decoder.stem": at("decoder.conv_in"),
    "decoder.norm": at("decoder.norm_out"),
    "decoder.head": at("decoder.conv_out"),
    "decoder.head.conv": at("decoder.conv_out.conv"),
}
DCAE_BLOCK: Table = {
    "conv": at("conv"),
    "conv1": at("conv1"),
    "conv2": at("conv2"),
    "norm": at("norm"),
    "attention.qkv": linear("attn.to_q", "attn.to_k", "attn.to_v"),
    "attention.scales.0.0": at("attn.to_qkv_multiscale.0.proj_in"),
    "attention.scales.0.1": at("attn.to_qkv_multiscale.0.proj_out"),
    "attention.scales.1.0": at("attn.to_qkv_multiscale.1.proj_in"),
    "attention.scales.1.1": at("attn.to_qkv_multiscale.1.proj_out"),
    "attention.out": linear("attn.to_out"),
    "attention.norm": at("attn.norm_out"),
    "ffn.inverted": at("conv_out.conv_inverted"),
    "ffn.depthwise": at("conv_out.conv_depth"),
    "ffn.point": at("conv_out.conv_point"),
    "ffn.norm": at("conv_out.norm"),
}
"""Of a block or a resampling, wherever `dcae_places` has it."""

# KL autoencoder: diffusers' AutoencoderKL

VAE: Table = {
    "encoder.stem": at("encoder.conv_in"),
    "encoder.head.0": at("encoder.conv_norm_out"),
    "encoder.head.2": at("encoder.conv_out"),
    "decoder.stem": at("decoder.conv_in"),
    "decoder.head.0": at("decoder.conv_norm_out"),
    "decoder.head.2": at("decoder.conv_out"),
    "quant": at("quant_conv"),
    "post_quant": at("post_quant_conv"),
}
VAE_BLOCK: Table = {
    "conv": at("conv"),
    "norm1": at("norm1"),
    "conv1": at("conv1"),
    "norm2": at("norm2"),
    "conv2": at("conv2"),
    "skip": at("conv_shortcut"),
    "norm": at("group_norm"),
    "qkv": at("to_q", "to_k", "to_v"),
    "out": at("to_out.0"),
}
"""Of a block or a resampling, wherever `vae_places` has it."""

VAE_OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""How the first releases called the layers of the middle's attention."""


def sana_diffusers(spec: Spec) -> Table:
    """The DiT of that spec in diffusers' SanaTransformer2DModel."""
    sprint = {} if spec["guidance"] is None else SPRINT_DIFFUSERS
    places = [(f"blocks.{i}", f"transformer_blocks.{i}") for i in range(spec["depth"])]
    return {**SANA_DIFFUSERS, **sprint, **_placed(SANA_DIFFUSERS_BLOCK, places)}


def sana_nvlabs(spec: Spec) -> Table:
    """The DiT of that spec in NVlabs' state dict."""
    return {**SANA_NVLABS, **_placed(SANA_NVLABS_BLOCK, [(f"blocks.{i}",) * 2 for i in range(spec["depth"])])}


def dcae_diffusers(spec: Spec) -> Table:
    """The DC-AE of that spec in diffusers' AutoencoderDC."""
    return {**DCAE, **_placed(DCAE_BLOCK, dcae_places(spec))}


def vae_diffusers(spec: Spec) -> Table:
    """The KL autoencoder of that spec in diffusers' AutoencoderKL."""
    return {**VAE, **_placed(VAE_BLOCK, vae_places(spec))}


def dcae_places(spec: Spec) -> Iterator[tuple[str, str]]:
    """(ours, theirs) of each block. Our encoder stage begins with its downsampling; theirs ends the one before."""
    depths = spec["encoder_depths"]
    for i, depth in enumerate(depths):
        begins = i > (depths[0] == 0)
        if begins:
            yield f"encoder.stages.{i}.0", f"encoder.down_blocks.{i - 1}.{depths[i - 1]}"
        for j in range(depth):
            yield f"encoder.stages.{i}.{j + begins}", f"encoder.down_blocks.{i}.{j}"
    for i, depth in enumerate(spec["decoder_depths"]):
        for j in range(depth + 1):
            yield f"decoder.stages.{i}.{j}", f"decoder.up_blocks.{i}.{j}"


def vae_places(spec: Spec) -> Iterator[tuple[str, str]]:
    """(ours, theirs) of each block; their decoder counts its stages from the smallest grid."""
    stages, depth = len(spec["widths"]), spec["depth"]
    for i in range(stages):
        if i:
            yield f"encoder.stages.{i}.0", f"encoder.down_blocks.{i - 1}.downsamplers.0"
        for j in range(depth):
            yield f"encoder.stages.{i}.{j + bool(i)}", f"encoder.down_blocks.{i}.resnets.{j}"
        for j in range(depth + 1):
            yield f"decoder.stages.{i}.{j}", f"decoder.up_blocks.{stages - 1 - i}.resnets.{j}"
        yield f"decoder.stages.{i}.{depth + 1}", f"decoder.up_blocks.{stages - 1 - i}.upsamplers.0"
    for half in ("encoder", "decoder"):
        middle = ("resnets.0", "attentions.0", "resnets.1") if spec["middle_attention"] else ("resnets.0", "resnets.1")
        for i, name in enumerate(middle):
            yield f"{half}.middle.{i}", f"{half}.mid_block.{name}"


def _placed(block: Table, places: Iterable[tuple[str, str]]) -> Table:
    return {
        f"{ours}.{key}": row._replace(names=tuple(f"{theirs}.{name}" for name in row.names))
        for ours, theirs in places
        for key, row in block.items()
    }


def there(key: str, table: Table) -> There | None:
    """Where one of our tensors lies, its `.weight` or `.bias` included."""
    module, _, leaf = key.rpartition(".")
    if key in table or module not in table:
        return table.get(key)
    row = table[module]
    return row._replace(names=tuple(f"{name}.{leaf}" for name in row.names))


def to_ours(
    own: Mapping[str, Tensor], given: Mapping[str, Tensor], table: Table, source: str, unused: Iterable[str] = ()
) -> dict[str, Tensor]:
    """Their tensors under our names and in our shapes, views where they can be. SpecError names every odd one.

    `own` gives names and shapes; what the table does not know (latents' shift and scale) is left out.
    """
    rows = {key: row for key in own if (row := there(key, table)) is not None}
    expected = {name: _shape(own[key], row) for key, row in rows.items() for name in row.names}
    if problems := odd(expected, given, unused):
        raise SpecError(f"{source} does not fit: {'; '.join(problems)}")
    return {key: _stacked([given[name] for name in row.names], own[key]) for key, row in rows.items()}


def to_theirs(own: Mapping[str, Tensor], table: Table) -> dict[str, Tensor]:
    """Our tensors under their names and in their shapes; what the table does not know is left out."""
    out = {}
    for key, value in own.items():
        if (row := there(key, table)) is not None:
            shape, many = _shape(value, row), len(row.names)
            pieces = value.chunk(many) if many > 1 else (value,)
            out.update({n: v.reshape(shape) for n, v in zip(row.names, pieces, strict=True)})
    return out


def odd(
    expected: Mapping[str, tuple[int, ...]], given: Mapping[str, Tensor], unused: Iterable[str] = (), most: int = 12
) -> list[str]:
    """What is missing, not expected or of another shape: the first `most` by name, and how many more."""
    missing = [k for k in expected if k not in given]
    surplus = [k for k in given if k not in expected and not any(fnmatch(k, pattern) for pattern in unused)]
    shapes = {k: tuple(given[k].shape) for k in expected if k in given}
    wrong = [k for k, shape in shapes.items() if shape != expected[k]]
    said = [
        *(f"{k} is missing{_near(k, surplus)}" for k in missing[:most]),
        *(f"{k} is not expected{_near(k, missing)}" for k in surplus[:most]),
        *(f"{k} is {shapes[k]}, expected {expected[k]}" for k in wrong[:most]),
    ]
    rest = len(missing) + len(surplus) + len(wrong) - most
    return [*said[:most], *([f"and {rest} more"] if rest > 0 else [])]


def _near(name: str, names: list[str]) -> str:
    close = get_close_matches(name, names, 1, cutoff=0.7)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _shape(ours: Tensor, row: There) -> tuple[int, ...]:
    """Of each tensor there; biases and norms are the same in all of them."""
    many = len(row.names)
    shape = (ours.shape[0] // many, *ours.shape[1:]) if many > 1 else tuple(ours.shape)
    if row.shape == "conv" and ours.ndim == 2:
        return (*shape, 1, 1)
    return shape[:2] if row.shape == "linear" else shape


def _stacked(tensors: list[Tensor], like: Tensor) -> Tensor:
    return (tensors[0] if len(tensors) == 1 else torch.cat(tensors)).reshape(like.shape)
