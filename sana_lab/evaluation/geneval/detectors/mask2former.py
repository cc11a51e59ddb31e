"""Mask2Former (arXiv 2112.01527) as a detector, scored by mmdet's rule at full resolution.

Legend: Q queries, C classes (the last of C + 1 is no object), K kept, H, W of the picture.
"""

from collections.abc import Sequence
from typing import Annotated, Literal, final

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import Mask2FormerForUniversalSegmentation

from sana_lab.config.specs import RUNTIME
from sana_lab.environment import place
from sana_lab.evaluation import transformers_models
from sana_lab.evaluation.geneval.detectors import Detector
from sana_lab.types import Json, Object

RENAMED = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}
"""How GenEval calls COCO's classes: its three own names, then the spellings of older files."""

MMDET = {"shortest_edge": 800, "longest_edge": 1333}


@final
class Mask2Former(Detector):
    """Objects of a Mask2Former for instances, from a transformers folder.

    GenEval's own detector is mmdet's swin-s; facebook/mask2former-swin-small-coco-instance is the same network with
    other weights, so scores are alike and not equal: tables call them GenEval (HF M2F). `size` is how pictures are
    scaled for it: as the `folder` says, or as `mmdet` does, the shorter side to 800 pixels. The thresholds are
    GenEval's; for these weights nobody has calibrated them.
    """

    title = "HF M2F"

    def __init__(
        self,
        model: str,
        threshold: float = 0.3,
        counting_threshold: float = 0.9,
        size: Literal["folder", "mmdet"] = "folder",
        device: Annotated[str, RUNTIME] = "auto",
    ) -> None:
        self.network = transformers_models.load(Mask2FormerForUniversalSegmentation, model, "mask2former").to(
            place(device)
        )
        self.processor = transformers_models.load_processor(model)
        self.threshold, self.counting_threshold, self.size = threshold, counting_threshold, size
        names = self.network.config.id2label
        self.labels = [RENAMED.get(names[i], names[i]) for i in range(len(names))]
        self.weights_sha256 = transformers_models.weights_sha256(model)

    @torch.no_grad()
    def detect(self, image: Tensor) -> list[Object]:
        options = {"size": MMDET} if self.size == "mmdet" else {}
        pixels = transformers_models.prepared(self.processor, [image], **options).to(self.network.device)
        found = self.network(pixels)
        masks, scores, labels = instances(
            found.class_queries_logits[0],
            found.masks_queries_logits[0],
            (pixels.shape[-2:], image.shape[-2:]),
            min(self.threshold, self.counting_threshold),
        )
        return [
            Object(self.labels[k], box(mask), float(score), None, mask)
            for mask, score, k in zip(masks, scores, labels.tolist(), strict=True)
        ]

    def identity(self) -> Json:
        return {
            "detector": "mask2former",
            "weights_sha256": self.weights_sha256,
            "preprocessing": transformers_models.preprocessing(self.processor)
            | ({"size": MMDET} if self.size == "mmdet" else {}),
            "thresholds": [self.threshold, self.counting_threshold],
            "dtype": "float32",
        }


def instances(
    classes: Tensor, masks: Tensor, sizes: Sequence[Sequence[int]], least: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Masks (K, H, W) bool, scores (K,) and labels (K,) of what scores above `least`, the surest first.

    From logits of classes (Q, C + 1) and masks (Q, h, w): the Q best of all pairs of query and class, each scored by
    its probability times the mean probability inside its mask; a query may be kept as two classes. Mask logits go
    bilinearly to the network's input and then to the picture: `sizes`, (height, width) each.
    """
    chances = classes.softmax(-1)[:, :-1].flatten()
    chances, best = chances.topk(len(classes))
    chances, best = chances[chances > least], best[chances > least]  # the mean probability is at most 1
    inside = _enlarged(masks[best // (classes.shape[1] - 1)], sizes)
    held = inside > 0
    sure = (inside.sigmoid() * held).flatten(1).sum(1) / held.flatten(1).sum(1).clamp(min=1)
    scores = chances * sure
    order = scores.argsort(descending=True, stable=True)
    order = order[scores[order] > least]
    return held[order], scores[order], (best % (classes.shape[1] - 1))[order]


def _enlarged(masks: Tensor, sizes: Sequence[Sequence[int]]) -> Tensor:
    for size in sizes:
        masks = interpolate(masks[:, None], tuple(size), mode="bilinear", align_corners=False)[:, 0]
    return masks


def box(mask: Tensor) -> tuple[float, float, float, float]:
    """x0, y0, x1, y1 around a mask (H, W) that is not empty, in pixels."""
    ys, xs = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    return float(xs[0]), float(ys[0]), float(xs[-1] + 1), float(ys[-1] + 1)
