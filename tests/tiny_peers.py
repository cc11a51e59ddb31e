"""Reference models of diffusers and NVlabs at toy size, in their own classes and file formats: what ours are compared
with."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2Model

from sana_lab.models.text.tokenizer import offline_tokenizer
from sana_lab.types import Text

TEXT = 32  # width of the tiny Gemma-2
LATENT = 8  # channels of the tiny DC-AE, which makes one latent of 4 x 4 pixels
DIT: dict[str, Any] = {
    "in_channels": LATENT,
    "out_channels": LATENT,
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "num_layers": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 16,
    "cross_attention_dim": 32,
    "caption_channels": TEXT,
    "sample_size": 8,
    "patch_size": 1,
}
DCAE: dict[str, Any] = {
    "latent_channels": LATENT,
    "attention_head_dim": 8,
    "encoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (8, 16, 16),
    "decoder_block_out_channels": (8, 16, 16),
    "encoder_layers_per_block": (1, 1, 1),
    "decoder_layers_per_block": (1, 2, 1),
    "encoder_qkv_multiscales": ((), (), (5,)),
    "decoder_qkv_multiscales": ((), (), (5,)),
    "downsample_block_type": "Conv",
    "upsample_block_type": "interpolate",
    "scaling_factor": 0.41407,
}
GEMMA: dict[str, Any] = {
    "hidden_size": TEXT,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "initializer_range": 0.3,
}


def scattered(model: Any, seed: int = 0) -> Any:
    """The model with random biases, norms and batch statistics, so that a lost or swapped one shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            p.data += 0.1 * torch.randn(p.shape, generator=generator)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean += 0.1 * torch.randn(module.running_mean.shape, generator=generator)
            module.running_var *= 1 + torch.rand(module.running_var.shape, generator=generator)
    return model.eval()


# Models of diffusers


def sana_transformer(**changes: Any) -> Any:
    """A SanaTransformer2DModel: `DIT` with changes, random weights."""
    from diffusers import SanaTransformer2DModel

    torch.manual_seed(1)
    return scattered(SanaTransformer2DModel(**{**DIT, **changes}), 1)


def dc_autoencoder(**changes: Any) -> Any:
    """An AutoencoderDC: `DCAE` with changes, random weights."""
    from diffusers import AutoencoderDC

    torch.manual_seed(2)
    return scattered(AutoencoderDC(**{**DCAE, **changes}), 2)


def kl_autoencoder(**changes: Any) -> Any:
    """An AutoencoderKL with 8x8-pixel latents of 16 channels and a shift, as SD3's; random weights."""
    from diffusers import AutoencoderKL

    torch.manual_seed(3)
    config = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (8, 16, 16, 16),
        "layers_per_block": 1,
        "latent_channels": 16,
        "norm_num_groups": 4,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
    }
    return scattered(AutoencoderKL(**{**config, **changes}), 3)


def gemma(**changes: Any) -> Any:
    """A Gemma-2 decoder with the offline tokenizer's vocabulary, random weights."""
    torch.manual_seed(4)
    return scattered(Gemma2Model(Gemma2Config(vocab_size=len(offline_tokenizer(start=True)), **{**GEMMA, **changes})))


def scheduler(name: str = "dpm", shift: float = 3.0) -> Any:
    """Flow-DPM-Solver ("dpm") or Flow-Euler ("euler"), set up as in the released folders."""
    from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

    if name == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=shift)
    return DPMSolverMultistepScheduler(flow_shift=shift, use_flow_sigmas=True, prediction_type="flow_prediction")


