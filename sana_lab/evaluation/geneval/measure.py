"""GenEval as a measure: prompts, a detector, colours, verdicts per image, intervals over prompts."""

from collections.abc import Sequence
from typing import Annotated, final

from torch import Tensor

from sana_lab.config import specs
from sana_lab.config.ranges import Count, Seed
from sana_lab.config.specs import RUNTIME, Spec, SpecError, nearest
from sana_lab.evaluation import Measure, Report
from sana_lab.evaluation.geneval import rule, summary
from sana_lab.evaluation.geneval.color import ClipColors
from sana_lab.evaluation.geneval.detectors import Detector
from sana_lab.evaluation.geneval.prompts import find_prompts, lacks_exclude, read_rows, rows_sha256
from sana_lab.evaluation.per_prompt import Coverage
from sana_lab.intervals import Estimate, clustered_share, wilson
from sana_lab.types import Json


@final
class GenEval(Measure):
    """GenEval score `geneval`: the mean of the tasks' accuracies `geneval_<task>`; also correct images and prompts.

    Columns are called `geneval_partial...` where rows or images are missing. A counting row without its `exclude` is
    refused, or with `allow_missing_exclude` judged as "at least" under `geneval_no_exclude...`.
    """

    rows: Sequence[Json]

    def __init__(
        self,
        detector: Annotated[Spec, "detector"] = "shapes",  # object detector
        clip: str | None = None,  # folder of the CLIP that names colours (GenEval: OpenAI's ViT-L/14), if needed
        # file of GenEval rows, a path or a name in eval/prompts; None: the detector's own rows, else GenEval's 553
        prompts: str | None = None,
        prompts_per_task: Count = 44,  # rows per task if the detector generates them
        images_per_prompt: Count = 4,  # images per row
        seed: Seed = 43,  # of generated rows
        allow_missing_exclude: bool = False,  # accept counting rows without an upper limit, under another column
        device: Annotated[str, RUNTIME] = "auto",  # of that CLIP
    ) -> None:
        self.detector: Detector = specs.build("detector", detector)
        self.rows = _rows(prompts, self.detector, prompts_per_task, seed)
        self.images_per_prompt, self.allow_missing_exclude = images_per_prompt, allow_missing_exclude
        _check(self.rows, self.detector, clip)
        self.colors = None if clip is None else ClipColors(clip, device)
        self.coverage = Coverage(self.rows, images_per_prompt)
        self.verdicts: list[tuple[int, bool, str]] = []  # per image: row index, correct, reason
        self.without_exclude: set[int] = set()

    def add(self, images: Tensor, rows: Sequence[Json]) -> None:
        classify = self.colors.classify if self.colors else None
        for image, row in zip(images, rows, strict=True):
            i, own_row = self.match(row)
            self.verdicts.append((i, *rule.verdict(image, own_row, self.detector, classify)))
            self.coverage.count(i)
            self.without_exclude |= {i} if lacks_exclude(own_row) else set()

    def match(self, row: Json) -> tuple[int, Json]:
        """Index of a row and the row used to evaluate its images. ValueError if the two differ."""
        i = self.coverage.index_of(row)
        own = self.rows[i]
        if "include" not in row or all(row.get(key) == own.get(key) for key in ("tag", "include", "exclude")):
            return i, own
        if not lacks_exclude(row) or any(row.get(key) != own.get(key) for key in ("tag", "include")):
            raise ValueError(f"the row of {row['prompt']!r} asks for another thing than {own!r}; given {row!r}")
        if not self.allow_missing_exclude:
            raise ValueError(
                f"the counting row of {row['prompt']!r} lacks its 'exclude', so four would pass for three (a known "
                "bug of SANA's script); give whole metadata, or set allow_missing_exclude for a column of its own"
            )
        return i, row

    def outcomes(self) -> list[Json]:
        """For each row with images, in order: {"tag", "prompt", "correct", "reasons"}, one entry per image."""
        groups: list[list[tuple[bool, str]]] = [[] for _ in self.rows]
        for i, correct, reason in self.verdicts:
            groups[i].append((correct, reason))
        return [summary.outcome(row, group) for row, group in zip(self.rows, groups, strict=True) if group]

    def details(self) -> Json:
        outcomes = self.outcomes()
        extra = {"images_per_prompt": self.images_per_prompt, "outcomes": outcomes}
        return {"geneval": {**summary.summarise(outcomes), **extra}}

    def check_rows(self, rows: Sequence[Json]) -> None:
        if any("include" not in row for row in rows):
            raise SpecError("geneval needs images in GenEval's layout: 00000/metadata.jsonl and 00000/samples/0000.png")
        for row in rows:
            self.match(row)

    def report(self) -> Report:
        outcomes = self.outcomes()
        scores, name = summary.summarise(outcomes), self._column()
        correct = [float(correct) for _, correct, _ in self.verdicts]
        values = {name: _estimate(scores["overall"], scores)}
        values |= {f"{name}_{task}": _estimate(part["value"], part) for task, part in scores["tasks"].items()}
        values[f"{name}_correct_images"] = clustered_share(correct, [i for i, _, _ in self.verdicts])
        values[f"{name}_correct_prompts"] = wilson([float(any(each["correct"])) for each in outcomes])
        tasks = [self.rows[i]["tag"] for i, _, _ in self.verdicts]
        per_image = {name: summary.influences(correct, tasks), f"{name}_correct_images": correct}
        return Report(values, self._settings(), per_image)

    def _column(self) -> str:
        return "geneval" + "_partial" * self.coverage.partial + "_no_exclude" * bool(self.without_exclude)

    def _settings(self) -> Json:
        return {
            "title": f"GenEval ({self.detector.title})",
            "rows_sha256": rows_sha256(self.rows),
            **self.coverage.settings(),
            "detector": self.detector.identity(),
            "colors": self.colors.identity() if self.colors else "the detector's",
            "rows_without_exclude": len(self.without_exclude),
            "interval": "95 % bootstrap over prompts within tasks",
        }


def _estimate(value: float, scores: Json) -> Estimate:
    low, high = scores["interval"]
    return Estimate(value, low, high, scores["prompts"])


def _rows(path: str | None, detector: Detector, per_task: int, seed: int) -> list[Json]:
    own = detector.prompts(per_task, seed) if path is None else None
    return read_rows(find_prompts(path or "geneval.jsonl")) if own is None else own


def _check(rows: Sequence[Json], detector: Detector, clip: str | None) -> None:
    """SpecError for classes that the detector cannot name, a missing CLIP and a superfluous one."""
    needs = [need for row in rows for need in (*row["include"], *row.get("exclude", []))]
    unknown = sorted({need["class"] for need in needs} - set(detector.labels))
    if unknown:
        raise SpecError(
            f"the prompts ask for {len(unknown)} classes that the detector {detector.title} cannot name, such as "
            f"{unknown[0]!r}; {nearest(unknown[0], detector.labels)}"
        )
    if detector.names_colors == (clip is not None):
        raise SpecError(
            f"the detector {detector.title} names colours itself; expected no `clip`"
            if clip
            else f"the detector {detector.title} names no colours; give the folder of a CLIP as `clip`"
        )
