"""Distances between two folders of pictures, without an experiment: the verb `fid`, and a function for Python."""

from collections.abc import Sequence
from pathlib import Path

from sana_lab.config import experiments, schema
from sana_lab.config.specs import Spec, SpecError, build, check
from sana_lab.config.yaml_text import read_value
from sana_lab.evaluation import image_folder
from sana_lab.evaluation.distances.measure import Distances
from sana_lab.evaluation.image_files import Skipped
from sana_lab.intervals import Estimate


def distances(
    generated: Path | str,
    real: Path | str,
    *,
    extractor: Spec,
    metrics: Sequence[str] = ("fid",),
    batch: int = 64,
) -> dict[str, Estimate]:
    """Distances of the pictures in one folder from those in another, or from a file of `sana-lab stats`.

    Pictures are read at their own sizes, as PNG, JPEG, WebP and so on, also in deeper folders; captions are not needed.
    `extractor` is a spec such as `{"name": "inception", "weights": FILE}`, `metrics` are those of the measure
    `distances`. Each number has its 95 % interval over the generated pictures and their number. ValueError for a folder
    without pictures or with too few.
    """
    folder, reference = Path(generated), Path(real)
    for path in (folder, *([] if reference.is_file() else [reference])):
        if not path.is_dir():
            raise SpecError(f"there is no folder {str(path)!r}; expected a folder of pictures")
    spec = {"name": "distances", "extractor": extractor, "metrics": list(metrics), "batch": batch}
    spec |= {"reference": str(reference)} if reference.is_file() else {}
    measure: Distances = build("measure", experiments.resolve("measure", spec))
    given = {} if reference.is_file() else {"captions": str(reference)}
    options = check({**given, "held_out": MOST, "batch": batch}, schema.EvaluationOptions, "eval")
    skipped = Skipped(folder)
    report = image_folder.measure_folder(folder, {"distances": measure}, options, skipped).reports["distances"]
    return dict(report.values)


MOST = 10_000_000
"""Pictures of a folder that are read: all of them."""


def main(generated: Path, real: Path, extractor: str | None, weights: Path | None, metrics: Sequence[str]) -> None:
    """`sana-lab fid A B`: print each distance with its interval. SpecError without an extractor."""
    if (extractor is None) == (weights is None):
        raise SpecError(
            "expected either --weights FILE, torch-fidelity's weights-inception-2015-12-05-6726825d.pth, or "
            "--extractor SPEC, such as '{name: dinov2, model: FOLDER}'"
        )
    spec = {"name": "inception", "weights": str(weights)} if extractor is None else _plain(extractor)
    for name, estimate in distances(generated, real, extractor=spec, metrics=metrics).items():
        print(f"{name:<24}{estimate.value:.4f}{_interval(estimate)}  n {estimate.n}")


def _plain(text: str) -> Spec:
    value = read_value(text)
    return value if isinstance(value, str | dict) else value.value if hasattr(value, "value") else str(value)


def _interval(estimate: Estimate) -> str:
    return "" if estimate.low is None else f"  [{estimate.low:.4f}, {estimate.high:.4f}]"
