"""A patch discriminator: one logit per receptive field (arXiv 1611.07004)."""

from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Images (B, 3, H, W) -> logits (B, 1, h, w), about a 2^depth-th of the size; 4x4 convolutions, 70 px fields at depth 3."""

    def __init__(self, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        widths = [width * min(2**i, 8) for i in range(depth + 1)]
        blocks = [_block(a, b, stride=2 if i < depth - 1 else 1) for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False))]
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
