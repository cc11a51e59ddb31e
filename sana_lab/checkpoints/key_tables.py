"""Key tables: the names of our tensors in NVlabs' and diffusers' state dicts. `rename_keys` applies them both ways.

A row maps one of our modules (or single tensors) to its names in the other format; several names are concatenated, in
this order, into one tensor of ours. Rows of modules that a model does not have are ignored.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

Spec = dict[str, Any]


class Row(NamedTuple):
    """Names of one module in the other format, and how its weight is shaped there."""

    names: tuple[str, ...]
    shape: Literal["same", "conv", "linear"] = "same"  # conv: a 1x1 convolution there, linear here; linear: the reverse


Table = dict[str, Row]


def at(*names: str) -> Row:
    return Row(names)


def conv(*names: str) -> Row:
    return Row(names, "conv")


def linear(*names: str) -> Row:
    return Row(names, "linear")


# SANA's DiT: diffusers' SanaTransformer2DModel and NVlabs' .pth

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
"""Differences where guidance is embedded (SANA-Sprint)."""

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
"""Prefixes: ours blocks.N, diffusers' transformer_blocks.N."""

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
"""Prefixes: blocks.N on both sides."""

NVLABS_UNUSED = ("pos_embed", "y_embedder.y_embedding", "logvar_linear.*")
"""Tensors without a place here: positions are computed, the null caption is the text encoder's, and the uncertainty of
the loss is for training only."""

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
"""Rows of one block or resampling; `dcae_prefixes` lists the prefixes."""

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
"""Rows of one block or resampling; `vae_prefixes` lists the prefixes."""

VAE_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names of the middle block's attention layers in the first releases -> today's."""


def sana_diffusers(spec: Spec) -> Table:
    """The key table of a `sana` spec in diffusers' SanaTransformer2DModel."""
    sprint = {} if spec["guidance"] is None else SPRINT_DIFFUSERS
    prefixes = [(f"blocks.{i}", f"transformer_blocks.{i}") for i in range(spec["depth"])]
    return {**SANA_DIFFUSERS, **sprint, **_with_prefixes(SANA_DIFFUSERS_BLOCK, prefixes)}


def sana_nvlabs(spec: Spec) -> Table:
    """The key table of a `sana` spec in NVlabs' state dict."""
    return {**SANA_NVLABS, **_with_prefixes(SANA_NVLABS_BLOCK, [(f"blocks.{i}",) * 2 for i in range(spec["depth"])])}


def dcae_diffusers(spec: Spec) -> Table:
    """The key table of a `dcae` spec in diffusers' AutoencoderDC."""
    return {**DCAE, **_with_prefixes(DCAE_BLOCK, dcae_prefixes(spec))}


def vae_diffusers(spec: Spec) -> Table:
    """The key table of a `vae` spec in diffusers' AutoencoderKL."""
    return {**VAE, **_with_prefixes(VAE_BLOCK, vae_prefixes(spec))}


def dcae_prefixes(spec: Spec) -> Iterator[tuple[str, str]]:
    """(ours, theirs) of each block. Downsampling begins a stage of our encoder and ends the previous one of theirs."""
    depths = spec["encoder_depths"]
    for i, depth in enumerate(depths):
        has_downsampling = i > (depths[0] == 0)
        if has_downsampling:
            yield f"encoder.stages.{i}.0", f"encoder.down_blocks.{i - 1}.{depths[i - 1]}"
        for j in range(depth):
            yield f"encoder.stages.{i}.{j + has_downsampling}", f"encoder.down_blocks.{i}.{j}"
    for i, depth in enumerate(spec["decoder_depths"]):
        for j in range(depth + 1):
            yield f"decoder.stages.{i}.{j}", f"decoder.up_blocks.{i}.{j}"


def vae_prefixes(spec: Spec) -> Iterator[tuple[str, str]]:
    """(ours, theirs) of each block. Their decoder counts its stages from the smallest grid."""
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


def _with_prefixes(block: Table, prefixes: Iterable[tuple[str, str]]) -> Table:
    """The block's rows once for each pair of prefixes."""
    return {
        f"{ours}.{key}": row._replace(names=tuple(f"{theirs}.{name}" for name in row.names))
        for ours, theirs in prefixes
        for key, row in block.items()
    }
