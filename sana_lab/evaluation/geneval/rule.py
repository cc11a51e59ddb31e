"""GenEval's decision rule (arXiv 2310.11513): whether the objects detected in an image satisfy a row."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from torch import Tensor

from sana_lab.evaluation.geneval.detectors import Detector
from sana_lab.evaluation.geneval.vocabulary import POSITIONS
from sana_lab.types import Json, Object

ColorClassifier = Callable[[Tensor, Sequence[Object]], list[Object]]
"""(one image uint8 (3, H, W), some of its objects) -> the same objects with their colours"""

MAX_OBJECTS = 16  # per class, the most confident first


def verdict(image: Tensor, row: Json, detector: Detector, classify: ColorClassifier | None = None) -> tuple[bool, str]:
    """Whether one uint8 (3, H, W) image satisfies its row, and why not.

    `classify` is for detectors that do not name colours.
    """
    threshold = detector.threshold_for(row)
    objects = [thing for thing in detector.detect(image) if thing.score > threshold]
    return judge_row(objects if classify is None else _with_colors(image, objects, row, classify), row)


def judge_row(objects: Iterable[Object], row: Json) -> tuple[bool, str]:
    """Whether objects satisfy a row, and why not. Only the `count` most confident objects of a class matter."""
    by_class = _by_class(objects)
    groups: list[list[Object] | None] = []
    errors = []
    for need in row["include"]:
        group = by_class[need["class"]][: need["count"]]
        error = _need_error(group, need, groups)
        groups.append(None if error else group)
        errors.append(error)
    errors += [_count_error(len(by_class[limit["class"]]), limit) for limit in row.get("exclude", [])]
    reasons = [error for error in errors if error]
    return not reasons, "; ".join(reasons)


def relations(a: Object, b: Object) -> set[str]:
    """Position of a relative to b: none, one or two of POSITIONS. Boxes that nearly overlap have no relation."""
    pa, pb = np.reshape(a.box, (2, 2)), np.reshape(b.box, (2, 2))
    offset = pa.mean(0) - pb.mean(0)
    apart = np.maximum(np.abs(offset) - 0.1 * (np.ptp(pa, 0) + np.ptp(pb, 0)), 0) * np.sign(offset)
    if (np.abs(apart) < 1e-3).all():
        return set()
    dx, dy = apart / np.linalg.norm(offset)
    return {name for name, holds in zip(POSITIONS, (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5), strict=True) if holds}


def _by_class(objects: Iterable[Object]) -> defaultdict[str, list[Object]]:
    groups: defaultdict[str, list[Object]] = defaultdict(list)
    for thing in sorted(objects, key=lambda o: -o.score):
        groups[thing.label] += [thing] if len(groups[thing.label]) < MAX_OBJECTS else []
    return groups


def _need_error(group: list[Object], need: Json, groups: list[list[Object] | None]) -> str | None:
    name, count = need["class"], need["count"]
    if len(group) < count:
        return f"expected {count} {name}, found {len(group)}"
    right = sum(thing.color == need.get("color") for thing in group)
    if "color" in need and right < count:
        return f"expected {count} {need['color']} {name}, found {', '.join(str(thing.color) for thing in group)}"
    return _position_error(group, need, groups) if "position" in need else None


def _position_error(group: list[Object], need: Json, groups: list[list[Object] | None]) -> str | None:
    where, target = need["position"]
    others = groups[target]
    if others is None:
        return f"no target for {need['class']} to be {where}"
    for thing in group:
        for other in others:
            actual = relations(thing, other)
            if where not in actual:
                names = " and ".join(sorted(actual)) or "neither"
                return f"expected {thing.label} {where} {other.label}, found {names}"
    return None


def _count_error(n: int, limit: Json) -> str | None:
    return f"expected fewer than {limit['count']} {limit['class']}, found {n}" if n >= limit["count"] else None


def _with_colors(image: Tensor, objects: list[Object], row: Json, classify: ColorClassifier) -> list[Object]:
    """Objects, with colours if the row names one: as many per class as the rule compares."""
    counts = [(need["class"], need["count"]) for need in row["include"] if "color" in need]
    colored = []
    for label, group in _by_class(objects).items():
        n = max((count for name, count in counts if name == label), default=0)
        colored += [*classify(image, group[:n]), *group[n:]]
    return colored
