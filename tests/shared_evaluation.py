"""An evaluation that two processes share, for `tests/evaluation/test_distributed.py`; importable by both."""

import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sana_lab.evaluation import Measure, Report
from sana_lab.evaluation.distances.measure import Distances
from sana_lab.evaluation.run_measures import Source, run
from sana_lab.intervals import bootstrap_mean
from sana_lab.types import Json

SIDE = 32
ROWS = [{"prompt": f"picture {i}"} for i in range(11)]


def paint(prompts: list[str], indices: list[int]) -> Tensor:
    """Pictures that depend on their noise index alone."""
    made = [torch.randint(0, 256, (3, SIDE, SIDE), generator=torch.Generator().manual_seed(i)) for i in indices]
    return torch.stack(made).to(torch.uint8)


def real() -> list[Tensor]:
    return [paint([], list(range(100 + i, 105 + i))) for i in range(0, 30, 5)]


class Exact(Measure):
    """Sums of pixels, extracted where the images are."""

    needs_captions = False

    def __init__(self) -> None:
        self.sums: list[int] = []

    def add(self, images: Tensor, rows: Sequence[Json]) -> None:
        self.collect(self.extract(images, rows), rows)

    def extract(self, images: Tensor, rows: Sequence[Json]) -> list[int]:
        return [int(image.sum()) for image in images]

    def collect(self, extracted: list[int], rows: Sequence[Json]) -> None:
        self.sums += extracted

    def report(self) -> Report:
        values = [float(x) for x in self.sums]
        return Report({"sum": bootstrap_mean(values)}, {}, {"sum": values})


class Guest(Measure):
    """A measure that knows nothing of processes: the mean pixel."""

    needs_captions = False

    def __init__(self) -> None:
        self.values: list[float] = []

    def add(self, images: Tensor, rows: Sequence[Json]) -> None:
        self.values += images.double().mean((1, 2, 3)).tolist()

    def report(self) -> Report:
        return Report({"mean": bootstrap_mean(self.values)}, {}, {"mean": self.values})


def measured(batch: int, guest: bool = True) -> tuple[dict[str, Report], int]:
    """Reports, and the number of images that this process extracted features of."""
    distances = Distances({"name": "function", "function": "features:means", "device": "cpu"}, ("fid", "kid"))
    features, seen = distances.extractor.features, []

    def counted(images: Tensor) -> Tensor:
        seen.append(len(images))
        return features(images)

    distances.extractor.features = counted  # type: ignore[method-assign]
    measures: dict[str, Measure] = {"a": distances, "exact": Exact()} | ({"guest": Guest()} if guest else {})
    return run(measures, Source(paint, ROWS, real), batch), sum(seen)


def process(rank: int, place: str) -> None:
    """One of two: batches of 2 leave the second one image less."""
    dist.init_process_group("gloo", init_method=f"file://{place}/meet", rank=rank, world_size=2)
    reports, extracted = measured(2)
    sent = _largest_message(lambda: measured(2, guest=False))
    content = {name: (r.values, dict(r.per_image)) for name, r in reports.items()}
    torch.save({"reports": content, "extracted": extracted, "sent": sent}, f"{place}/{rank}.pt")
    dist.destroy_process_group()


def _largest_message(work: Callable[[], object]) -> int:
    """Bytes of the largest object that this process sends to the others."""
    sizes, gather = [0], dist.all_gather_object

    def counted(parts: list[Any], own: object) -> None:
        sizes.append(len(pickle.dumps(own)))
        gather(parts, own)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_gather_object", counted)
        work()
    return max(sizes)
