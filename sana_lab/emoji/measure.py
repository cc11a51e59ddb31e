"""The measure `emoji`: are held-out drawings, asked for by their labels, those that come, and in the right skin tone?

Columns: `emoji_tone`, the share of images whose skin has the tone of the caption, by luminance (`tone.judge`), of
drawings with one tone and enough skin; `emoji_recall`, the share that is nearer to the true drawing than to each of its
neighbours, the nearest other drawings of the same vendor; `emoji_recall_all`, the same among all of the vendor's;
`emoji_concept`, the share whose nearest drawing shows the same concept, in any tone. Nearness is of the features of
`emoji_features`.
"""

from collections.abc import Sequence
from typing import Annotated, NamedTuple, final

import torch
from torch import Tensor

from sana_lab.checkpoints.networks import trained
from sana_lab.config import specs
from sana_lab.config.ranges import Count
from sana_lab.config.specs import RUNTIME, Spec, SpecError
from sana_lab.emoji import tone
from sana_lab.emoji.data import Emoji
from sana_lab.emoji.drawings import TONES, Drawing
from sana_lab.emoji.networks import SIDE, Features, features_of
from sana_lab.environment import place
from sana_lab.evaluation import Measure, Report
from sana_lab.evaluation.extractors.resize import resize
from sana_lab.evaluation.per_prompt import Coverage
from sana_lab.intervals import clustered_share
from sana_lab.types import Json

COLUMNS = ("emoji_tone", "emoji_recall", "emoji_recall_all", "emoji_concept")
"""Names of the measure's numbers."""


class Row(NamedTuple):
    """What is true of a held-out drawing."""

    drawing: Drawing
    row: int  # of the gallery
    neighbours: Tensor  # (K,) indices into the gallery, the drawing itself first
    skin: tone.Skin | None  # where and how it shows skin; None if it has not one tone


@final
class EmojiMeasure(Measure):
    """Share of images in which the held-out drawing is recognised; see the module. SpecError for other data.

    A share of 1/`neighbours` of `emoji_recall`, and 0 of `emoji_tone`, is chance.
    """

    scores_images = False

    def __init__(
        self,
        data: Annotated[Spec, "data"] = "emoji",  # data set whose held-out drawings are asked for, at 64 px
        weights: str = "experiment:emoji_features",  # experiment:NAME or the weights file of such an experiment
        drawings: Count = 1000,  # most held-out drawings to ask for
        neighbours: Count = 32,  # drawings among which the true one is looked for, itself included
        images_per_prompt: Count = 1,  # images per drawing
        device: Annotated[str, RUNTIME] = "auto",  # auto, cpu, cuda, cuda:1 ...
    ) -> None:
        built = specs.build("data", data)
        if not isinstance(built, Emoji) or built.size != SIDE:
            raise SpecError(f"measure 'emoji' compares with data: emoji at {SIDE} px; given {type(built).__name__}")
        self.device, self.images_per_prompt, self.neighbours = place(device), images_per_prompt, neighbours
        network, self.weights_sha256 = trained(weights, Features)
        self.network, self.data = network.to(self.device), built
        drawn_by = [drawing.vendor for drawing in built.content.rows]
        self.own = {v: torch.tensor([i for i, w in enumerate(drawn_by) if v == w]) for v in built.vendors}
        self.gallery = features_of(self.network, built.pictures(range(len(drawn_by))).to(self.device)).cpu()
        self.truths = self._truths(built.content.val[:drawings])
        self.rows = [{"prompt": prompt} for prompt in built.prompts_at(range(len(self.truths)), "val")]
        self.coverage = Coverage(self.rows, images_per_prompt)
        self.outcomes: dict[str, list[tuple[int, float]]] = {name: [] for name in COLUMNS}
        self.judged: list[tuple[int, int | None]] = []  # tones of captions and of images

    def add(self, images: Tensor, rows: Sequence[Json]) -> None:
        self.collect(self.extract(images, rows), rows)

    def extract(self, images: Tensor, rows: Sequence[Json]) -> tuple[Tensor, Tensor]:
        """Features (B, D) and pictures of 64 px (B, 3, 64, 64), which the tone of skin is read from."""
        pictures = resize(images.to(self.device), SIDE, "clean").round().to(torch.uint8)
        return features_of(self.network, pictures).cpu(), pictures.cpu()

    def collect(self, extracted: tuple[Tensor, Tensor], rows: Sequence[Json]) -> None:
        features, pictures = extracted
        for row, picture, cosines in zip(rows, pictures, features @ self.gallery.T, strict=True):
            i = self.coverage.index_of(row)
            self.coverage.count(i)
            for name, value in self._verdicts(self.truths[i], picture, cosines).items():
                self.outcomes[name].append((i, float(value)))

    def report(self) -> Report:
        values = {name: [value for _, value in pairs] for name, pairs in self.outcomes.items() if pairs}
        estimates = {n: clustered_share(v, [i for i, _ in self.outcomes[n]]) for n, v in values.items()}
        return Report(estimates, self._settings(), values)

    def details(self) -> Json:
        """Numbers of images by the tone of the caption (rows) and of the image (columns, the last without skin)."""
        counts = [[0] * (len(TONES) + 1) for _ in TONES]
        for truth, judged in self.judged:
            counts[truth - 1][len(TONES) if judged is None else judged - 1] += 1
        return {"emoji": {"tones": counts, "order": [*TONES, "no skin"]}}

    def _verdicts(self, truth: Row, picture: Tensor, cosines: Tensor) -> dict[str, bool]:
        own = self.own[truth.drawing.vendor]
        nearest = int(own[cosines[own].argmax()])
        among = int(truth.neighbours[cosines[truth.neighbours].argmax()])
        verdicts = {
            "emoji_recall": among == truth.row,
            "emoji_recall_all": nearest == truth.row,
            "emoji_concept": self.data.content.rows[nearest].concept == truth.drawing.concept,
        }
        if truth.skin is not None:
            judged = tone.judge(picture, truth.skin)
            self.judged.append((truth.drawing.tones[0], judged))
            verdicts["emoji_tone"] = judged == truth.drawing.tones[0]
        return verdicts

    def _truths(self, indices: Sequence[int]) -> list[Row]:
        table = {(d.vendor, d.base, d.tones): i for i, d in enumerate(self.data.content.rows)}
        return [self._truth(i, table) for i in indices]

    def _truth(self, index: int, table: dict[tuple[str, str, tuple[int, ...]], int]) -> Row:
        drawing = self.data.content.rows[index]
        own = self.own[drawing.vendor]
        similar = self.gallery[own] @ self.gallery[index]
        similar[own == index] = torch.inf
        neighbours = own[similar.topk(min(self.neighbours, len(own))).indices]
        variants = [table.get((drawing.vendor, drawing.base, (t,))) for t in range(1, len(TONES) + 1)]
        complete = [v for v in variants if v is not None]
        single = len(drawing.tones) == 1 and len(complete) == len(TONES)
        return Row(drawing, index, neighbours, tone.skin(self.data.pictures(complete)) if single else None)

    def _settings(self) -> Json:
        return {
            "data": self.data.digest(),
            "split": [self.data.by, self.data.held_out],
            "weights_sha256": self.weights_sha256,
            "neighbours": self.neighbours,
            "among": len(self.gallery),
            "skin": {"contrast": tone.CONTRAST, "limit": tone.LIMIT, "min_pixels": tone.MIN_PIXELS},
            "interval": "95 %, clustered by prompt",
            **self.coverage.settings(),
        }
