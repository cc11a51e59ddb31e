"""Other people's models at toy size, in their own classes and file formats: what ours is compared with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Gemma2Config, Gemma2Model

from sana_lab.models.text.tokenizer import offline_tokenizer

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
    """The model with every number that begins at a special value, biases and norms, drawn, so that a lost one shows."""
    random = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            p.data += 0.1 * torch.randn(p.shape, generator=random)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean += 0.1 * torch.randn(module.running_mean.shape, generator=random)
            module.running_var *= 1 + torch.rand(module.running_var.shape, generator=random)
    return model.eval()


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
    given = {
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
    return scattered(AutoencoderKL(**{**given, **changes}), 3)


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

    made = SanaPipeline(
        tokenizer=offline_tokenizer(start=True),
        text_encoder=gemma(),
        vae=dc_autoencoder(),
        transformer=sana_transformer(**(dit or {})),
        scheduler=scheduler(name, shift),
    )
    made.set_progress_bar_config(disable=True)
    return made


def saved(model: Any, folder: Path, **options: Any) -> Path:
    """The folder that `save_pretrained` wrote; its bars are switched off."""
    from diffusers.utils import logging

    logging.disable_progress_bar()
    model.save_pretrained(folder, **options)
    return folder


def stable_diffusion() -> Any:
    """A StableDiffusionPipeline of the smallest parts that go together; its scheduler draws noise at every step."""
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
