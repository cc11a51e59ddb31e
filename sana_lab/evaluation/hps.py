"""HPS v2 (arXiv 2306.09341), a learned human preference score: a fine-tuned CLIP by `open_clip_torch`, local files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, final

import torch
from torch import Tensor

from sana_lab.checkpoints import files, weights
from sana_lab.config import digests
from sana_lab.config.specs import RUNTIME
from sana_lab.environment import place
from sana_lab.evaluation import Measure, Report
from sana_lab.evaluation.preference import PreferenceScores, check_file, import_package, pil_image
from sana_lab.types import Json


@final
class Hps(Measure):
    """100 x the mean cosine `hps` under HPS v2's ViT-H/14, and `hps_truncated`, the percentage of truncated prompts.

    In fp32, where the original runs under autocast. Its own benchmark has 3,200 prompts in four styles. SpecError for
    missing files; ImportError names the package.
    """

    own_prompts = False

    def __init__(
        self,
        model: str,  # path of HPS_v2_compressed.pt or HPS_v2.1_compressed.pt
        version: Literal["2.0", "2.1"] = "2.1",  # which of them; their values are not comparable
        device: Annotated[str, RUNTIME] = "auto",  # auto, cpu, cuda, cuda:1 ...
    ) -> None:
        self.scores = PreferenceScores("hps", Scorer(model, version, device))

    def add(self, images: Tensor, rows: Sequence[Json]) -> None:
        self.collect(self.extract(images, rows), rows)

    def extract(self, images: Tensor, rows: Sequence[Json]) -> list[float]:
        return self.scores.extract(images, rows)

    def collect(self, extracted: list[float], rows: Sequence[Json]) -> None:
        self.scores.collect(extracted, rows)

    def report(self) -> Report:
        return self.scores.report()


class Scorer:
    """The fine-tuned CLIP."""

    def __init__(self, model: str, version: str, device: str) -> None:
        check_file(model, "HPS_v2_compressed.pt or HPS_v2.1_compressed.pt from the hub's xswu/HPSv2")
        package = import_package("open_clip", "open_clip_torch")
        network, _, self.preprocess = package.create_model_and_transforms("ViT-H-14")
        weights.load_state(network, files.read_torch(Path(model)), "", model)
        self.device, self.version = place(device), version
        self.network, self.tokenizer = network.float().eval().to(self.device), package.get_tokenizer("ViT-H-14")
        self.weights_sha256 = digests.sha256(Path(model))

    @torch.no_grad()
    def score(self, prompt: str, image: Tensor) -> float:
        pixels = self.preprocess(pil_image(image))[None].to(self.device)
        image_feature = self.network.encode_image(pixels, normalize=True)
        text_feature = self.network.encode_text(self.tokenizer([prompt]).to(self.device), normalize=True)
        return 100 * float((image_feature * text_feature).sum())

    def is_truncated(self, prompt: str) -> bool:
        return len(self.tokenizer.encode(prompt)) + 2 > self.tokenizer.context_length

    def identity(self) -> Json:
        facts = {"weights_sha256": self.weights_sha256, "max_tokens": self.tokenizer.context_length}
        return {"scorer": f"HPS v{self.version}", **facts, "dtype": "float32"}
