"""Measures at a point of a training: those of the experiment's suite, on fewer images."""

import sys
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from torch import Tensor

from sana_lab.config.schema import Config
from sana_lab.config.specs import SpecError
from sana_lab.evaluation import Measure, Report, run_measures, sources
from sana_lab.evaluation.evaluate import Evaluator, build_measures, is_shapes, prompts_hash, reconstruction_options
from sana_lab.evaluation.run_measures import Pass, Source
from sana_lab.systems import Sample, System
from sana_lab.types import Json


class Evaluation:
    """`sana_lab.training.points.PointEvaluation` by the measures of `eval:`."""

    def check(self, system: System, experiment: Config) -> None:
        """Build all measures and look for their prompts. SpecError or ValueError for what is missing."""
        if not system.evaluates:
            raise SpecError(f"eval.at and eval.every need an evaluation, and {type(system).__name__} has none")
        if system.flow is None:
            reconstruction_options(experiment["eval"])
        else:
            measures = build_measures(experiment["eval"], shapes=is_shapes(experiment["data"]))
            run_measures.group(measures, sources.system_source(_no_sample, experiment))

    def measure(self, system: System, experiment: Config) -> Json:
        """The measures on `eval.at_images` images as {"values", "per_image"}, columns without `_partial`.

        A measure that needs more images is left out.
        """
        return point_of(system.evaluate_in_training(PointEvaluator(system, experiment)))


def _no_sample(*_: object, **__: object) -> Tensor:
    raise AssertionError("no images are generated before the first step")


class PointEvaluator(Evaluator):
    """`sana_lab.systems.Evaluator` of a system in training, on fewer images, of the first seed of noise."""

    def __init__(self, system: System, experiment: Config) -> None:
        options, images = {**experiment["eval"], "noise_seeds": 1}, experiment["eval"]["at_images"]
        self.system, self.experiment, self.may_be_empty = system, {**experiment, "eval": options}, False
        fewer = {key: min(options[key], images) for key in ("reconstructions", "held_out")}
        self.options = {**options, **fewer, "worst": 0, "worst_picture": None}
        self.images, self.device = images, system.device

    def generated(self, sample: Sample) -> Json:
        """All measures of as many images of each set of prompts, each of them an image of the whole evaluation."""
        options = self.experiment["eval"]
        measures = build_measures(options, shapes=is_shapes(self.experiment["data"]))
        source = sources.system_source(sample, self.experiment)
        passes = run_measures.show(measures, source, options["batch"], self.images)
        reports = {name: r for name, measure in measures.items() if (r := _report(name, measure)) is not None}
        return {"measures": self._values(reports), "per_image": self._per_image(reports, measures, passes, source)}

    def _values(self, reports: Mapping[str, Report]) -> Json:
        return {
            name: {"values": {column: estimate._asdict() for column, estimate in report.values.items()}}
            for name, report in reports.items()
        }

    def _per_image(
        self, reports: Mapping[str, Report], measures: dict[str, Measure], passes: Sequence[Pass], source: Source
    ) -> Json:
        own = {name: each for each in passes for name in each.names}
        return {
            column: {
                "values": list(values),
                "clusters": [own[name].row(i) for i in own[name].noise_indices(self.images)],
                "drawn": prompts_hash(measures[name], source.captions, [self.options["seed"]]),
            }
            for name, report in reports.items()
            for column, values in report.per_image.items()
        }


def point_of(report: Json) -> Json:
    """The values and the numbers per image of an evaluation's report, by column. ValueError without values.

    At a point every benchmark is partial, so its columns have their names.
    """
    values = {k: v for measure in report.get("measures", {}).values() for k, v in measure["values"].items()}
    per_image: Json = {k: _clustered(v) for k, v in report.get("per_image", {}).items()}
    if r := report.get("reconstruction"):
        names = [name for name in ("psnr", "ssim", "lpips", "rfid") if name in r]
        values |= {k: dict(zip(("value", "low", "high", "n"), _estimate(r, k), strict=True)) for k in names}
        same = {"clusters": list(range(r["n"])), "drawn": None}
        per_image |= {k: {"values": v, **same} for k, v in r["per_image"].items()}
    if not values:
        raise ValueError("eval.at measures points, and the evaluation of this system has no values")
    return {"values": _whole_names(values), "per_image": _whole_names(per_image)}


def _estimate(report: Json, name: str) -> tuple[Any, ...]:
    return report[name], *report[f"{name}_interval"], report["n"]


def _clustered(column: Json) -> Json:
    """Numbers per image with the cluster of each, also of a report that has none."""
    each = column.get("images_per_prompt", 1)
    return {"clusters": [i // each for i in range(len(column["values"]))], **column}


def _whole_names(columns: Mapping[str, Any]) -> Json:
    return {name.replace("_partial", ""): value for name, value in columns.items()}


def _report(name: str, measure: Measure) -> Report | None:
    """A measure's report; None, said once, for one that needs more images than a point has."""
    try:
        return measure.report()
    except ValueError as error:
        _say(f"sana-lab: {name} is measured at no point: {error}")
        return None


@cache
def _say(text: str) -> None:
    print(text, file=sys.stderr)
