"""Losses of autoencoders other than pixel differences: KL divergence, LPIPS and the adversarial hinge loss.

Images are (B, 3, H, W) in [-1, 1].
"""

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_lab.config.digests import sha256
from sana_lab.types import Json


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(0, 1)) of each latent value in nats, in the shape of the mean."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of the discriminator; logits of any shape (arXiv 1705.02894)."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def hinge_generator(fake: Tensor) -> Tensor:
    """Hinge loss of the generator: minus the discriminator's mean logit on its images."""
    return -fake.mean()


Net = Literal["vgg", "alex"]


class Lpips(nn.Module):
    """Learned perceptual distance LPIPS 0.1 (arXiv 1801.03924), frozen.

    Uses features of VGG-16 (`vgg`, common as a training loss) or AlexNet (`alex`, common in reports). `weights` is
    torchvision's .pth file of that network, never downloaded; the five linear heads ship with torchmetrics.
    """

    stages = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # channels of VGG-16
    shift: Tensor
    scale: Tensor

    def __init__(self, weights: str | Path | None, net: Net = "vgg") -> None:
        super().__init__()
        self.net = net
        stages = vgg_stages(self.stages) if net == "vgg" else alex_stages()
        self.min_size = 16 if net == "vgg" else 31  # pixels a side, below which a pooling layer has no input
        self.features = nn.ModuleList(stages)
        self.heads = nn.ModuleList(nn.Conv2d(_width(stage), 1, 1, bias=False) for stage in stages)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None], persistent=False)
        self.path = _weights_path(weights, net)
        self._load_features(self.path)
        self._load_heads()
        self.requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances (B,); both images (B, 3, H, W), sides of at least `min_size`."""
        triples = zip(self.heads, self._activations(a), self._activations(b), strict=True)
        return torch.stack([head((x - y).square()).mean((1, 2, 3)) for head, x, y in triples]).sum(0)

    def identity(self) -> Json:
        """Facts that determine the distances: network, digest of its weights, version."""
        return {"net": self.net, "weights_sha256": sha256(self.path), "version": "0.1"}

    def _activations(self, images: Tensor) -> list[Tensor]:
        """Features of each stage, of unit length along the channels."""
        x, activations = (images - self.shift) / self.scale, []
        for stage in self.features:
            x = stage(x)
            activations.append(x / (1e-8 + x.square().sum(1, keepdim=True)).sqrt())
        return activations

    def _load_features(self, path: Path) -> None:
        """Load torchvision's weights, whose `features` layers are numbered consecutively, into the stages."""
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # on other bytes the reader raises anything
            raise ValueError(f"{path} is cut short or is no file of torchvision's {self.net} weights") from error
        state = state if isinstance(state, dict) else {}
        layers = [layer for stage in self.features for layer in stage.children()]
        for i, layer in enumerate(layers):
            for name, parameter in layer.named_parameters():
                parameter.data.copy_(_entry(state, f"features.{i}.{name}", parameter.shape, path, self.net))

    def _load_heads(self) -> None:
        from torchmetrics.functional.image import lpips

        path = Path(lpips.__file__).parent / "lpips_models" / f"{self.net}.pth"
        state = torch.load(path, map_location="cpu", weights_only=True)
        for i, weight in enumerate(self.heads.parameters()):
            weight.data.copy_(state[f"lin{i}.model.1.weight"])  # nothing on the meta device


def vgg_stages(stages: tuple[tuple[int, ...], ...]) -> list[nn.Sequential]:
    """VGG's convolutions, split after the last ReLU before each pool; every later stage begins with that pool."""
    width, out = 3, []
    for i, widths in enumerate(stages):
        layers: list[nn.Module] = [nn.MaxPool2d(2)] if i else []
        for w in widths:
            layers += [nn.Conv2d(width, w, 3, padding=1), nn.ReLU()]
            width = w
        out.append(nn.Sequential(*layers))
    return out


def alex_stages() -> list[nn.Sequential]:
    """AlexNet's five convolutions, split after each ReLU; the second and third stage begin with a pool."""
    return [
        nn.Sequential(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU()),
        nn.Sequential(nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU()),
        nn.Sequential(nn.MaxPool2d(3, 2), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
    ]


WEIGHT_FILES = {"vgg": ("VGG-16", "vgg16"), "alex": ("AlexNet", "alexnet")}
"""net -> name of the network, and beginning of the name of torchvision's file."""


def _width(stage: nn.Sequential) -> int:
    return [layer.out_channels for layer in stage if isinstance(layer, nn.Conv2d)][-1]


def _weights_path(weights: str | Path | None, net: Net) -> Path:
    if net not in WEIGHT_FILES:
        raise ValueError(f"LPIPS net is {net!r}, expected one of: {', '.join(WEIGHT_FILES)}")
    if weights is None or not Path(weights).is_file():
        problem = "no file was given" if weights is None else f"there is no file {str(weights)!r}"
        network, name = WEIGHT_FILES[net]
        raise ValueError(
            f"LPIPS needs torchvision's {network} weights and {problem}; set lpips_weights to a {name}-*.pth"
        )
    return Path(weights)


def _entry(state: dict[str, Tensor], key: str, shape: torch.Size, path: Path, net: Net) -> Tensor:
    if key not in state or state[key].shape != shape:
        entry = "no" if key not in state else f"a {tuple(state[key].shape)}"
        raise ValueError(
            f"{path} holds {entry} {key!r}; expected the state dict of torchvision's {WEIGHT_FILES[net][1]}"
        )
    return state[key]
