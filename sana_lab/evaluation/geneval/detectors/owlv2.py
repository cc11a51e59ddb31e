"""OWLv2 (arXiv 2306.09683) as an open-vocabulary detector: boxes without masks.

Legend: P boxes (one per patch), C classes, D width.
"""

from typing import Annotated, final

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import Owlv2ForObjectDetection

from sana_lab.config.ranges import Share
from sana_lab.config.specs import RUNTIME
from sana_lab.environment import place
from sana_lab.evaluation import transformers_models
from sana_lab.evaluation.geneval.detectors import Detector
from sana_lab.evaluation.geneval.prompts import coco_classes
from sana_lab.models.text.loading import load_tokenizer
from sana_lab.models.text.tokenizer import pad_rows, padding_id, token_rows
from sana_lab.types import Json, Object


@final
class Owlv2(Detector):
    """OWLv2 with each class as the text "a photo of a <class>".

    It gives no masks, so colours are judged on whole boxes. Its scores are lower than Mask2Former's; the default
    thresholds are not calibrated.
    """

    title = "OWLv2"

    def __init__(
        self,
        model: str,  # transformers folder, such as a copy of google/owlv2-base-patch16-ensemble
        threshold: Share = 0.2,  # score in [0, 1] that an object must exceed
        counting_threshold: Share = 0.3,  # the same for the task `counting`
        overlap: Share = 0.5,  # intersection over union above which only the best box of a class stays
        labels: list[str] | None = None,  # classes to detect; None: GenEval's 80
        device: Annotated[str, RUNTIME] = "auto",  # auto, cpu, cuda, cuda:1 ...
    ) -> None:
        self.network = transformers_models.load(Owlv2ForObjectDetection, model, "owlv2").to(place(device))
        self.processor = transformers_models.load_processor(model)
        self.threshold, self.counting_threshold, self.overlap = threshold, counting_threshold, overlap
        self.labels = coco_classes() if labels is None else labels
        self.weights_sha256 = transformers_models.weights_sha256(model)
        self.queries = self._queries(model)

    @torch.no_grad()
    def detect(self, image: Tensor) -> list[Object]:
        network = self.network
        pixels = transformers_models.pixel_values(self.processor, [image]).to(network.device)
        grid = network.image_embedder(pixels)[0]
        patches = grid.flatten(1, 2)
        logits = network.class_predictor(patches, self.queries[None])[0][0]  # (P, C)
        scores, labels = logits.sigmoid().max(-1)
        boxes = corners(network.box_predictor(patches, grid)[0], *image.shape[1:])
        order = scores.argsort(descending=True, stable=True)
        order = order[scores[order] > min(self.threshold, self.counting_threshold)]
        order = order[non_maximum_suppression(boxes[order], labels[order], self.overlap)]
        return [Object(self.labels[labels[i]], tuple(boxes[i].tolist()), float(scores[i])) for i in order]

    def identity(self) -> Json:
        return {
            "detector": "owlv2",
            "weights_sha256": self.weights_sha256,
            "preprocessing": transformers_models.preprocessing(self.processor),
            "labels": list(self.labels),
            "overlap": self.overlap,
            "thresholds": [self.threshold, self.counting_threshold],
            "dtype": "float32",
        }

    @torch.no_grad()
    def _queries(self, model: str) -> Tensor:
        """(C, D) unit-length text features of the classes."""
        tokenizer, max_tokens = load_tokenizer(model), self.network.config.text_config.max_position_embeddings
        rows = token_rows(tokenizer, [f"a photo of a {label}" for label in self.labels], max_tokens)
        ids, mask = (x.to(self.network.device) for x in pad_rows(rows, padding_id(tokenizer)))
        return normalize(self.network.owlv2.get_text_features(ids, mask.long()).pooler_output, dim=-1)


def corners(boxes: Tensor, height: int, width: int) -> Tensor:
    """(P, 4) x0, y0, x1, y1 in pixels, inside the image, from centres and sizes relative to its padded square."""
    centre, half = boxes[:, :2], boxes[:, 2:] / 2
    pixels = torch.cat([centre - half, centre + half], -1) * max(height, width)
    return torch.minimum(pixels.clamp(min=0), pixels.new_tensor([width, height, width, height]))


def non_maximum_suppression(boxes: Tensor, labels: Tensor, overlap: float) -> Tensor:
    """Indices of the boxes (P, 4), by descending score, that no better box of their class overlaps by more."""
    covered = (iou(boxes) > overlap) & (labels[:, None] == labels)
    indices: list[int] = []
    for i in range(len(boxes)):
        if not covered[i, indices].any():
            indices.append(i)
    return torch.tensor(indices, dtype=torch.long, device=boxes.device)


def iou(boxes: Tensor) -> Tensor:
    """(P, P) intersection over union of every pair of boxes (P, 4); 0 where both are empty."""
    low = torch.maximum(boxes[:, None, :2], boxes[:, :2])
    high = torch.minimum(boxes[:, None, 2:], boxes[:, 2:])
    intersection, area = (high - low).clamp(min=0).prod(-1), (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    return intersection / (area[:, None] + area - intersection).clamp(min=1e-9)
