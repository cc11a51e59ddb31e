"""Exact score of the embedded world: an image holds what its prompt asks for and nothing else."""

from collections.abc import Sequence
from typing import final

from torch import Tensor

from sana_lab.config.ranges import Count, Seed
from sana_lab.config.specs import SpecError
from sana_lab.evaluation import Measure, Report
from sana_lab.evaluation.geneval import prompts, rule
from sana_lab.evaluation.geneval.verdicts import Verdicts
from sana_lab.shapes import debris
from sana_lab.shapes.detector import SIDE, Analysis, ShapesDetector, analyse
from sana_lab.types import Json


@final
class ExactShapes(Measure):
    """Exact score `exact`: the mean of the tasks' shares of exact images `exact_<task>`; GenEval's rows and tasks.

    An image is exact if it satisfies GenEval's rule, holds no further object, and has at most 12 pixels of debris (at
    64 px; the smallest object has 73) that neither its objects nor the background explain. Columns are called
    `exact_partial...` where rows or images are missing.
    """

    rows: Sequence[Json]

    def __init__(
        self,
        prompts_per_task: Count = 44,  # rows per task
        images_per_prompt: Count = 4,  # images per row
        seed: Seed = 43,  # of the rows
        fill_tasks: bool = False,  # repeat the rows of tasks that have fewer of them, to as many images
    ) -> None:
        self.detector, self.images_per_prompt = ShapesDetector(), images_per_prompt
        benchmark = prompts.generated(lambda n: self.detector.prompts(n, seed), prompts_per_task, fill_tasks)
        self.rows = benchmark.repeated
        self.verdicts = Verdicts(benchmark, images_per_prompt)

    def add(self, images: Tensor, rows: Sequence[Json]) -> None:
        self.collect(self.extract(images, rows), rows)

    def extract(self, images: Tensor, rows: Sequence[Json]) -> list[tuple[bool, str]]:
        pairs = zip(images, rows, strict=True)
        return [judge(analyse(image), self.verdicts.match(row)[1]) for image, row in pairs]

    def check_prompts(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            self.verdicts.row_of(prompt, self.detector.labels)

    def score_images(self, images: Tensor, prompts: Sequence[str]) -> list[float]:
        """1 for an exact image, else 0; of all prompts in GenEval's forms."""
        rows = [self.verdicts.row_of(prompt, self.detector.labels) for prompt in prompts]
        return [float(judge(analyse(image), row)[0]) for image, row in zip(images, rows, strict=True)]

    def collect(self, extracted: list[tuple[bool, str]], rows: Sequence[Json]) -> None:
        for verdict, row in zip(extracted, rows, strict=True):
            self.verdicts.add(self.verdicts.match(row)[0], *verdict)

    def outcomes(self) -> list[Json]:
        """For each row with images, in order: {"tag", "prompt", "correct", "reasons"}, one entry per image."""
        return self.verdicts.outcomes()

    def details(self) -> Json:
        return {"exact": self.verdicts.details()}

    def check_rows(self, rows: Sequence[Json]) -> None:
        if any("include" not in row for row in rows):
            raise SpecError("exact_shapes needs images in GenEval's layout, with metadata.jsonl beside each prompt's")
        for row in rows:
            self.verdicts.match(row)

    def report(self) -> Report:
        coverage = self.verdicts.coverage
        settings = {
            "title": "Exact (shapes)",
            "detector": self.detector.identity(),
            "debris": {**debris.constants(), "side": SIDE},
        }
        return self.verdicts.report("exact" + "_partial" * coverage.partial, settings)


def judge(image: Analysis, row: Json) -> tuple[bool, str]:
    """Whether an image holds exactly what a row asks for, and why not."""
    _, missing = rule.judge_row(image.objects, row)
    reasons = [missing, _further(image, row), _debris(image)]
    return not any(reasons), "; ".join(reason for reason in reasons if reason)


def _further(image: Analysis, row: Json) -> str:
    """The objects beyond those that a row asks for, as a reason."""
    counts = {need["class"]: need["count"] for need in row["include"]}
    further = []
    for thing in image.objects:
        counts[thing.label] = counts.get(thing.label, 0) - 1
        further += [f"{thing.color} {thing.label}"] if counts[thing.label] < 0 else []
    return f"expected nothing else, found {', '.join(further)}" if further else ""


def _debris(image: Analysis) -> str:
    return f"expected at most {debris.LIMIT} px of debris, found {image.debris}" if image.debris > debris.LIMIT else ""
