"""Distances between what a model draws and real images: one pass through an extractor, many numbers.

Conventions of the 95 % intervals, told in `settings["intervals"]` column by column: for Fréchet distances over the
images measured at this n, the reference held and the estimate's bias left in (`frechet`); for kernel discrepancies over
both samples (`kernel`); for precision and density over the images measured, for recall and coverage over the real ones
(`neighbours`). Features are kept in float32 where a metric or an interval asks for them, and `settings` says how much.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_lab.config import specs
from sana_lab.config.specs import RUNTIME, Spec, SpecError
from sana_lab.evaluation import Extractor, Measure, Report, Value
from sana_lab.evaluation.distances import frechet, kernel, neighbours
from sana_lab.evaluation.distances.inception_score import inception_score
from sana_lab.evaluation.distances.reference import Reference, Sample, load
from sana_lab.evaluation.extractors.inception import Inception
from sana_lab.evaluation.extractors.resize import check
from sana_lab.intervals import jackknife, wilson
from sana_lab.types import Json

Metric = Literal[
    "fid",
    "fid_infinity",
    "kid",
    "cmmd",
    "cmmd_biased",
    "inception_score",
    "precision",
    "recall",
    "density",
    "coverage",
]

Interval = Literal["jackknife", "bootstrap", "none"]

LEFT_OUT = 400
"""Up to so many images, no more than features, each is left out in turn; beyond, the jackknife is infinitesimal."""
CMMD_SCALE = 1000.0


class Found(NamedTuple):
    """One metric."""

    value: Value
    interval: str  # how it was made
    influences: Tensor | None = None  # (n,) about 0, of the images measured


@dataclass(frozen=True)
class Comparison:
    """Images measured beside the real ones, with what several metrics share."""

    fake: Sample
    real: Reference
    logits: Tensor | None
    seed: int
    interval: Interval

    @cached_property
    def influences(self) -> Tensor:
        """Of the Fréchet distance."""
        return (frechet.left_out if self.few else frechet.influence)(self.fake.features, self.real.gaussian)

    @property
    def singular(self) -> bool:
        """Fewer images than features."""
        return self.fake.n <= self.fake.features.shape[1]

    @property
    def few(self) -> bool:
        return self.singular and self.fake.n <= LEFT_OUT

    def distance(self) -> float:
        """Fréchet's, by the moments."""
        return frechet.frechet(self.fake.moments.gaussian(), self.real.gaussian)

    @property
    def real_features(self) -> Tensor:
        assert self.real.features is not None
        return self.real.features


class Kind(NamedTuple):
    """What a metric needs, and how it is computed."""

    compute: Callable[[Comparison], Found]
    least: int  # images on a side
    keeps: bool = True  # features of the images measured
    pairs: bool = False  # and those of the real ones


def _fid(c: Comparison) -> Found:
    if c.interval == "none":
        return Found(Value(c.distance(), None, None, c.fake.n), "none")
    value = frechet.low_rank(c.fake.features, c.real.gaussian) if c.singular else c.distance()
    if c.interval == "bootstrap":
        _, low, high, n = frechet.bootstrap(c.fake.features, c.real.gaussian, seed=c.seed)
        return Found(
            Value(value, low, high, n), "bootstrap of 200 draws, images measured, reference held", c.influences
        )
    how = f"{_jackknife(c)}, images measured, reference held"
    return Found(Value(*jackknife(value, c.influences)), how, c.influences)


def _fid_infinity(c: Comparison) -> Found:
    value, influences = frechet.infinity(c.fake.features, c.real.gaussian, c.influences, seed=c.seed)
    how = f"{_jackknife(c)} through the line, images measured, reference held"
    return Found(Value(*jackknife(value, influences)), how, influences)


def _jackknife(c: Comparison) -> str:
    return "jackknife, each left out," if c.few else "infinitesimal jackknife"


def _kid(c: Comparison) -> Found:
    return _discrepancy(kernel.discrepancy(c.fake.features, c.real_features, kernel.polynomial), c.fake.n)


