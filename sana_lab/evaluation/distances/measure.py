"""The measure `distances`: FID, KID, CMMD, precision, recall ... of generated and real images in one pass.

`settings["intervals"]` names each column's 95 % interval: Fréchet distances over the generated images at this n, with
the reference fixed and the estimate's bias left in (`frechet`); kernel discrepancies over both samples (`mmd`);
precision and density over the generated images, recall and coverage over the real ones (`precision_recall`). Features
are kept in float32 where a metric or an interval needs them; `settings` says how many MiB.
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
from sana_lab.config.ranges import BatchSize, Seed
from sana_lab.config.specs import RUNTIME, Spec, SpecError
from sana_lab.evaluation import Extractor, Measure, Report
from sana_lab.evaluation.distances import frechet, mmd, precision_recall
from sana_lab.evaluation.distances.inception_score import inception_score
from sana_lab.evaluation.distances.reference import FeatureSet, Reference, digests, load
from sana_lab.evaluation.distances.shared_pairs import SharedPairs
from sana_lab.evaluation.extractors.inception import Inception
from sana_lab.evaluation.extractors.resize import check
from sana_lab.intervals import Estimate, jackknife, normal, wilson
from sana_lab.types import Json

MetricName = Literal[
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

MAX_LEAVE_ONE_OUT = 400
"""Largest number of images (if at most the number of features) for the exact jackknife; the infinitesimal one above."""
CMMD_SCALE = 1000.0


class Extracted(NamedTuple):
    """What the distances need of some images."""

    hashes: list[bytes]
    features: Tensor  # (B, D)
    logits: Tensor | None  # (B, classes), for the Inception Score


class Result(NamedTuple):
    """Value of one metric."""

    estimate: Estimate
    interval: str  # method of the interval
    influences: Tensor | None = None  # (n,) of mean 0, of the generated images


@dataclass(frozen=True)
class Comparison:
    """Generated and real images, with intermediate results that several metrics share."""

    fake: FeatureSet
    real: Reference
    logits: Tensor | None
    seed: int
    interval: Interval
    metrics: tuple[MetricName, ...]
    device: torch.device

    @cached_property
    def pairs(self) -> SharedPairs:
        """Of all metrics that look at pairs of the same features."""
        fake, real = self.fake.features, self.real_features
        return SharedPairs(fake, real, self.metrics, same=self.same, device=self.device)

    def cmmd(self, *, biased: bool) -> mmd.Discrepancy:
        """Of the features at length 1."""
        return mmd.from_sums(*self._cmmd_sums, biased=biased)

    @cached_property
    def _cmmd_sums(self) -> tuple[mmd.KernelSums, tuple[mmd.KernelSums, mmd.KernelSums] | None]:
        fake, real = F.normalize(self.fake.features), F.normalize(self.real_features)
        return mmd.kernel_sums(fake, real, mmd.gaussian, same=self.same, device=self.device)

    @cached_property
    def influences(self) -> Tensor:
        """Of the Fréchet distance."""
        return (frechet.leave_one_out if self.leaves_one_out else frechet.influence)(
            self.fake.features, self.real.gaussian
        )

    @property
    def singular(self) -> bool:
        """Whether there are no more images than features."""
        return self.fake.n <= self.fake.features.shape[1]

    @property
    def leaves_one_out(self) -> bool:
        return self.singular and self.fake.n <= MAX_LEAVE_ONE_OUT

    @property
    def jackknife_name(self) -> str:
        return "jackknife, each left out," if self.leaves_one_out else "infinitesimal jackknife"

    def frechet(self) -> float:
        """Fréchet distance by the moments."""
        return frechet.frechet(self.fake.moments.gaussian(), self.real.gaussian)

    @cached_property
    def same(self) -> bool:
        """Whether both sides are the same images, which have the distance 0."""
        return self.fake.sha256() == self.real.record["images_sha256"]

    @property
    def real_features(self) -> Tensor:
        assert self.real.features is not None
        return self.real.features


class Metric(NamedTuple):
    """Definition and requirements of a metric."""

    compute: Callable[[Comparison], Result]
    min_images: int  # on either side
    needs_fake_features: bool = True
    needs_real_features: bool = False


def _fid(c: Comparison) -> Result:
    if c.interval == "none":
        return Result(Estimate(c.frechet(), None, None, c.fake.n), "none")
    value = frechet.low_rank(c.fake.features, c.real.gaussian) if c.singular else c.frechet()
    if c.interval == "bootstrap":
        estimate = frechet.bootstrap(c.fake.features, c.real.gaussian, seed=c.seed)._replace(value=value)
        return Result(estimate, "bootstrap of 200 draws, images measured, reference held", c.influences)
    method = f"{c.jackknife_name}, images measured, reference held"
    return Result(jackknife(value, c.influences), method, c.influences)


def _fid_infinity(c: Comparison) -> Result:
    value, influences = frechet.infinity(c.fake.features, c.real.gaussian, c.influences, seed=c.seed)
    method = f"{c.jackknife_name} through the line, images measured, reference held"
    return Result(jackknife(value, influences), method, influences)


def _kid(c: Comparison) -> Result:
    return _discrepancy(c.pairs.kid(), c.fake.n)


def _cmmd(c: Comparison) -> Result:
    return _discrepancy(c.cmmd(biased=False).scaled(CMMD_SCALE), c.fake.n)


def _cmmd_biased(c: Comparison) -> Result:
    return _discrepancy(c.cmmd(biased=True).scaled(CMMD_SCALE), c.fake.n)


def _discrepancy(d: mmd.Discrepancy, n: int) -> Result:
    return Result(normal(d.value, d.error, n), "variance of the U-statistic, both samples", d.influences)


def _inception_score(c: Comparison) -> Result:
    assert c.logits is not None
    value, influences = inception_score(c.logits, seed=c.seed)
    return Result(jackknife(value, influences), "infinitesimal jackknife, images measured", influences)


def _precision(c: Comparison) -> Result:
    outcomes = precision_recall.share_inside(c.pairs.around_real[3])
    return Result(wilson(outcomes), "Wilson, images measured, balls held", outcomes - outcomes.mean())


def _recall(c: Comparison) -> Result:
    return Result(wilson(precision_recall.share_inside(c.pairs.around_fake[3])), "Wilson, real images, balls held")


def _density(c: Comparison) -> Result:
    outcomes = precision_recall.density_of(c.pairs.around_real[5], 5)
    influences = outcomes - outcomes.mean()
    return Result(jackknife(float(outcomes.mean()), influences), "normal, images measured, balls held", influences)


def _coverage(c: Comparison) -> Result:
    return Result(
        wilson(precision_recall.share_reached(c.pairs.around_real[5])), "Wilson, real images, images measured held"
    )


METRICS: dict[MetricName, Metric] = {
    "fid": Metric(_fid, 2, needs_fake_features=False),
    "fid_infinity": Metric(_fid_infinity, frechet.MIN_IMAGES_INFINITY),
    "kid": Metric(_kid, mmd.MIN_IMAGES, needs_real_features=True),
    "cmmd": Metric(_cmmd, mmd.MIN_IMAGES, needs_real_features=True),
    "cmmd_biased": Metric(_cmmd_biased, mmd.MIN_IMAGES, needs_real_features=True),
    "inception_score": Metric(_inception_score, 20, needs_fake_features=False),
    "precision": Metric(_precision, 4, needs_real_features=True),
    "recall": Metric(_recall, 4, needs_real_features=True),
    "density": Metric(_density, 6, needs_real_features=True),
    "coverage": Metric(_coverage, 6, needs_real_features=True),
}


def column_of(metric: str, extractor: str) -> str:
    """Name of the column of a metric in the features of an extractor."""
    standard = "clip" if metric.startswith("cmmd") else "inception"
    general = {"fid": "fd", "fid_infinity": "fd_infinity", "kid": "kd"}
    return metric if extractor == standard else f"{general.get(metric, metric)}_{extractor}"


@final
class Distances(Measure):
    """Distances of generated images from real ones in an extractor's features; all `metrics` share one pass.

    Columns of Inception have the papers' names (`fid`, `kid`); those of another extractor, or of another of Inception's
    layers, name it (`fd_dinov2`, `kd_clip`); CMMD is CLIP's. SpecError for metrics that the extractor or the reference
    cannot give; ValueError for too few images.
    """

    scores_images = False

    own_prompts = False
    needs_captions = False

    def __init__(
        self,
        extractor: Annotated[Spec, "extractor"],  # feature extractor, such as inception, dinov2 or clip
        # any of fid, fid_infinity, kid, cmmd, cmmd_biased, inception_score, precision, recall, density, coverage
        metrics: tuple[MetricName, ...] = ("fid",),
        reference: str | None = None,  # file of statistics by `sana-lab stats`; None: the held-out real images
        interval: Interval = "jackknife",  # method of `fid`'s interval; with none, no features are kept
        batch: Annotated[BatchSize, RUNTIME] = 64,  # images at a time
        seed: Seed = 0,  # of bootstrap, of FID-infinity's subsets and of the Inception Score's splits
    ) -> None:
        if batch < 1 or seed < 0:
            raise SpecError(f"distances has batch {batch} and seed {seed}; expected at least 1 and at least 0")
        self.extractor: Extractor = specs.build("extractor", extractor)
        self.metrics, self.interval, self.batch, self.seed = tuple(metrics), interval, batch, seed
        self._check_metrics()
        chosen = [METRICS[metric] for metric in self.metrics]
        self.needs_logits = "inception_score" in metrics
        self.fake = FeatureSet(any(m.needs_fake_features for m in chosen) or ("fid" in metrics and interval != "none"))
        self.real = self._load(reference) if reference else FeatureSet(any(m.needs_real_features for m in chosen))
        self.needs_reference = reference is None and any(m != "inception_score" for m in self.metrics)
        self.device = torch.device("cpu")  # of the extractor's features
        self._logits: list[Tensor] = []

    def refer(self, images: Tensor) -> None:
        self.collect_reference(self.extract_reference(images))

    def extract_reference(self, images: Tensor) -> list[Extracted]:
        if not isinstance(self.real, FeatureSet):
            raise ValueError("the reference is a file of statistics; it takes no more images")
        check(images, "real images")
        parts = images.split(self.batch)
        return [self._extracted(part, self.extractor.features(part)) for part in parts]

    def collect_reference(self, extracted: list[Extracted]) -> None:
        assert isinstance(self.real, FeatureSet)
        for part in extracted:
            self.real.add_features(part.hashes, part.features)

    def add(self, images: Tensor, rows: Sequence[Json]) -> None:
        self.collect(self.extract(images, rows), rows)

    def extract(self, images: Tensor, rows: Sequence[Json]) -> list[Extracted]:
        check(images)
        return [self._extract(part) for part in images.split(self.batch)]

    def collect(self, extracted: list[Extracted], rows: Sequence[Json]) -> None:
        for part in extracted:
            self.fake.add_features(part.hashes, part.features)
            self._logits += [] if part.logits is None else [part.logits]

    def report(self) -> Report:
        self._check_counts()
        comparison = Comparison(
            self.fake, self._reference(), self._all_logits(), self.seed, self.interval, self.metrics, self.device
        )
        results = {self.column(metric): METRICS[metric].compute(comparison) for metric in self.metrics}
        per_image = {
            column: (r.estimate.value + r.influences).tolist()
            for column, r in results.items()
            if r.influences is not None
        }
        values = {column: r.estimate for column, r in results.items()}
        return Report(values, self._settings(comparison.real, results), per_image)

    def column(self, metric: str) -> str:
        """Name of a metric's column."""
        identity = self.extractor.identity()
        name = identity["extractor"]
        if name == "inception" and identity["layer"] != "2048":
            name = f"inception_{identity['layer']}"
        return column_of(metric, name)

    def _extract(self, images: Tensor) -> Extracted:
        if not self.needs_logits:
            return self._extracted(images, self.extractor.features(images))
        assert isinstance(self.extractor, Inception)
        outputs = self.extractor.features_and_logits(images)
        return self._extracted(images, outputs.features)._replace(logits=outputs.logits.cpu())

    def _extracted(self, images: Tensor, features: Tensor) -> Extracted:
        self.device = features.device
        return Extracted(digests(images), features.cpu(), None)

    def _check_metrics(self) -> None:
        if unknown := [m for m in self.metrics if m not in METRICS]:
            raise SpecError(f"no metric of distances is called {unknown[0]!r}; {specs.nearest(unknown[0], METRICS)}")
        if not self.metrics:
            raise SpecError(f"distances has no metrics; {specs.nearest('', METRICS)}")
        if "inception_score" in self.metrics and not isinstance(self.extractor, Inception):
            name = self.extractor.identity()["extractor"]
            raise SpecError(f"inception_score needs classes, and extractor {name!r} gives none; expected 'inception'")

    def _load(self, file: str) -> Reference:
        reference = load(Path(file), self.extractor)
        metrics = [m for m in self.metrics if METRICS[m].needs_real_features]
        if metrics and reference.features is None:
            raise SpecError(
                f"{', '.join(metrics)} need the features of real images, and {file!r} holds their moments alone; "
                "make it again with --features, or omit `reference`"
            )
        return reference

    def _check_counts(self) -> None:
        """ValueError for too few images on either side."""
        for name in self.metrics:
            metric = METRICS[name]
            if self.fake.n < metric.min_images:
                raise ValueError(f"{name} needs at least {metric.min_images} images; given {self.fake.n}")
            minimum = metric.min_images if metric.needs_real_features else 2
            if name != "inception_score" and self._real_count() < minimum:
                raise ValueError(f"{name} needs at least {minimum} real images; given {self._real_count()}")

    def _real_count(self) -> int:
        return self.real.n if isinstance(self.real, FeatureSet) else self.real.record["n"]

    def _reference(self) -> Reference:
        if not isinstance(self.real, FeatureSet):
            return self.real
        if self.real.n:
            return self.real.reference(self.extractor.identity())
        return self.fake.reference(self.extractor.identity())  # unused: the Inception Score has no reference

    def _all_logits(self) -> Tensor | None:
        return torch.cat(self._logits) if self.needs_logits else None

    def _settings(self, real: Reference, results: dict[str, Result]) -> Json:
        reference = {"images_sha256": real.record["images_sha256"], "n": real.record["n"]}
        features = [s.features for s in (self.fake,) if s.keep] + ([] if real.features is None else [real.features])
        return {
            "extractor": self.extractor.identity(),
            "reference": reference if self._real_count() else None,
            "images": self.fake.n,
            "seed": self.seed,
            "intervals": {column: r.interval for column, r in results.items()},
            "features_mib": round(sum(x.nbytes for x in features) / 2**20, 3),
        }
