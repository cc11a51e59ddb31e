"""The real SANA on the meta device: sizes, tokens and multiply-accumulates of the paper from our own modules."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from sana_lab.bench.bench import pair_tmacs
from sana_lab.config import experiments, specs
from sana_lab.models.text import loading
from sana_lab.systems.text2image import TextToImage
from sana_lab.training import checks

SIZES = {
    "sana_600m_512": 591.75,
    "sana_600m_1024": 591.75,
    "sana_600m_2048": 591.75,
    "sana_600m_4096": 591.75,
    "sana_1600m_512": 1604.46,
    "sana_1600m_1024": 1604.46,
    "sana_1600m_2048": 1604.46,
    "sana_1600m_4096": 1604.46,
}
"""Millions of parameters in the DiT, from the released code's layers (the paper rounds to 590 and 1604)."""

OTHERS = ("sana1_5_1600m_1024", "sana1_5_4800m_1024", "sana_600m_f8_1024", "sana_600m_f8_256", "sana_600m_t5_xxl",
          "sana_600m_t5_large", "sana_600m_cascade", "sana_sprint_600m_1024", "sana_sprint_1600m_1024")  # fmt: skip


def bare(kind: str, spec: specs.Spec, **supplied: Any) -> Any:
    with torch.device("meta"):
        return specs.build(kind, spec, **supplied)


def millions(module: torch.nn.Module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6


def dit_of(name: str, text_dim: int = 2304) -> Any:
    system = experiments.load(name)["system"]
    return bare("dit", system["dit"], channels=bare("autoencoder", system["autoencoder"]).channels, text_dim=text_dim)


def test_every_preset_is_named_here():
    assert {n for n in experiments.available("experiments") if n.startswith("sana")} == {*SIZES, *OTHERS}


@pytest.mark.parametrize("name", [*SIZES, *OTHERS])
def test_a_denoiser_has_the_published_size(name: str):
    dit = dit_of(name)
    assert len(dit.blocks) == experiments.load(name)["system"]["dit"]["depth"]
    assert name in OTHERS or round(millions(dit), 2) == SIZES[name]


@pytest.mark.parametrize("name", [*SIZES, *OTHERS])
def test_a_whole_system_is_checked_without_a_network(name: str, here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loading, "HfApi", None)  # asking the hub would raise
    checks.check(experiments.load(name))


@pytest.mark.parametrize(
    ("name", "width", "depth"),
    [
        ("sana1_5_1600m_1024", 2240, 20),
        ("sana1_5_4800m_1024", 2240, 60),
        ("sana_sprint_600m_1024", 1152, 28),
        ("sana_sprint_1600m_1024", 2240, 20),
    ],
)
def test_sana_1_5_and_sprint_are_as_large_as_diffusers_own(name: str, width: int, depth: int):
    diffusers = pytest.importorskip("diffusers")
    heads = 20 if width == 2240 else 16
    shape = {"num_attention_heads": width // 32, "attention_head_dim": 32, "num_cross_attention_heads": heads}
    shape |= {"cross_attention_head_dim": width // heads, "cross_attention_dim": width, "caption_channels": 2304}
    shape |= {"num_layers": depth, "qk_norm": "rms_norm_across_heads", "guidance_embeds": "sprint" in name}
    with torch.device("meta"):
        theirs = diffusers.SanaTransformer2DModel(**shape)
    assert millions(dit_of(name)) == millions(theirs)


# --- Table 8 of the paper

BLOCKS = [
    ("FullAttn & FFN", "sana_600m_f8_1024", [], 6.48),
    ("+ LinearAttn", "sana_600m_f8_1024", ["system.dit.attention=linear"], 4.30),
    ("+ MixFFN", "sana_600m_f8_1024", ["system.dit.attention=linear", "system.dit.ffn=mix"], 4.19),
    ("LinearAttn & MixFFN, F32C32P1", "sana_600m_1024", [], 1.08),
]


@pytest.mark.parametrize(("label", "name", "overrides", "expected"), BLOCKS)
def test_macs_of_table_8(label: str, name: str, overrides: list[str], expected: float):
    """Within 2 %, counted as `evaluation.flops.PAIR` says."""
    experiment = experiments.load(name, overrides)
    autoencoder = bare("autoencoder", experiment["system"]["autoencoder"])
    side = experiments.image_size(experiment["data"]) // autoencoder.downsample
    tmacs = pair_tmacs(experiment["system"]["dit"], (autoencoder.channels, side, side), 2304)
    assert tmacs == pytest.approx(expected, rel=0.02), label


# --- tokens


@pytest.mark.parametrize(
    ("autoencoder", "patch", "tokens"),
    [
        ("vae_sdxl", 2, {256: 256, 512: 1024, 1024: 4096, 2048: 16384, 4096: 65536}),
        ("vae_sd3", 4, {256: 64, 512: 256, 1024: 1024, 2048: 4096, 4096: 16384}),
        ("dcae_f8c16", 4, {256: 64, 512: 256, 1024: 1024, 2048: 4096, 4096: 16384}),
        ("vae_f16c32", 2, {256: 64, 512: 256, 1024: 1024, 2048: 4096, 4096: 16384}),
        ("dcae_f16c32", 2, {256: 64, 512: 256, 1024: 1024, 2048: 4096, 4096: 16384}),
        ("dcae_f32c32_sana_1_0", 1, {256: 64, 512: 256, 1024: 1024, 2048: 4096, 4096: 16384}),
        ("dcae_f64c128_mix_1_0", 1, {256: 16, 512: 64, 1024: 256, 2048: 1024, 4096: 4096}),
        ("dcae_f128c512_mix_1_0", 1, {256: 4, 512: 16, 1024: 64, 2048: 256, 4096: 1024}),
    ],
)
def test_tokens(autoencoder: str, patch: int, tokens: dict[int, int]):
    """What the DiT really sees at each size."""
    with torch.device("meta"):
        dit = {**tiny.DIT, "patch": patch}
        system = TextToImage(dit=dit, autoencoder=autoencoder)
        grids = {size: system.dit.embed(torch.empty(1, *system.latent_shape(size))) for size in tokens}
    assert {size: grid.shape[1] * grid.shape[2] for size, grid in grids.items()} == tokens