def _cmmd(c: Comparison, biased: bool = False) -> Found:
    fake, real = F.normalize(c.fake.features), F.normalize(c.real_features)
    found = kernel.discrepancy(fake, real, kernel.gaussian, biased=biased)
    return _discrepancy(found.scaled(CMMD_SCALE), c.fake.n)


def _cmmd_biased(c: Comparison) -> Found:
    return _cmmd(c, biased=True)


def _discrepancy(found: kernel.Discrepancy, n: int) -> Found:
    half = 1.959964 * found.error
    value = Value(found.value, found.value - half, found.value + half, n)
    return Found(value, "variance of the U-statistic, both samples", found.influences)


def _inception_score(c: Comparison) -> Found:
    assert c.logits is not None
    value, influences = inception_score(c.logits, seed=c.seed)
    return Found(Value(*jackknife(value, influences)), "infinitesimal jackknife, images measured", influences)


def _precision(c: Comparison) -> Found:
    outcomes = neighbours.precision(c.fake.features, c.real_features)
    return Found(Value(*wilson(outcomes)), "Wilson, images measured, balls held", outcomes - outcomes.mean())


def _recall(c: Comparison) -> Found:
    outcomes = neighbours.precision(c.real_features, c.fake.features)
    return Found(Value(*wilson(outcomes)), "Wilson, real images, balls held")


def _density(c: Comparison) -> Found:
    outcomes = neighbours.density(c.fake.features, c.real_features)
    away = outcomes - outcomes.mean()
    value = Value(*jackknife(float(outcomes.mean()), away))
    return Found(value, "normal, images measured, balls held", away)


def _coverage(c: Comparison) -> Found:
    outcomes = neighbours.coverage(c.fake.features, c.real_features)
    return Found(Value(*wilson(outcomes)), "Wilson, real images, images measured held")


KINDS: dict[Metric, Kind] = {
    "fid": Kind(_fid, 2, keeps=False),
    "fid_infinity": Kind(_fid_infinity, frechet.LEAST_FOR_INFINITY),
    "kid": Kind(_kid, kernel.LEAST, pairs=True),
    "cmmd": Kind(_cmmd, kernel.LEAST, pairs=True),
    "cmmd_biased": Kind(_cmmd_biased, kernel.LEAST, pairs=True),
    "inception_score": Kind(_inception_score, 20, keeps=False),
    "precision": Kind(_precision, 4, pairs=True),
    "recall": Kind(_recall, 4, pairs=True),
    "density": Kind(_density, 6, pairs=True),
    "coverage": Kind(_coverage, 6, pairs=True),
}


