"""What trains an autoencoder besides pixel differences: KL, LPIPS, and the two sides of a hinge game.

Images are (B, 3, H, W) in [-1, 1].
"""

import hashlib
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_lab.types import Json


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(0, 1)) of each latent value, in nats; same shape as the mean."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's hinge loss over logits of any shape (arXiv 1705.02894)."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def hinge_generator(fake: Tensor) -> Tensor:
    """The generator's side: raise the discriminator's logits."""
    return -fake.mean()


Net = Literal["vgg", "alex"]


class Lpips(nn.Module):
    """Learned perceptual distance (arXiv 1801.03924) on VGG-16 features, as trained with, or AlexNet's, as reported.

    `weights` is torchvision's .pth of that network, which is never downloaded; the five linear heads come with
    torchmetrics. Frozen.
    """

    stages = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # VGG-16's widths
    shift: Tensor
    scale: Tensor

    def __init__(self, weights: str | Path | None, net: Net = "vgg") -> None:
        super().__init__()
        self.net = net
        stages = vgg_stages(self.stages) if net == "vgg" else alex_stages()
        self.least = 16 if net == "vgg" else 31  # pixels a side, below which a pool has nothing left
        self.features = nn.ModuleList(stages)
        self.heads = nn.ModuleList(nn.Conv2d(_width(stage), 1, 1, bias=False) for stage in stages)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None], persistent=False)
        self.path = _file(weights, net)
        self._load_features(self.path)
        self._load_heads()
        self.requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances (B,); both images (B, 3, H, W), sides of at least `least`."""
        triples = zip(self.heads, self._activations(a), self._activations(b), strict=True)
        return torch.stack([head((x - y).square()).mean((1, 2, 3)) for head, x, y in triples]).sum(0)

    def identity(self) -> Json:
        """What its distances depend on."""
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"net": self.net, "weights_sha256": digest, "version": "0.1"}

    def _activations(self, images: Tensor) -> list[Tensor]:
        x, found = (images - self.shift) / self.scale, []
        for stage in self.features:
            x = stage(x)
            found.append(x / (1e-8 + x.square().sum(1, keepdim=True)).sqrt())
        return found

    def _load_features(self, path: Path) -> None:
        """torchvision numbers all layers of `features` in one row; ours are cut where a distance is taken."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        flat = [layer for stage in self.features for layer in stage.children()]
        for i, layer in enumerate(flat):
            for name, own in layer.named_parameters():
                own.data.copy_(_entry(state, f"features.{i}.{name}", own.shape, path, self.net))

    def _load_heads(self) -> None:
        from torchmetrics.functional.image import lpips

        path = Path(lpips.__file__).parent / "lpips_models" / f"{self.net}.pth"
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


def alex_stages() -> list[nn.Sequential]:
    """AlexNet's five convolutions, cut after each ReLU; the second and third begin with a pool."""
    return [
        nn.Sequential(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU()),
        nn.Sequential(nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU()),
        nn.Sequential(nn.MaxPool2d(3, 2), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
    ]


FILE = {"vgg": ("VGG-16", "vgg16"), "alex": ("AlexNet", "alexnet")}
"""What torchvision's weights are called, in words and in file names."""


def _width(stage: nn.Sequential) -> int:
    return [layer.out_channels for layer in stage if isinstance(layer, nn.Conv2d)][-1]


def _file(weights: str | Path | None, net: Net) -> Path:
    if net not in FILE:
        raise ValueError(f"LPIPS net is {net!r}, expected one of: {', '.join(FILE)}")
    if weights is None or not Path(weights).is_file():
        given = "no file was given" if weights is None else f"there is no file {str(weights)!r}"
        words, name = FILE[net]
        raise ValueError(f"LPIPS needs torchvision's {words} weights and {given}; set lpips_weights to a {name}-*.pth")
    return Path(weights)


def _entry(state: dict[str, Tensor], key: str, shape: torch.Size, path: Path, net: Net) -> Tensor:
    if key not in state or state[key].shape != shape:
        what = "no" if key not in state else f"a {tuple(state[key].shape)}"
        raise ValueError(f"{path} holds {what} {key!r}; expected the state dict of torchvision's {FILE[net][1]}")
    return state[key]
