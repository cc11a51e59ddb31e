"""Mask2Former (arXiv 2112.01527) as a detector, scored by mmdet's rule at full resolution.

Legend: Q queries, C classes (the last of C + 1 is no object), K detections, H, W of the image.
"""

from collections.abc import Sequence
from typing import Annotated, Literal, final

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import Mask2FormerForUniversalSegmentation

from sana_lab.config.ranges import Share
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
"""COCO's class names -> GenEval's: its three own names, then the spellings of older files."""

MMDET = {"shortest_edge": 800, "longest_edge": 1333}


@final
class Mask2Former(Detector):
    """Mask2Former for instance segmentation.

    GenEval's own detector is mmdet's swin-s; facebook/mask2former-swin-small-coco-instance is the same network with
    other weights, so scores are similar but not equal: tables call them GenEval (HF M2F). The default thresholds are
    GenEval's, not calibrated for these weights.
    """

    title = "HF M2F"

    def __init__(
        self,
        model: str,  # transformers folder, such as a copy of facebook/mask2former-swin-small-coco-instance
        threshold: Share = 0.3,  # score in [0, 1] that an object must exceed
        counting_threshold: Share = 0.9,  # the same for the task `counting`
        # scaling of images: as the folder says, or as mmdet does, the shorter side to 800 pixels
        size: Literal["folder", "mmdet"] = "folder",
        device: Annotated[str, RUNTIME] = "auto",  # auto, cpu, cuda, cuda:1 ...
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
        pixels = transformers_models.pixel_values(self.processor, [image], **options).to(self.network.device)
        outputs = self.network(pixels)
        masks, scores, labels = instances(
            outputs.class_queries_logits[0],
            outputs.masks_queries_logits[0],
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
    classes: Tensor, masks: Tensor, sizes: Sequence[Sequence[int]], threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Masks (K, H, W) bool, scores (K,) and labels (K,) of detections above a threshold, by descending score.

    From logits of classes (Q, C + 1) and masks (Q, h, w): the Q best of all pairs of query and class, each scored by
    its probability times the mean probability inside its mask; a query may give two classes. Mask logits are resized
    bilinearly to the network's input and then to the image: `sizes`, (height, width) each.
    """
    probabilities = classes.softmax(-1)[:, :-1].flatten()
    probabilities, best = probabilities.topk(len(classes))
    above = probabilities > threshold  # the mean probability inside a mask is at most 1
    probabilities, best = probabilities[above], best[above]
    logits = _resize(masks[best // (classes.shape[1] - 1)], sizes)
    inside = logits > 0
    mean = (logits.sigmoid() * inside).flatten(1).sum(1) / inside.flatten(1).sum(1).clamp(min=1)
    scores = probabilities * mean
    order = scores.argsort(descending=True, stable=True)
    order = order[scores[order] > threshold]
    return inside[order], scores[order], (best % (classes.shape[1] - 1))[order]


def _resize(masks: Tensor, sizes: Sequence[Sequence[int]]) -> Tensor:
    for size in sizes:
        masks = interpolate(masks[:, None], tuple(size), mode="bilinear", align_corners=False)[:, 0]
    return masks


def box(mask: Tensor) -> tuple[float, float, float, float]:
    """x0, y0, x1, y1 in pixels around a non-empty mask (H, W)."""
    ys, xs = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    return float(xs[0]), float(ys[0]), float(xs[-1] + 1), float(ys[-1] + 1)
