"""Architectures of diffusers: `config.json` to the spec of a part and back, one pair of functions per class.

A setting that the lab's part does not implement raises SpecError; none is ignored.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sana_lab.checkpoints import key_tables
from sana_lab.config.validation import SpecError, nearest

Config = Mapping[str, Any]
Spec = dict[str, Any]


class Architecture(NamedTuple):
    """A model class of diffusers that has an equivalent part."""

    kind: str
    defaults: Config  # of settings that a config.json may leave out
    read: Callable[[Config], tuple[Spec, Spec]]  # configuration -> spec, and arguments that other parts supply
    write: Callable[[Spec, Spec], dict[str, Any]]  # the reverse
    table: Callable[[Spec], key_tables.Table]


SANA: Config = {
    "in_channels": 32,
    "out_channels": 32,
    "num_attention_heads": 70,
    "attention_head_dim": 32,
    "num_layers": 20,
    "num_cross_attention_heads": 20,
    "cross_attention_head_dim": 112,
    "cross_attention_dim": 2240,
    "caption_channels": 2304,
    "mlp_ratio": 2.5,
    "dropout": 0.0,
    "attention_bias": False,
    "sample_size": 32,
    "patch_size": 1,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "interpolation_scale": None,
    "guidance_embeds": False,
    "guidance_embeds_scale": 0.1,
    "qk_norm": None,
    "timestep_scale": 1.0,
}
DCAE: Config = {
    "in_channels": 3,
    "latent_channels": 32,
    "attention_head_dim": 32,
    "encoder_block_types": "ResBlock",
    "decoder_block_types": "ResBlock",
    "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
    "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
    "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "upsample_block_type": "pixel_shuffle",
    "downsample_block_type": "pixel_unshuffle",
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
    "encoder_out_shortcut": True,
    "decoder_in_shortcut": True,
    "decoder_conv_act_fn": "relu",
    "scaling_factor": 1.0,
}
VAE: Config = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "force_upcast": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}


def read(config: Config, source: str) -> tuple[Architecture, Spec, Spec]:
    """The architecture, spec and supplied arguments of a component's configuration. SpecError for another class."""
    name = config.get("_class_name")
    if name not in ARCHITECTURES:
        raise SpecError(f"{source} holds {_model_name(config)}; the lab reads {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[name]
    if unknown := [k for k in config if not k.startswith("_") and k not in architecture.defaults]:
        warnings.warn(f"{source}: {name} has no {', '.join(unknown)}, which is left out", stacklevel=2)
    return architecture, *architecture.read({**architecture.defaults, **config})


def _model_name(config: Config) -> str:
    if "model_type" in config and "_class_name" not in config:
        return f"a {config['model_type']} model of transformers, which is text_encoder {{name: llm, model: FOLDER}}"
    return str(config.get("_class_name", "no diffusers component (its config.json names no _class_name)"))


def expect(config: Config, model: str, **values: Any) -> None:
    """SpecError if a setting differs from the only supported value."""
    for key, value in values.items():
        if config[key] != value:
            raise SpecError(f"{model} has {key} {config[key]!r}; only {value!r} is supported")


# SanaTransformer2DModel


def read_sana(config: Config) -> tuple[Spec, Spec]:
    """The spec of `sana`, and (channels, text_dim) as `supplied`."""
    heads, patch = config["num_attention_heads"], config["patch_size"]
    dim = heads * config["attention_head_dim"]
    if config["qk_norm"] not in (None, "rms_norm_across_heads"):
        raise SpecError(f"SanaTransformer2DModel has qk_norm {config['qk_norm']!r}; expected rms_norm_across_heads")
    expect(config, "SanaTransformer2DModel", dropout=0.0, attention_bias=False, norm_elementwise_affine=False)
    expect(config, "SanaTransformer2DModel", norm_eps=1e-6, cross_attention_dim=dim)
    if config["out_channels"] not in (None, config["in_channels"]):
        raise SpecError(f"SanaTransformer2DModel turns {config['in_channels']} channels into {config['out_channels']}")
    norm, scale = config["qk_norm"] is not None, config["interpolation_scale"]
    is_sprint = config["guidance_embeds"]
    spec = {
        "name": "sana",
        "dim": dim,
        "depth": config["num_layers"],
        "patch": patch,
        "attention": {"name": "linear", "head_dim": config["attention_head_dim"], "qk_norm": norm, "eps": 1e-15},
        "ffn": {"name": "mix", "ratio": config["mlp_ratio"]},
        "cross_heads": config["num_cross_attention_heads"],
        "cross_norm": norm,
        "cross_norm_eps": 1e-5,
        "position": "none" if scale is None else "sincos",
        "base": config["sample_size"] // patch,
        "interpolation": scale or 1.0,
        # Sprint's pipeline passes t to its network, every other one 1000 t
        "time_scale": config["timestep_scale"] * (1.0 if is_sprint else 1000.0),
        "guidance": config["guidance_embeds_scale"] if is_sprint else None,
    }
    return spec, {"channels": config["in_channels"], "text_dim": config["caption_channels"]}


def write_sana(spec: Spec, supplied: Spec) -> dict[str, Any]:
    """The configuration of a `sana`. SpecError if diffusers cannot run it."""
    attention, ffn = spec["attention"], spec["ffn"]
    mixers = [layer["name"] for layer in (attention if isinstance(attention, list) else [attention])]
    if mixers != ["linear"] or ffn["name"] != "mix" or ffn.get("kernel", 3) != 3:
        raise SpecError(
            f"diffusers' SanaTransformer2DModel has attention linear and ffn mix of kernel 3; this DiT has attention "
            f"{', '.join(mixers)} and ffn {ffn['name']} of kernel {ffn.get('kernel', 'none')}"
        )
    if spec["mean_velocity"] or spec["time_smoothing"]:
        raise SpecError(
            "diffusers' SanaTransformer2DModel reads times as they are; this DiT has "
            f"mean_velocity {spec['mean_velocity']} and time_smoothing {spec['time_smoothing']:g}, expected false and 0"
        )
    if spec["cross_norm"] != attention["qk_norm"]:
        raise SpecError("diffusers norms q and k of self- and cross-attention or of neither; this DiT norms only one")
    is_sprint = spec["guidance"] is not None
    return {
        **SANA,
        "in_channels": supplied["channels"],
        "out_channels": supplied["channels"],
        "num_attention_heads": spec["dim"] // attention["head_dim"],
        "attention_head_dim": attention["head_dim"],
        "num_layers": spec["depth"],
        "num_cross_attention_heads": spec["cross_heads"],
        "cross_attention_head_dim": spec["dim"] // spec["cross_heads"],
        "cross_attention_dim": spec["dim"],
        "caption_channels": supplied["text_dim"],
        "mlp_ratio": ffn["ratio"],
        "sample_size": spec["base"] * spec["patch"],
        "patch_size": spec["patch"],
        "interpolation_scale": spec["interpolation"] if spec["position"] == "sincos" else None,
        "guidance_embeds": is_sprint,
        "guidance_embeds_scale": spec["guidance"] if is_sprint else 0.1,
        "qk_norm": "rms_norm_across_heads" if spec["cross_norm"] else None,
        "timestep_scale": spec["time_scale"] / (1.0 if is_sprint else 1000.0),
    }


# AutoencoderDC


def read_dcae(config: Config) -> tuple[Spec, Spec]:
    """The spec of `dcae`."""
    widths = list(config["encoder_block_out_channels"])
    expect(config, "AutoencoderDC", in_channels=3, encoder_out_shortcut=True, decoder_in_shortcut=True)
    if list(config["decoder_block_out_channels"]) != widths:
        raise SpecError(f"AutoencoderDC has widths {widths} and {config['decoder_block_out_channels']}; expected equal")
    encoder, decoder = (_attention_stages(config, half, len(widths)) for half in ("encoder", "decoder"))
    scales = {tuple(s) for s in [*_multiscales(config, "encoder", encoder), *_multiscales(config, "decoder", decoder)]}
    if len(scales) > 1:
        raise SpecError(f"AutoencoderDC has qkv_multiscales {sorted(scales)} in its stages; expected one for all")
    spec = {
        "name": "dcae",
        "widths": widths,
        "encoder_depths": list(config["encoder_layers_per_block"]),
        "decoder_depths": list(config["decoder_layers_per_block"]),
        "attention_stages": encoder,
        "multiscales": list(*scales) if scales else [],
        "latent": config["latent_channels"],
        "head_dim": config["attention_head_dim"],
        "down": "unshuffle" if config["downsample_block_type"] == "pixel_unshuffle" else "conv",
        "up": "interpolate" if config["upsample_block_type"] == "interpolate" else "shuffle",
        "decoder_attention_stages": None if decoder == encoder else decoder,
        "batch_norm_stages": _batch_norm_stages(config, len(widths), decoder),
        "last": config["decoder_conv_act_fn"],
        "scale": config["scaling_factor"],
    }
    return spec, {}


def _each(value: Any, stages: int) -> list[Any]:
    return [value] * stages if isinstance(value, str) else list(value)


def _multiscales(config: Config, half: str, attention_stages: int) -> list[Sequence[int]]:
    """Kernel sizes of each attention stage, which are the last ones."""
    scales = list(config[f"{half}_qkv_multiscales"])
    return scales[len(scales) - attention_stages :]


def _attention_stages(config: Config, half: str, stages: int) -> int:
    types = _each(config[f"{half}_block_types"], stages)
    count = types.count("EfficientViTBlock")
    if types != ["ResBlock"] * (stages - count) + ["EfficientViTBlock"] * count:
        raise SpecError(f"AutoencoderDC has {half}_block_types {types}; expected ResBlock, then EfficientViTBlock")
    return count


def _batch_norm_stages(config: Config, stages: int, attention: int) -> int:
    """The number of first decoder stages with batch norm and ReLU; other residual stages have RMSNorm and SiLU."""
    norms, acts = (_each(config[f"decoder_{what}"], stages) for what in ("norm_types", "act_fns"))
    count = norms.count("batch_norm")
    pairs = list(zip(norms, acts, strict=True))[: stages - attention]
    ordered = [("batch_norm", "relu")] * count + [("rms_norm", "silu")] * (stages - attention - count)
    if pairs != ordered or "batch_norm" in norms[stages - attention :]:
        raise SpecError(f"AutoencoderDC has decoder_norm_types {norms} and decoder_act_fns {acts}, which dcae has not")
    return count


def write_dcae(spec: Spec, supplied: Spec) -> dict[str, Any]:
    """The configuration of a `dcae`. SpecError if its latents have a shift."""
    if spec["shift"] != 0:
        raise SpecError(
            f"AutoencoderDC has no shift of its latents, and this dcae's is {spec['shift']}; expected shift 0: train "
            "the autoencoder with system.normalise=scale"
        )
    stages, encoder = len(spec["widths"]), spec["attention_stages"]
    decoder = encoder if spec["decoder_attention_stages"] is None else spec["decoder_attention_stages"]
    batch = spec["batch_norm_stages"]
    return {
        **DCAE,
        "latent_channels": spec["latent"],
        "attention_head_dim": spec["head_dim"],
        "encoder_block_types": _block_types(stages, encoder),
        "decoder_block_types": _block_types(stages, decoder),
        "encoder_block_out_channels": list(spec["widths"]),
        "decoder_block_out_channels": list(spec["widths"]),
        "encoder_layers_per_block": list(spec["encoder_depths"]),
        "decoder_layers_per_block": list(spec["decoder_depths"]),
        "encoder_qkv_multiscales": [[]] * (stages - encoder) + [list(spec["multiscales"])] * encoder,
        "decoder_qkv_multiscales": [[]] * (stages - decoder) + [list(spec["multiscales"])] * decoder,
        "downsample_block_type": "Conv" if spec["down"] == "conv" else "pixel_unshuffle",
        "upsample_block_type": "interpolate" if spec["up"] == "interpolate" else "pixel_shuffle",
        "decoder_norm_types": ["batch_norm"] * batch + ["rms_norm"] * (stages - batch),
        "decoder_act_fns": ["relu"] * batch + ["silu"] * (stages - batch),
        "decoder_conv_act_fn": spec["last"],
        "scaling_factor": spec["scale"],
    }


def _block_types(stages: int, attention: int) -> list[str]:
    return ["ResBlock"] * (stages - attention) + ["EfficientViTBlock"] * attention


# AutoencoderKL


def read_vae(config: Config) -> tuple[Spec, Spec]:
    """The spec of `vae`."""
    stages = len(config["block_out_channels"])
    expect(config, "AutoencoderKL", in_channels=3, out_channels=3, act_fn="silu", latents_mean=None, latents_std=None)
    expect(config, "AutoencoderKL", use_post_quant_conv=config["use_quant_conv"])
    blocks = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
    for key, block in blocks.items():
        if list(config[key]) != [block] * stages:
            raise SpecError(f"AutoencoderKL has {key} {list(config[key])}; expected {block} {stages} times")
    spec = {
        "name": "vae",
        "widths": list(config["block_out_channels"]),
        "depth": config["layers_per_block"],
        "latent": config["latent_channels"],
        "groups": config["norm_num_groups"],
        "middle_attention": config["mid_block_add_attention"],
        "quant": config["use_quant_conv"],
        "shift": config["shift_factor"] or 0.0,
        "scale": config["scaling_factor"],
    }
    return spec, {}


def write_vae(spec: Spec, supplied: Spec) -> dict[str, Any]:
    """The configuration of a `vae`."""
    stages = len(spec["widths"])
    return {
        **VAE,
        "down_block_types": ["DownEncoderBlock2D"] * stages,
        "up_block_types": ["UpDecoderBlock2D"] * stages,
        "block_out_channels": list(spec["widths"]),
        "layers_per_block": spec["depth"],
        "latent_channels": spec["latent"],
        "norm_num_groups": spec["groups"],
        "scaling_factor": spec["scale"],
        "shift_factor": spec["shift"] or None,
        "use_quant_conv": spec["quant"],
        "use_post_quant_conv": spec["quant"],
        "mid_block_add_attention": spec["middle_attention"],
    }


ARCHITECTURES: dict[str, Architecture] = {
    "SanaTransformer2DModel": Architecture("dit", SANA, read_sana, write_sana, key_tables.sana_diffusers),
    "AutoencoderDC": Architecture("autoencoder", DCAE, read_dcae, write_dcae, key_tables.dcae_diffusers),
    "AutoencoderKL": Architecture("autoencoder", VAE, read_vae, write_vae, key_tables.vae_diffusers),
}
"""diffusers' class -> the equivalent part."""

CLASSES = {"sana": "SanaTransformer2DModel", "dcae": "AutoencoderDC", "vae": "AutoencoderKL"}
"""Our part -> diffusers' class."""


def class_of(spec: Spec) -> tuple[str, Architecture]:
    """The name and architecture of diffusers' class for a part. SpecError if there is none."""
    if spec["name"] not in CLASSES:
        raise SpecError(f"diffusers has no class for part {spec['name']!r}; {nearest(spec['name'], CLASSES)}")
    name = CLASSES[spec["name"]]
    return name, ARCHITECTURES[name]
