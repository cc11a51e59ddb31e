"""Contracts of measures, extractors, detectors and question answerers: uint8 images in, numbers out."""

import json
import math
from typing import Any

import torch
from torch import Tensor

from sana_lab.contracts import Rule, Subject, expect, expect_close, expect_shape
from sana_lab.types import Json

SIZE = 64
"""Pixels a side of the images."""


def _images(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)


def _plain(value: Any, what: str) -> None:
    try:
        same = json.loads(json.dumps(value)) == value
    except (TypeError, ValueError) as error:
        expect(False, f"{what} is no plain data: {error}")
    else:
        expect(same, f"{what} is no plain data: JSON reads it back as something else (tuples, keys that are no text?)")


# measures


def _rows(measure: Any, count: int) -> list[Json]:
    rows = [{"prompt": f"a red circle {i}"} for i in range(count)] if measure.rows is None else list(measure.rows)
    return [rows[i * len(rows) // count] for i in range(count)] if len(rows) >= count else (rows * count)[:count]


def _report(subject: Subject, sizes: tuple[int, ...], count: int = 24) -> Any:
    measure, images = subject.make(), _images(count)
    rows = _rows(measure, count)
    if measure.needs_reference:
        measure.refer(_images(count, seed=1))
    for part, some in zip(images.split(sizes), _chunks(rows, sizes), strict=True):
        measure.add(part, some)
    return measure.report()


def _chunks(rows: list[Json], sizes: tuple[int, ...]) -> list[list[Json]]:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [rows[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def prompts(subject: Subject) -> None:
    """Its rows are mappings with a prompt, or None for captions of held-out data."""
    rows = subject.make().rows
    expect(rows is None or all(isinstance(row.get("prompt"), str) for row in rows), "a row has no text 'prompt'")


def estimates(subject: Subject) -> None:
    """Its report holds numbers, each inside its interval."""
    report = _report(subject, (12, 12))
    expect(hasattr(report, "values") and bool(report.values), "its report has no values; expected evaluation.Report")
    for name, estimate in report.values.items():
        expect(hasattr(estimate, "low"), f"{name} is {estimate!r}, expected an intervals.Estimate")
        expect(math.isfinite(estimate.value), f"{name} is {estimate.value}")
        inside = estimate.low is None or estimate.low - 1e-9 <= estimate.value <= estimate.high + 1e-9
        expect(inside, f"{name} {estimate.value:g} lies outside its interval [{estimate.low}, {estimate.high}]")
    _plain(report.settings, "`settings` of its report")


def per_image(subject: Subject) -> None:
    """Numbers per image are one for each image."""
    for name, numbers in _report(subject, (12, 12)).per_image.items():
        expect(len(numbers) == 24, f"per_image[{name!r}] has {len(numbers)} numbers for 24 images")


def batches(subject: Subject) -> None:
    """The size of the batches changes nothing."""
    whole, parts = _report(subject, (24,)), _report(subject, (5, 19))
    for name, estimate in whole.values.items():
        other = parts.values[name].value
        same = math.isclose(estimate.value, other, rel_tol=1e-4, abs_tol=1e-6)
        expect(same, f"{name} is {estimate.value:g} in one batch and {other:g} in two")


def nothing(subject: Subject) -> None:
    """Without images its report is a ValueError with a reason."""
    try:
        subject.make().report()
    except ValueError:
        return
    except Exception as error:
        expect(False, f"its report on no images raises {type(error).__name__}: {error}; expected a ValueError")
    expect(False, "its report on no images is no error; expected a ValueError")


MEASURE: tuple[Rule, ...] = (prompts, estimates, per_image, batches, nothing)


# extractors


def extractor_shape(subject: Subject) -> None:
    """Images of any size give features (B, dim) in float32, without gradient."""
    extractor = subject.make()
    expect(isinstance(getattr(extractor, "dim", None), int), "it sets no attribute `dim`, expected a number")
    for size in (SIZE, 48):
        features = extractor.features(_images(4)[..., :size, :size])
        expect_shape(features, (4, extractor.dim), f"the features of {size} x {size} images")
        expect(features.dtype == torch.float32, f"the features are {features.dtype}, expected torch.float32")
        expect(not features.requires_grad, "the features carry a gradient")


def extractor_rows(subject: Subject) -> None:
    """The features of an image do not depend on the others of its batch."""
    extractor, images = subject.make(), _images(4)
    alone = extractor.features(images[1:2])
    expect_close(extractor.features(images)[1:2], alone, "an image alone and in a batch differ")


def extractor_sees(subject: Subject) -> None:
    """Different images have different features."""
    features = subject.make().features(_images(2))
    expect(not torch.equal(features[0], features[1]), "two different images have the same features")


def identity(subject: Subject) -> None:
    """`identity` is plain data, and the same for two instances."""
    one, other = subject.make().identity(), subject.make().identity()
    _plain(one, "`identity`")
    expect(one == other, "`identity` of two equal instances differs")


EXTRACTOR: tuple[Rule, ...] = (extractor_shape, extractor_rows, extractor_sees, identity)


# detectors and question answerers


def detects(subject: Subject) -> None:
    """Objects of an image are sana_lab.types.Object, of classes that it lists."""
    detector = subject.make()
    for thing in detector.detect(_images(1)[0]):
        expect(thing.label in detector.labels, f"it detects {thing.label!r}, which is not in `labels`")
        expect(len(thing.box) == 4, f"a box is {thing.box}, expected (x0, y0, x1, y1)")


def answers(subject: Subject) -> None:
    """Each question has an answer, True or False."""
    given = subject.make().answer(_images(1)[0], ["is there a circle?", "is it red?"])
    expect(len(given) == 2 and all(isinstance(a, bool) for a in given), f"it answers {given!r}, expected [bool, bool]")


DETECTOR: tuple[Rule, ...] = (detects, identity)
VQA: tuple[Rule, ...] = (answers, identity)
