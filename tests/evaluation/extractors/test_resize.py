"""Resizes against Pillow, torch-fidelity and a closed form."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from sana_lab.evaluation.extractors.resize import resize

SIZES = [(64, 48, 29), (40, 40, 75), (33, 90, 33), (7, 5, 12)]


def noise(height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height)
    return torch.randint(0, 256, (2, 3, height, width), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize(("height", "width", "side"), SIZES)
def test_clean_is_pillows_bicubic_of_floats(height, width, side):
    images = noise(height, width)
    expected = [[pillow(channel, side) for channel in image] for image in images.numpy()]
    np.testing.assert_allclose(resize(images, side, "clean"), np.clip(expected, 0, 255), atol=1e-3)


def pillow(channel: np.ndarray, side: int) -> np.ndarray:
    image = Image.fromarray(channel.astype(np.float32))
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))


@pytest.mark.parametrize(("height", "width", "side"), SIZES)
def test_tf1_is_torch_fidelitys_to_the_last_bit(height, width, side):
    images = noise(height, width)
    expected = interpolate_bilinear_2d_like_tensorflow1x(images.float(), (side, side), align_corners=False)
    assert torch.equal(resize(images, side, "tf1"), expected)


def test_torch_looks_at_centres_and_at_four_pixels_alone():
    found = resize(noise(8, 8), 4, "torch")
    expected = torch.nn.functional.avg_pool2d(noise(8, 8).float(), 2)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("how", ["clean", "tf1", "torch", "none"])
def test_the_right_size_stays(how):
    images = noise(9, 9)
    torch.testing.assert_close(resize(images, 9, how), images.float(), atol=1e-4, rtol=0)


def test_only_clean_lets_no_fine_pattern_through():
    stripes = (torch.arange(64) % 2 * 255).byte().expand(1, 3, 64, 64)
    spread = {how: float(resize(stripes, 13, how)[..., 2:-2].std()) for how in ("clean", "tf1", "torch")}
    assert spread["clean"] < 3 < 40 < min(spread["tf1"], spread["torch"])


def test_what_is_refused():
    with pytest.raises(ValueError, match="images are 8x8, and resize 'none' expects 9x9"):
        resize(noise(8, 8), 9, "none")
    with pytest.raises(ValueError, match=r"expected uint8 \(B, 3, H, W\)"):
        resize(noise(8, 8).float(), 9, "clean")
