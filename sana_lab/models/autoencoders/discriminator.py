"""PatchGAN discriminator: one logit per receptive field (pix2pix, arXiv 1611.07004, section 3.2.2)."""

from itertools import pairwise

from torch import Tensor, nn

LEAST_SIZE = 24
"""Height and width of the smallest images at depth 3."""


class PatchDiscriminator(nn.Module):
    """Images (B, 3, H, W) -> logits (B, 1, h, w).

    At depth 3 the receptive field is 70 x 70 pixels, and H and W are at least `LEAST_SIZE`.
    """

    def __init__(self, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        widths = [width * min(2**i, 8) for i in range(depth + 1)]
        strides = [2] * (depth - 1) + [1]
        blocks = [_block(a, b, stride) for (a, b), stride in zip(pairwise(widths), strides, strict=True)]
        stem = nn.Sequential(nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2))
        self.layers = nn.Sequential(stem, *blocks, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        self.layers.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def _block(width: int, out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width, out, 4, stride, 1, bias=False), nn.BatchNorm2d(out), nn.LeakyReLU(0.2))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
