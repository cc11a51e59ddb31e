"""Published autoencoder configurations by name: the architecture; the weights are given by `weights:`.

Sources: for DC-AE, the configurations of efficientvit and DC-Gen (`dc_ae.py`) and of diffusers' conversion script; for
the scales and the KL autoencoders, the models' config.json. Keys, shapes and sizes are tested against diffusers on the
meta device; the scales were not checked against released files.

`dcae_f16c32`, `dcae_f8c16` and `vae_f16c32` are not published: the SANA paper compares AE-F8C16, F16C32 and F32C32 but
does not give the architecture of the first two or release their weights. These presets follow the same design with
fewer stages, and have no published scale.
"""

from typing import Any

_SANA: dict[str, Any] = {"name": "dcae", "scale": 0.41407}

_IN: dict[str, Any] = {
    "name": "dcae",
    "encoder_depths": [0, 4, 8, 2, 2, 2],
    "decoder_depths": [0, 5, 10, 2, 2, 2],
    "multiscales": [],
    "down": "unshuffle",
    "up": "shuffle",
    "batch_norm_stages": 3,
}

_F64: dict[str, Any] = {
    **_IN,
    "widths": [128, 256, 512, 512, 1024, 1024, 2048],
    "encoder_depths": [0, 4, 8, 2, 2, 2, 2],
    "decoder_depths": [0, 5, 10, 2, 2, 2, 2],
    "attention_stages": 4,
    "latent": 128,
}

_F128: dict[str, Any] = {
    **_IN,
    "widths": [128, 256, 512, 512, 1024, 1024, 2048, 2048],
    "encoder_depths": [0, 4, 8, 2, 2, 2, 2, 2],
    "decoder_depths": [0, 5, 10, 2, 2, 2, 2, 2],
    "attention_stages": 5,
    "latent": 512,
}

_LITE: dict[str, Any] = {
    **_SANA,
    "decoder_depths": [0, 3, 5, 4, 4, 4],
    "decoder_attention_stages": 0,
    "up": "shuffle",
    "last": "silu",
}

SPECS: dict[str, dict[str, Any]] = {
    "dcae_f32c32_sana_1_0": _SANA,
    "dcae_f32c32_sana_1_1": _SANA,  # same shape and scale as 1.0, decoder trained further
    "dcae_lite_f32c32_sana_1_1": _LITE,  # encoder of sana_1_0, smaller decoder without attention
    "dcae_f32c32_in_1_0": {**_IN, "scale": 0.3189},
    "dcae_f32c32_mix_1_0": {**_IN, "scale": 0.4552},
    "dcae_f64c128_in_1_0": {**_F64, "scale": 0.2889},
    "dcae_f64c128_mix_1_0": {**_F64, "scale": 0.4538},
    "dcae_f128c512_in_1_0": {**_F128, "scale": 0.4883},
    "dcae_f128c512_mix_1_0": {**_F128, "scale": 0.3620},
    "dcae_f16c32": {
        "name": "dcae",
        "widths": [128, 256, 512, 512, 1024],
        "encoder_depths": [2, 2, 2, 3, 3],
        "decoder_depths": [3, 3, 3, 3, 3],
        "attention_stages": 2,
    },
    "dcae_f8c16": {
        "name": "dcae",
        "widths": [128, 256, 512, 512],
        "encoder_depths": [2, 2, 2, 3],
        "decoder_depths": [3, 3, 3, 3],
        "attention_stages": 1,
        "latent": 16,
    },
    "vae_sd1": {"name": "vae", "scale": 0.18215},
    "vae_sdxl": {"name": "vae", "scale": 0.13025},
    "vae_sd3": {"name": "vae", "latent": 16, "quant": False, "shift": 0.0609, "scale": 1.5305},
    "vae_flux": {"name": "vae", "latent": 16, "quant": False, "shift": 0.1159, "scale": 0.3611},
    "vae_f16c32": {"name": "vae", "widths": [128, 128, 256, 256, 512], "latent": 32, "quant": False},
}
"""name -> spec, for `sana_lab.config.specs.resolve`."""
