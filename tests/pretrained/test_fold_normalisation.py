"""A scale and shift per channel, folded into the convolutions: the same images and latents in diffusers."""

from pathlib import Path
from typing import Any

import pytest
import tiny_peers
import torch

from sana_lab.pretrained import export, loading


@torch.no_grad()
def normalised(part: Any, shift: bool) -> Any:
    """The autoencoder in float64 with a random scale, and maybe a shift, for each channel."""
    random = torch.Generator().manual_seed(5)
    part.scale.copy_(0.2 + 3 * torch.rand(part.channels, generator=random))
    part.shift.copy_(torch.randn(part.channels, generator=random) * shift)
    return part.double().eval()


@pytest.mark.parametrize(
    ("kind", "changes", "shift"),
    [
        ("AutoencoderDC", {}, False),
        ("AutoencoderDC", {"latent_channels": 4}, False),
        ("AutoencoderKL", {}, True),
        ("AutoencoderKL", {"use_quant_conv": True, "use_post_quant_conv": True}, True),
    ],
)  # fmt: skip
@torch.no_grad()
def test_a_scale_per_channel_is_folded(tmp_path: Path, kind: str, changes: dict[str, Any], shift: bool):
    """Latents, images and the KL autoencoder's deviations agree, borders included."""
    import diffusers

    make = tiny_peers.dc_autoencoder if kind == "AutoencoderDC" else tiny_peers.kl_autoencoder
    ours = normalised(loading.load(tiny_peers.saved(make(**changes), tmp_path / "a")), shift)
    assert export.export(ours, tmp_path / "b") == []
    theirs = getattr(diffusers, kind).from_pretrained(tmp_path / "b", low_cpu_mem_usage=False, dtype=torch.float64)
    assert theirs.config.scaling_factor == 1.0
    assert kind == "AutoencoderDC" or theirs.config.shift_factor is None
    images = torch.randn(1, 3, 16, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    encoded = theirs.encode(images)
    latents = encoded.latent if kind == "AutoencoderDC" else encoded.latent_dist.mean
    assert (ours.encode(images) - latents).abs().max() <= 1e-6 * latents.abs().max()  # diffusers' attention: float32
    image = theirs.decode(latents).sample
    assert (ours.decode(latents) - image).abs().max() <= 1e-6 * image.abs().max()
    if kind == "AutoencoderKL":
        deviation = (0.5 * ours.posterior(images)[1]).exp() * ours.scale[:, None, None]
        assert torch.allclose(encoded.latent_dist.std, deviation)
    back = loading.load(tmp_path / "b").double()
    assert torch.allclose(back.encode(images), ours.encode(images), rtol=1e-10)
