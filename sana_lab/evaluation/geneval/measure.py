"""GenEval as a measure: the rows of the embedded world or COCO's 553, a detector, colours, intervals, per prompt."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, final

import numpy as np
from torch import Tensor

from sana_lab.config import specs
from sana_lab.config.specs import RUNTIME, Spec, SpecError, nearest
from sana_lab.evaluation import Measure, Report, Value
from sana_lab.evaluation.geneval import rule
from sana_lab.evaluation.geneval.color import ColorNamer
from sana_lab.evaluation.geneval.detectors import Detector
from sana_lab.evaluation.per_prompt import Roster, clustered_mean
from sana_lab.intervals import wilson
from sana_lab.shapes.scenes import SHAPES
from sana_lab.types import Json

_FACTS = ("tag", "include", "exclude")


@final
class GenEval(Measure):
    """`geneval`, the mean of the tasks `geneval_<task>`, and the shares of correct images and prompts.

    `prompts` is a file of GenEval rows (a path, or a name in `eval/prompts`). Without it the detector says whose: the
    embedded world's, drawn by `prompts_per_task` and `seed`, for a detector of its shapes, else GenEval's own 553.
    `clip` is the folder of the CLIP that names colours for a detector that sees none (GenEval: OpenAI's ViT-L/14), and
    `device` is where that CLIP is.

    Where rows or images are missing all columns are called `geneval_partial...`. A counting row that comes without its
    `exclude` is refused, or with `allow_missing_exclude` judged as "at least", under `geneval_no_exclude...`.
    """

    rows: Sequence[Json]

    def __init__(
        self,
        detector: Annotated[Spec, "detector"] = "shapes",
        clip: str | None = None,
        prompts: str | None = None,
        prompts_per_task: int = 44,
        images_per_prompt: int = 4,
        seed: int = 43,
        allow_missing_exclude: bool = False,
        device: Annotated[str, RUNTIME] = "auto",
    ) -> None:
        self.detector: Detector = specs.build("detector", detector)
        self.rows = _rows(prompts, self.detector, prompts_per_task, seed)
        self.images_per_prompt, self.allow_missing_exclude = images_per_prompt, allow_missing_exclude
        _check(self.rows, self.detector, clip)
        self.colors = None if clip is None else ColorNamer(clip, device)
        self.roster = Roster(self.rows, images_per_prompt)
        self.verdicts: list[tuple[int, bool, str]] = []  # of each image: its row, whether right, why not
        self.without_exclude: set[int] = set()

    def add(self, images: Tensor, rows: Sequence[Json]) -> None:
        namer = self.colors.name if self.colors else None
        for image, row in zip(images, rows, strict=True):
            i, judged = self.match(row)
            self.verdicts.append((i, *rule.verdict(image, judged, self.detector, namer)))
            self.roster.came[i] += 1
            self.without_exclude |= {i} if rule.lacks_exclude(judged) else set()

    def match(self, row: Json) -> tuple[int, Json]:
        """Which of its rows a given one is, and what its images are judged by. ValueError where they differ."""
        i = self.roster.position_of(row)
        known = self.rows[i]
        if "include" not in row or all(row.get(key) == known.get(key) for key in _FACTS):
            return i, known
        if not rule.lacks_exclude(row) or any(row.get(key) != known.get(key) for key in ("tag", "include")):
            raise ValueError(f"the row of {row['prompt']!r} asks for another thing than {known!r}; given {row!r}")
        if not self.allow_missing_exclude:
            raise ValueError(
                f"the counting row of {row['prompt']!r} lacks its 'exclude', so four would pass for three (a known "
                "bug of SANA's script); give whole metadata, or say allow_missing_exclude and get another column"
            )
        return i, row

    def outcomes(self) -> list[Json]:
        """For each row with images, in order: {"tag", "prompt", "correct", "reasons"}, one entry for each image."""
        groups: list[list[tuple[bool, str]]] = [[] for _ in self.rows]
        for i, right, reason in self.verdicts:
            groups[i].append((right, reason))
        return [rule.outcome(row, group) for row, group in zip(self.rows, groups, strict=True) if group]

    def report(self) -> Report:
        found = rule.summarise(self.outcomes())
        name = self._column()
        values = {name: _value(found["overall"], found)}
        values |= {f"{name}_{task}": _value(part["value"], part) for task, part in found["tasks"].items()}
        right = [float(right) for _, right, _ in self.verdicts]
        values[f"{name}_correct_images"] = clustered_mean(right, [i for i, _, _ in self.verdicts])
        anything = [float(any(one["correct"])) for one in self.outcomes()]
        values[f"{name}_correct_prompts"] = Value(*wilson(anything))
        tasks = [self.rows[i]["tag"] for i, _, _ in self.verdicts]
        per_image = {name: influences(right, tasks), f"{name}_correct_images": right}
        return Report(values, self._settings(), per_image)

    def _column(self) -> str:
        return "geneval" + "_partial" * self.roster.partial + "_no_exclude" * bool(self.without_exclude)

    def _settings(self) -> Json:
        return {
            "title": f"GenEval ({self.detector.title})",
            "rows_sha256": rows_sha256(self.rows),
            **self.roster.settings(),
            "detector": self.detector.identity(),
            "colors": self.colors.identity() if self.colors else "the detector's",
            "rows_without_exclude": len(self.without_exclude),
            "interval": "95 % bootstrap over prompts within tasks",
        }


def _value(value: float, summary: Json) -> Value:
    low, high = summary["interval"]
    return Value(value, low, high, summary["prompts"])


def influences(values: Sequence[float], tasks: Sequence[str]) -> list[float]:
    """One number for each image: their mean is the mean of the tasks' means, their spread what it depends on."""
    x, sizes = np.asarray(values, np.float64), Counter(tasks)
    means = {task: float(np.mean([v for v, t in zip(values, tasks, strict=True) if t == task])) for task in sizes}
    overall = float(np.mean(list(means.values())))
    weights = np.array([len(x) / (len(sizes) * sizes[task]) for task in tasks])
    return (overall + weights * (x - np.array([means[task] for task in tasks]))).tolist()


def rows_sha256(rows: Sequence[Json]) -> str:
    """Of the rows as a .jsonl file."""
    return hashlib.sha256("".join(json.dumps(row) + "\n" for row in rows).encode()).hexdigest()


def _rows(prompts: str | None, detector: Detector, per_task: int, seed: int) -> list[Json]:
    if prompts is None and tuple(detector.labels) == SHAPES:
        return rule.prompts(per_task, seed=seed)
    return rule.read_rows(rule.find_prompts(prompts or "geneval.jsonl"))


def _check(rows: Sequence[Json], detector: Detector, clip: str | None) -> None:
    """SpecError where the detector could never find what the rows ask for."""
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
            else f"the detector {detector.title} sees no colours; give the folder of a CLIP as `clip`"
        )