def sana_pipeline(name: str = "dpm", shift: float = 3.0, dit: Mapping[str, Any] | None = None) -> Any:
    """A SanaPipeline of the tiny components, complete; `dit` changes the transformer's configuration."""
    from diffusers import SanaPipeline

    pipeline = SanaPipeline(
        tokenizer=offline_tokenizer(start=True),
        text_encoder=gemma(),
        vae=dc_autoencoder(),
        transformer=sana_transformer(**(dit or {})),
        scheduler=scheduler(name, shift),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sprint_pipeline(**changes: Any) -> Any:
    """A SanaSprintPipeline of the tiny components; `changes` are of the transformer's configuration."""
    from diffusers import SanaSprintPipeline, SCMScheduler

    dit = {"guidance_embeds": True, "guidance_embeds_scale": 0.1, "qk_norm": "rms_norm_across_heads", **changes}
    pipeline = SanaSprintPipeline(
        tokenizer=offline_tokenizer(start=True),
        text_encoder=gemma(),
        vae=dc_autoencoder(),
        transformer=sana_transformer(**dit),
        scheduler=SCMScheduler(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def saved(model: Any, folder: Path, **options: Any) -> Path:
    """The folder that `save_pretrained` wrote, without progress bars."""
    from diffusers.utils import logging

    logging.disable_progress_bar()
    model.save_pretrained(folder, **options)
    return folder


def stable_diffusion() -> Any:
    """A StableDiffusionPipeline of the smallest parts that go together; its scheduler adds noise at every step."""
    from diffusers import AutoencoderKL, EulerAncestralDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        norm_num_groups=4,
        attention_head_dim=4,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
    )
    tokenizer = offline_tokenizer(start=True)
    tokenizer.model_max_length = 12
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=EulerAncestralDiscreteScheduler(steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


# NVlabs' checkpoints

NVLABS_HINTS: dict[str, Any] = {"cross_heads": 2, "attention": {"name": "linear", "head_dim": 8}}
"""Options that a .pth of width 32 does not determine."""

NVLABS_NAMES = {
    "patch_embed.": "x_embedder.",
    "caption_projection.linear_": "y_embedder.y_proj.fc",
    "caption_norm.": "attention_y_norm.",
    "time_embed.emb.timestep_embedder.linear_1.": "t_embedder.mlp.0.",
    "time_embed.emb.timestep_embedder.linear_2.": "t_embedder.mlp.2.",
    "time_embed.timestep_embedder.linear_1.": "t_embedder.mlp.0.",
    "time_embed.timestep_embedder.linear_2.": "t_embedder.mlp.2.",
    "time_embed.guidance_embedder.linear_1.": "cfg_embedder.mlp.0.",
    "time_embed.guidance_embedder.linear_2.": "cfg_embedder.mlp.2.",
    "time_embed.linear.": "t_block.1.",
    "proj_out.": "final_layer.linear.",
    "transformer_blocks.": "blocks.",
    ".attn1.to_out.0.": ".attn.proj.",
    ".attn2.to_out.0.": ".cross_attn.proj.",
    ".attn2.to_q.": ".cross_attn.q_linear.",
    ".attn1.norm_q.": ".attn.q_norm.",
    ".attn1.norm_k.": ".attn.k_norm.",
    ".attn2.norm_q.": ".cross_attn.q_norm.",
    ".attn2.norm_k.": ".cross_attn.k_norm.",
    ".ff.conv_inverted.": ".mlp.inverted_conv.conv.",
    ".ff.conv_depth.": ".mlp.depth_conv.conv.",
    ".ff.conv_point.": ".mlp.point_conv.conv.",
}
"""Parts of diffusers' tensor names -> NVlabs', in the order in which they are replaced."""

FUSED = {".attn1.to_q.": (".attn.qkv.", "qkv"), ".attn2.to_k.": (".cross_attn.kv_linear.", "kv")}


def nvlabs_state(model: nn.Module) -> dict[str, Tensor]:
    """NVlabs' state dict of a diffusers transformer: renamed, q, k and v fused, two buffers added."""
    source, state = model.state_dict(), {}
    for key, value in source.items():
        if fused := next((f for start, f in FUSED.items() if start in key), None):
            first = f".to_{fused[1][0]}."
            value = torch.cat([source[key.replace(first, f".to_{x}.")] for x in fused[1]])
            key = key.replace(".attn1" + first, fused[0]).replace(".attn2" + first, fused[0])
        elif any(f".attn{i}.to_{x}." in key for i, x in ((1, "k"), (1, "v"), (2, "v"))):
            continue
        for theirs, ours in NVLABS_NAMES.items():
            key = key.replace(theirs, ours)
        state["final_layer.scale_shift_table" if key == "scale_shift_table" else key] = value.clone()
    dim = source["caption_norm.weight"].shape[0]
    return state | {"pos_embed": torch.zeros(1, 64, dim), "y_embedder.y_embedding": torch.randn(300, 32)}


def nvlabs_training(state: dict[str, Tensor]) -> dict[str, Any]:
    """The other entries of an NVlabs checkpoint: optimizer, counters, random states (numpy's included)."""
    optimizer = {"state": {i: {"exp_avg": torch.zeros_like(v)} for i, v in enumerate(state.values())}}
    rng = {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}
    return {"optimizer": optimizer, "scheduler": {"last_epoch": 3}, "epoch": 7, "step": 10, "rng_state": rng}


# Comparison

TIMES = torch.tensor([0.9, 0.35])


@torch.no_grad()
def velocities(dit: Any, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Velocities of our DiT and of diffusers' transformer, on the same latents, times and text of two lengths."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, model.config.in_channels, 6, 8, generator=generator)
    features = torch.randn(2, 7, model.config.caption_channels, generator=generator)
    text = Text(features, torch.arange(7) < torch.tensor([[2], [7]]))
    theirs = model(
        x,
        encoder_hidden_states=text.tokens,
        encoder_attention_mask=text.mask.long(),
        timestep=1000 * TIMES * model.config.timestep_scale,
    ).sample
    return dit(x, TIMES, text), theirs


def close(ours: Tensor, theirs: Tensor) -> bool:
    """Equal to a relative error (norm) of 1e-5."""
    return bool((ours - theirs).norm() <= 1e-5 * theirs.norm())
