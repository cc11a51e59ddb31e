"""The shared tiny objects fit together."""

import tiny
import torch


def test_a_tiny_system_samples():
    system = tiny.text2image().eval()
    from sana_lab.diffusion.sampling import Sampling

    images = system.sample(["a red circle"], size=16, sampling=Sampling("euler", 1, 2.0))
    assert images.shape == (1, 3, 16, 16)
    assert images.dtype == torch.uint8


def test_a_tiny_dit_reads_the_tiny_caption():
    text = tiny.caption([2, 5])
    velocity = tiny.dit(dtype=torch.float64)(torch.zeros(2, 4, 4, 6, dtype=torch.float64), torch.ones(2).double(), text)
    assert velocity.shape == (2, 4, 4, 6)
    assert velocity.isfinite().all()


def test_the_same_call_gives_the_same_weights():
    first, second = tiny.autoencoder(), tiny.autoencoder()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