@final
class Distances(Measure):
    """How far images lie from real ones, in an extractor's features; every metric of one `extractor` in one pass.

    `reference` is a file of statistics (`reference`); null compares with held-out images. Inception's columns have the
    papers' names (`fid`, `kid`); another extractor's say which it is (`fd_dinov2`, `kd_clip`), and so do those of
    another of Inception's layers; CMMD is CLIP's. `interval` is that of `fid`; with none it keeps no features.
    SpecError for metrics that the extractor or the reference cannot give; ValueError in `report` for too few images.
    """

    def __init__(
        self,
        extractor: Annotated[Spec, "extractor"],
        metrics: tuple[Metric, ...] = ("fid",),
        reference: str | None = None,
        interval: Interval = "jackknife",
        batch: Annotated[int, RUNTIME] = 64,
        seed: int = 0,
    ) -> None:
        self.extractor: Extractor = specs.build("extractor", extractor)
        self.metrics, self.interval, self.batch, self.seed = tuple(metrics), interval, batch, seed
        self.classified = "inception_score" in metrics
        self._check_metrics()
        kinds = [KINDS[metric] for metric in self.metrics]
        self.fake = Sample(any(k.keeps for k in kinds) or ("fid" in metrics and interval != "none"))
        self.real = self._loaded(reference) if reference else Sample(any(k.pairs for k in kinds))
        self.needs_reference = reference is None and any(m != "inception_score" for m in self.metrics)
        self._logits: list[Tensor] = []

    def refer(self, images: Tensor) -> None:
        if not isinstance(self.real, Sample):
            raise ValueError("the reference is a file of statistics; it takes no more images")
        check(images, "real images")
        for part in images.split(self.batch):
            self.real.add(part, self.extractor.features(part))

    def add(self, images: Tensor, rows: Sequence[Json]) -> None:
        check(images)
        for part in images.split(self.batch):
            self.fake.add(part, self._features(part))

    def report(self) -> Report:
        self._check_counts()
        compared = Comparison(self.fake, self._reference(), self._all_logits(), self.seed, self.interval)
        found = {self.column(metric): KINDS[metric].compute(compared) for metric in self.metrics}
        values = {name: f.value for name, f in found.items()}
        moved = {k: (f.value.value + f.influences).tolist() for k, f in found.items() if f.influences is not None}
        return Report(values, self._settings(compared.real, found), moved)

    def column(self, metric: Metric) -> str:
        """Its name in a table."""
        known = self.extractor.identity()
        name = known["extractor"]
        if name == "inception" and known["layer"] != "2048":
            name = f"inception_{known['layer']}"
        home = "clip" if metric.startswith("cmmd") else "inception"
        general = {"fid": "fd", "fid_infinity": "fd_infinity", "kid": "kd"}
        return metric if name == home else f"{general.get(metric, metric)}_{name}"

    def _features(self, images: Tensor) -> Tensor:
        if not self.classified:
            return self.extractor.features(images)
        assert isinstance(self.extractor, Inception)
        seen = self.extractor.features_and_logits(images)
        self._logits.append(seen.logits.cpu())
        return seen.features

    def _check_metrics(self) -> None:
        if unknown := [m for m in self.metrics if m not in KINDS]:
            raise SpecError(f"no metric of distances is called {unknown[0]!r}; {specs.nearest(unknown[0], KINDS)}")
        if not self.metrics:
            raise SpecError(f"distances has no metrics; {specs.nearest('', KINDS)}")
        if self.classified and not isinstance(self.extractor, Inception):
            name = self.extractor.identity()["extractor"]
            raise SpecError(f"inception_score needs classes, and extractor {name!r} gives none; expected 'inception'")

    def _loaded(self, file: str) -> Reference:
        found = load(Path(file), self.extractor)
        pairs = [m for m in self.metrics if KINDS[m].pairs]
        if pairs and found.features is None:
            raise SpecError(
                f"{', '.join(pairs)} need the features of real images, and {file!r} holds their moments alone; "
                "make it again with features, or leave reference away"
            )
        return found

    def _check_counts(self) -> None:
        for metric in self.metrics:
            least = KINDS[metric].least
            real = least if metric == "inception_score" else self._real_count()
            for side, n in (("", self.fake.n), ("real ", real)):
                least_here = least if KINDS[metric].pairs or not side else 2
                if n < least_here:
                    raise ValueError(f"{metric} needs at least {least_here} {side}images; given {n}")

    def _real_count(self) -> int:
        return self.real.n if isinstance(self.real, Sample) else self.real.record["n"]

    def _reference(self) -> Reference:
        if not isinstance(self.real, Sample):
            return self.real
        if self.real.n:
            return self.real.reference(self.extractor.identity())
        return self.fake.reference(self.extractor.identity())  # of which the Inception Score makes no use

    def _all_logits(self) -> Tensor | None:
        return torch.cat(self._logits) if self.classified else None

    def _settings(self, real: Reference, found: dict[str, Found]) -> Json:
        compared = {"images_sha256": real.record["images_sha256"], "n": real.record["n"]}
        kept = [s.features for s in (self.fake,) if s.keep] + ([] if real.features is None else [real.features])
        return {
            "extractor": self.extractor.identity(),
            "reference": compared if self._real_count() else None,
            "images": self.fake.n,
            "seed": self.seed,
            "intervals": {name: f.interval for name, f in found.items()},
            "features_mib": round(sum(x.nbytes for x in kept) / 2**20, 3),
        }
