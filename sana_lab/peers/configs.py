"""Published configurations of other text-to-image pipelines, for building them offline with random weights.

Source: the model_index.json and config.json files of black-forest-labs/FLUX.1-dev and FLUX.1-schnell,
stabilityai/stable-diffusion-3-medium-diffusers, PixArt-alpha/PixArt-Sigma-XL-2-1024-MS and
Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers: the entries that differ from their classes' defaults. They were transcribed,
not downloaded; a test compares parameter counts with those stated in the papers. Steps and guidance are those of the
model cards. A component's `toy` has the entries of a small version of the same class.
"""

from typing import Any

Component = dict[str, Any]

_KL: Component = {
    "class": "diffusers:AutoencoderKL",
    "config": {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "norm_num_groups": 32,
    },
    "toy": {"block_out_channels": [16, 32, 64, 64], "norm_num_groups": 8, "layers_per_block": 1},
}
_KL_4: Component = {
    **_KL,
    "config": {**_KL["config"], "latent_channels": 4, "scaling_factor": 0.13025, "sample_size": 1024},
}


def _kl_16(scale: float, shift: float) -> Component:
    """A KL autoencoder with 16 latent channels and no 1x1 convolutions around them."""
    no_quant = {"use_quant_conv": False, "use_post_quant_conv": False, "sample_size": 1024}
    config = {**_KL["config"], **no_quant, "latent_channels": 16, "scaling_factor": scale, "shift_factor": shift}
    return {**_KL, "config": config}


def _t5(width: int, hidden: int, layers: int, heads: int, vocabulary: int, toy: int) -> Component:
    sizes = {"d_model": width, "d_kv": 64, "d_ff": hidden, "num_layers": layers, "num_heads": heads}
    toy_sizes = {"d_model": toy, "d_ff": 2 * toy, "num_layers": 3, "num_heads": 2, "d_kv": toy // 2, "vocab_size": 2048}
    kind = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "vocab_size": vocabulary}
    return {"class": "transformers:T5EncoderModel", "config": {**sizes, **kind}, "toy": toy_sizes}


_T5_XXL = _t5(4096, 10240, 24, 64, 32128, 512)


def _clip(name: str, width: int, layers: int, heads: int, activation: str, toy: int) -> Component:
    return {
        "class": f"transformers:{name}",
        "config": {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "projection_dim": width,
            "hidden_act": activation,
            "vocab_size": 49408,
            "max_position_embeddings": 77,
        },
        "toy": {
            "hidden_size": toy,
            "intermediate_size": 4 * toy,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "projection_dim": toy,
            "vocab_size": 2048,
            "bos_token_id": 2,
            "eos_token_id": 1,
        },
    }


