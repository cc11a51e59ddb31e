"""What trains an autoencoder besides pixel differences: KL, LPIPS, and the two sides of a hinge game.

Images are (B, 3, H, W) in [-1, 1].
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(0, 1)) of each latent value, in nats; same shape as the mean."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's hinge loss over logits of any shape (arXiv 1705.02894)."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def hinge_generator(fake: Tensor) -> Tensor:
    """The generator's side: raise the discriminator's logits."""
    return -fake.mean()


class Lpips(nn.Module):
    """Learned perceptual distance on VGG-16 features (arXiv 1801.03924), frozen.

    `weights` is torchvision's VGG-16 .pth, which is never downloaded; the five linear heads come with torchmetrics.
    """

    stages = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
    shift: Tensor
    scale: Tensor

    def __init__(self, weights: str | Path | None) -> None:
        super().__init__()
        self.features = nn.ModuleList(vgg_stages(self.stages))
        self.heads = nn.ModuleList(nn.Conv2d(stage[-1], 1, 1, bias=False) for stage in self.stages)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None], persistent=False)
        self._load_features(_vgg_file(weights))
        self._load_heads()
        self.requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances (B,); both images (B, 3, H, W), sides of at least 16."""
        triples = zip(self.heads, self._activations(a), self._activations(b), strict=True)
        return torch.stack([head((x - y).square()).mean((1, 2, 3)) for head, x, y in triples]).sum(0)

    def _activations(self, images: Tensor) -> list[Tensor]:
        x, found = (images - self.shift) / self.scale, []
        for stage in self.features:
            x = stage(x)
            found.append(x / (1e-8 + x.square().sum(1, keepdim=True)).sqrt())
        return found

    def _load_features(self, path: Path) -> None:
        """torchvision numbers all layers of `features` in one row; ours are cut at the pools."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        flat = [layer for stage in self.features for layer in stage.children()]
        for i, layer in enumerate(flat):
            if isinstance(layer, nn.Conv2d):
                layer.load_state_dict({k: _entry(state, f"features.{i}.{k}", path) for k in ("weight", "bias")})

    def _load_heads(self) -> None:
        from torchmetrics.functional.image import lpips

        path = Path(lpips.__file__).parent / "lpips_models" / "vgg.pth"
        state = torch.load(path, map_location="cpu", weights_only=True)
        for i, layer in enumerate(self.heads):
            layer.load_state_dict({"weight": state[f"lin{i}.model.1.weight"]})


def vgg_stages(stages: tuple[tuple[int, ...], ...]) -> list[nn.Sequential]:
    """VGG's convolutions, cut after the last ReLU before each pool; every stage but the first begins with that pool."""
    width, out = 3, []
    for i, widths in enumerate(stages):
        layers: list[nn.Module] = [nn.MaxPool2d(2)] if i else []
        for w in widths:
            layers += [nn.Conv2d(width, w, 3, padding=1), nn.ReLU()]
            width = w
        out.append(nn.Sequential(*layers))
    return out


def _vgg_file(weights: str | Path | None) -> Path:
    if weights is None or not Path(weights).is_file():
        given = "no file was given" if weights is None else f"there is no file {str(weights)!r}"
        raise ValueError(f"LPIPS needs torchvision's VGG-16 weights and {given}; set lpips_weights to a vgg16-*.pth")
    return Path(weights)


def _entry(state: dict[str, Tensor], key: str, path: Path) -> Tensor:
    if key not in state:
        raise ValueError(f"{path} holds no {key!r}; expected the state dict of torchvision's vgg16")
    return state[key]
