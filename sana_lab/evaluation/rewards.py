"""What people would prefer, as others' networks guess it: ImageReward (arXiv 2304.05977) and HPS v2 (2306.09341).

Thin adapters: the packages are installed by who wants them, and all weights are files of this machine.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, final

import torch
from PIL import Image
from torch import Tensor

from sana_lab.config.digests import sha256
from sana_lab.config.specs import RUNTIME, SpecError
from sana_lab.environment import place
from sana_lab.evaluation import Measure, Report
from sana_lab.evaluation.per_prompt import Scored
from sana_lab.types import Json


class Scorer(Protocol):
    """What says how well one picture suits a prompt."""

    def score(self, prompt: str, image: Tensor) -> float:
        """Of one uint8 (3, H, W) image."""
        ...

    def is_cut(self, prompt: str) -> bool:
        """Whether the network reads only the beginning of the prompt."""
        ...

    def identity(self) -> Json:
        """What the numbers depend on."""
        ...


class Rewards:
    """The mean of a scorer over images, under the name of a column."""

    def __init__(self, column: str, scorer: Scorer) -> None:
        self.column, self.scorer, self.scored = column, scorer, Scored()

    def add(self, images: Tensor, rows: Sequence[Json]) -> None:
        prompts = [row["prompt"] for row in rows]
        values = [self.scorer.score(prompt, image) for prompt, image in zip(prompts, images, strict=True)]
        self.scored.add(prompts, values)
        self.scored.cut |= {p: self.scorer.is_cut(p) for p in prompts if p not in self.scored.cut}

    def report(self) -> Report:
        values = {self.column: self.scored.mean(), f"{self.column}_truncated": self.scored.share_cut()}
        cut = values[f"{self.column}_truncated"].value
        settings = {**self.scorer.identity(), **self.scored.counts(), "truncated_percent": cut}
        return Report(values, settings, {self.column: list(self.scored.values)})


@final
class ImageReward(Measure):
    """`image_reward`, and `image_reward_truncated`, the percent of prompts over the 35 tokens that it reads.

    `model` is ImageReward.pt, `config` its med_config.json. The package scales its numbers itself: (r - 0.167) / 1.033.
    Its tokenizer is bert-base-uncased, from the local cache of the hub. ImportError names the package.
    """

    def __init__(self, model: str, config: str, device: Annotated[str, RUNTIME] = "auto") -> None:
        self.rewards = Rewards("image_reward", ImageRewardScorer(model, config, device))

    def add(self, images: Tensor, rows: Sequence[Json]) -> None:
        self.rewards.add(images, rows)

    def report(self) -> Report:
        return self.rewards.report()


@final
class Hps(Measure):
    """`hps`, 100 x the cosine under HPS v2's fine-tuned ViT-H/14, and `hps_truncated`, the percent of prompts cut.

    `model` is HPS_v2_compressed.pt or HPS_v2.1_compressed.pt, and `version` says which: their values are not
    comparable. In fp32, where the original runs under autocast. Its own benchmark is 3,200 prompts in four styles.
    ImportError names the package.
    """

    def __init__(
        self, model: str, version: Literal["2.0", "2.1"] = "2.1", device: Annotated[str, RUNTIME] = "auto"
    ) -> None:
        self.rewards = Rewards("hps", HpsScorer(model, version, device))

    def add(self, images: Tensor, rows: Sequence[Json]) -> None:
        self.rewards.add(images, rows)

    def report(self) -> Report:
        return self.rewards.report()


class ImageRewardScorer:
    """The package `image-reward` on its own files."""

    TOKENS = 35

    def __init__(self, model: str, config: str, device: str) -> None:
        for path in (model, config):
            _check_file(path, "ImageReward.pt and med_config.json from the hub's THUDM/ImageReward")
        package = _package("ImageReward", "image-reward")
        self.network = package.load(model, device=str(place(device)), med_config=config)
        self.weights_sha256 = sha256(Path(model))

    def score(self, prompt: str, image: Tensor) -> float:
        with torch.no_grad():
            return float(self.network.score(prompt, _picture(image)))

    def is_cut(self, prompt: str) -> bool:
        return len(self.network.blip.tokenizer(prompt)["input_ids"]) > self.TOKENS

    def identity(self) -> Json:
        return {"scorer": "ImageReward", "weights_sha256": self.weights_sha256, "max_tokens": self.TOKENS}


class HpsScorer:
    """HPS v2 on the package `open_clip_torch`, which it is a fine-tuned model of."""

    def __init__(self, model: str, version: str, device: str) -> None:
        _check_file(model, "HPS_v2_compressed.pt or HPS_v2.1_compressed.pt from the hub's xswu/HPSv2")
        package = _package("open_clip", "open_clip_torch")
        network, _, self.prepare = package.create_model_and_transforms("ViT-H-14")
        network.load_state_dict(torch.load(model, map_location="cpu", weights_only=True)["state_dict"])
        self.device, self.version = place(device), version
        self.network, self.tokenizer = network.float().eval().to(self.device), package.get_tokenizer("ViT-H-14")
        self.weights_sha256 = sha256(Path(model))

    @torch.no_grad()
    def score(self, prompt: str, image: Tensor) -> float:
        pixels = self.prepare(_picture(image))[None].to(self.device)
        picture = self.network.encode_image(pixels, normalize=True)
        text = self.network.encode_text(self.tokenizer([prompt]).to(self.device), normalize=True)
        return 100 * float((picture * text).sum())

    def is_cut(self, prompt: str) -> bool:
        return len(self.tokenizer.encode(prompt)) + 2 > self.tokenizer.context_length

    def identity(self) -> Json:
        facts = {"weights_sha256": self.weights_sha256, "max_tokens": self.tokenizer.context_length}
        return {"scorer": f"HPS v{self.version}", **facts, "dtype": "float32"}


def _package(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"this measure needs the package {name}: pip install {name} ({error})") from error


def _check_file(path: str, what: str) -> None:
    if not Path(path).is_file():
        raise SpecError(f"there is no file {path!r}; expected {what}")


def _picture(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