_FLUX: Component = {
    "class": "diffusers:FluxTransformer2DModel",
    "config": {"num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24, "guidance_embeds": True},
    "toy": {
        "num_layers": 2,
        "num_single_layers": 5,
        "num_attention_heads": 3,
        "joint_attention_dim": 512,
        "pooled_projection_dim": 96,
    },
}


def _flux(guidance_embeds: bool, scheduler: Component, **settings: Any) -> Component:
    return {
        "pipeline": "FluxPipeline",
        "components": {
            "transformer": {**_FLUX, "config": {**_FLUX["config"], "guidance_embeds": guidance_embeds}},
            "text_encoder": _clip("CLIPTextModel", 768, 12, 12, "quick_gelu", 96),
            "text_encoder_2": _T5_XXL,
            "vae": _kl_16(0.3611, 0.1159),
        },
        "tokenizers": {"tokenizer": 77, "tokenizer_2": 512},
        "scheduler": {"class": "diffusers:FlowMatchEulerDiscreteScheduler", "config": scheduler},
        **settings,
    }


PEERS: dict[str, Component] = {
    "flux_dev": _flux(True, {"shift": 3.0, "use_dynamic_shifting": True}, steps=50, guidance=3.5),
    "flux_schnell": _flux(False, {"shift": 1.0}, steps=4, guidance=0.0, options={"max_sequence_length": 256}),
    "sd3_medium": {
        "pipeline": "StableDiffusion3Pipeline",
        "components": {
            "transformer": {
                "class": "diffusers:SD3Transformer2DModel",
                "config": {
                    "num_layers": 24,
                    "num_attention_heads": 24,
                    "attention_head_dim": 64,
                    "caption_projection_dim": 1536,
                    "pos_embed_max_size": 192,
                },
                "toy": {
                    "num_layers": 3,
                    "num_attention_heads": 3,
                    "caption_projection_dim": 192,
                    "joint_attention_dim": 512,
                    "pooled_projection_dim": 256,
                },
            },
            "text_encoder": _clip("CLIPTextModelWithProjection", 768, 12, 12, "quick_gelu", 96),
            "text_encoder_2": _clip("CLIPTextModelWithProjection", 1280, 32, 20, "gelu", 160),
            "text_encoder_3": _T5_XXL,
            "vae": _kl_16(1.5305, 0.0609),
        },
        "tokenizers": {"tokenizer": 77, "tokenizer_2": 77, "tokenizer_3": 512},
        "scheduler": {"class": "diffusers:FlowMatchEulerDiscreteScheduler", "config": {"shift": 3.0}},
        "steps": 28,
        "guidance": 7.0,
    },
    "pixart_sigma": {
        "pipeline": "PixArtSigmaPipeline",
        "components": {
            "transformer": {
                "class": "diffusers:PixArtTransformer2DModel",
                "config": {
                    "num_layers": 28,
                    "num_attention_heads": 16,
                    "attention_head_dim": 72,
                    "cross_attention_dim": 1152,
                    "caption_channels": 4096,
                    "interpolation_scale": 2,
                    "use_additional_conditions": False,
                },
                "toy": {
                    "num_layers": 4,
                    "num_attention_heads": 2,
                    "cross_attention_dim": 144,
                    "caption_channels": 512,
                },
            },
            "text_encoder": _T5_XXL,
            "vae": _KL_4,
        },
        "tokenizers": {"tokenizer": 300},
        "scheduler": {"class": "diffusers:DPMSolverMultistepScheduler", "config": {}},
        "steps": 20,
        "guidance": 4.5,
        "options": {"clean_caption": False},
    },
    "hunyuan_dit": {
        "pipeline": "HunyuanDiTPipeline",
        "components": {
            "transformer": {
                "class": "diffusers:HunyuanDiT2DModel",
                "config": {
                    "in_channels": 4,
                    "patch_size": 2,
                    "sample_size": 128,
                    "hidden_size": 1408,
                    "num_layers": 40,
                    "num_attention_heads": 16,
                    "attention_head_dim": 88,
                    "mlp_ratio": 4.3637,
                    "use_style_cond_and_image_meta_size": False,
                },
                "toy": {
                    "num_layers": 6,
                    "num_attention_heads": 2,
                    "hidden_size": 176,
                    "cross_attention_dim": 128,
                    "cross_attention_dim_t5": 256,
                    "pooled_projection_dim": 128,
                },
            },
            "text_encoder": {
                "class": "transformers:BertModel",
                "config": {
                    "vocab_size": 47020,
                    "hidden_size": 1024,
                    "intermediate_size": 4096,
                    "num_hidden_layers": 24,
                    "num_attention_heads": 16,
                },
                "toy": {
                    "vocab_size": 2048,
                    "hidden_size": 128,
                    "intermediate_size": 512,
                    "num_hidden_layers": 3,
                    "num_attention_heads": 2,
                },
            },
            "text_encoder_2": _t5(2048, 5120, 24, 32, 250112, 256),
            "vae": _KL_4,
        },
        "tokenizers": {"tokenizer": 77, "tokenizer_2": 256},
        "scheduler": {
            "class": "diffusers:DDPMScheduler",
            "config": {
                "beta_start": 0.00085,
                "beta_end": 0.018,
                "beta_schedule": "scaled_linear",
                "prediction_type": "v_prediction",
                "steps_offset": 1,
                "clip_sample": False,
            },
        },
        "absent": {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
        "steps": 50,
        "guidance": 5.0,
    },
}
"""name -> pipeline class, components, maximum tokens of each tokenizer, scheduler, steps, guidance; `options` are
arguments of every call, `absent` the constructor's arguments for omitted optional components."""
