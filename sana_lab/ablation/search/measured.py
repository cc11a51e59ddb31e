"""Metrics that a trial has once it is trained and evaluated, by its configuration: a search can decide by them."""

from collections.abc import Iterable
from typing import Any

from sana_lab.ablation.checks import OF_TRAINING
from sana_lab.config import specs
from sana_lab.config.schema import Config
from sana_lab.report.columns import COLUMNS

FAMILIES = {
    "exact": "exact_shapes",
    "geneval": "geneval",
    "dpg": "dpg",
    "image_reward": "image_reward",
    "hps": "hps",
    "clip": "clip_score",
    "clip_shapes": "clip_shapes",
    "emoji": "emoji",
}
"""Beginning of the names of columns -> the measure that gives them; the longest beginning counts."""

ONE_DETECTOR = {"exact_shapes", "geneval"}
"""Measures of the embedded world that judge by the same detector."""


def judges(columns: Iterable[str]) -> set[str]:
    """The measures that judge images as columns do: those that give them, and those that read the same detector."""
    measures = {measure for name in columns if (measure := FAMILIES.get(_family(name)))}
    return measures | (ONE_DETECTOR if measures & ONE_DETECTOR else set())


def metrics_of(config: Config) -> list[str]:
    """Metrics of the training of an experiment and of its evaluation, costs left out: they come after a search."""
    options = config["eval"]
    generates = config["system"]["name"] != "autoencoder"
    return [
        *OF_TRAINING,
        *(_generated(config) if generates else []),
        *(_reconstructed(options) if options["reconstruct"] or not generates else []),
    ]


def _generated(config: Config) -> list[str]:
    """Columns of the measures of generated images."""
    from sana_lab.evaluation.evaluate import is_shapes, measure_specs

    resolved = [specs.resolve("measure", spec) for spec in measure_specs(config["eval"], is_shapes(config["data"]))]
    names = {spec["name"] for spec in resolved}
    columns = [column.name for column in COLUMNS if FAMILIES.get(_family(column.name)) in names]
    return columns + [name for spec in resolved if spec["name"] == "distances" for name in _distances(spec)]


def _family(column: str) -> str:
    return max((f for f in FAMILIES if column == f or column.startswith(f"{f}_")), key=len, default="")


def _distances(spec: dict[str, Any]) -> list[str]:
    from sana_lab.evaluation.distances.measure import column_of

    extractor = spec["extractor"]
    name = specs.name_of(extractor)
    if name == "inception" and (layer := extractor.get("layer", "2048")) != "2048":
        name = f"inception_{layer}"
    return [column_of(metric, name) for metric in spec["metrics"]]


def _reconstructed(options: Config) -> list[str]:
    """Metrics of an autoencoder's reconstructions."""
    given = {"psnr": True, "ssim": True, "lpips": options["lpips_weights"], "rfid": options["rfid"]}
    return [name for name, is_measured in given.items() if is_measured]
