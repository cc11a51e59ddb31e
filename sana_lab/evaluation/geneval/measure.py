"""GenEval as a measure: prompts, a detector, colours, verdicts per image, intervals over prompts."""

from collections.abc import Sequence
from typing import Annotated, final

from torch import Tensor

from sana_lab.config import specs
from sana_lab.config.ranges import Count, Seed
from sana_lab.config.specs import RUNTIME, Spec, SpecError, nearest
from sana_lab.evaluation import Measure, Report
from sana_lab.evaluation.geneval import rule
from sana_lab.evaluation.geneval.color import ClipColors
from sana_lab.evaluation.geneval.detectors import Detector
from sana_lab.evaluation.geneval.prompts import Benchmark, find_prompts, generated, lacks_exclude, read_rows
from sana_lab.evaluation.geneval.verdicts import Verdicts
from sana_lab.types import Json


@final
class GenEval(Measure):
    """GenEval score `geneval`: the mean of the tasks' accuracies `geneval_<task>`; also correct images and prompts.

    Columns are called `geneval_partial...` where rows or images are missing. A counting row without its `exclude` is
    refused, or with `allow_missing_exclude` judged as "at least" under `geneval_no_exclude...`.
    """

    rows: Sequence[Json]
    own_prompts = True

    def __init__(
        self,
        detector: Annotated[Spec, "detector"] = "shapes",  # object detector
        clip: str | None = None,  # folder of the CLIP that names colours (GenEval: OpenAI's ViT-L/14), if needed
        # file of GenEval rows, a path or a name in eval/prompts; None: the detector's own rows, else GenEval's 553
        prompts: str | None = None,
        prompts_per_task: Count = 44,  # rows per task if the detector generates them
        images_per_prompt: Count = 4,  # images per row
        seed: Seed = 43,  # of generated rows
        fill_tasks: bool = False,  # repeat generated rows of tasks that have fewer of them, to as many images
        allow_missing_exclude: bool = False,  # accept counting rows without an upper limit, under another column
        device: Annotated[str, RUNTIME] = "auto",  # of that CLIP
    ) -> None:
        self.detector: Detector = specs.build("detector", detector)
        benchmark = _benchmark(prompts, self.detector, prompts_per_task, seed, fill_tasks)
        self.rows = benchmark.repeated
        self.images_per_prompt, self.allow_missing_exclude = images_per_prompt, allow_missing_exclude
        _check(self.rows, self.detector, clip)
        self.colors = None if clip is None else ClipColors(clip, device)
        self.verdicts = Verdicts(benchmark, images_per_prompt)
        self.without_exclude: set[int] = set()

    def add(self, images: Tensor, rows: Sequence[Json]) -> None:
        self.collect(self.extract(images, rows), rows)

    def extract(self, images: Tensor, rows: Sequence[Json]) -> list[tuple[bool, str]]:
        classify = self.colors.classify if self.colors else None
        pairs = zip(images, rows, strict=True)
        return [rule.verdict(image, self.match(row)[1], self.detector, classify) for image, row in pairs]

    def check_prompts(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            self.verdicts.row_of(prompt, self.detector.labels)

    def score_images(self, images: Tensor, prompts: Sequence[str]) -> list[float]:
        """1 for an image that satisfies its row, else 0; the rows of all prompts that the detector has words for."""
        classify = self.colors.classify if self.colors else None
        rows = [self.verdicts.row_of(prompt, self.detector.labels) for prompt in prompts]
        pairs = zip(images, rows, strict=True)
        return [float(rule.verdict(image, row, self.detector, classify)[0]) for image, row in pairs]

    def collect(self, extracted: list[tuple[bool, str]], rows: Sequence[Json]) -> None:
        for verdict, row in zip(extracted, rows, strict=True):
            i, own_row = self.match(row)
            self.verdicts.add(i, *verdict)
            self.without_exclude |= {i} if lacks_exclude(own_row) else set()

    def match(self, row: Json) -> tuple[int, Json]:
        """Index of a row and the row used to evaluate its images. ValueError if the two differ."""
        return self.verdicts.match(row, self.allow_missing_exclude)

    def outcomes(self) -> list[Json]:
        """For each row with images, in order: {"tag", "prompt", "correct", "reasons"}, one entry per image."""
        return self.verdicts.outcomes()

    def details(self) -> Json:
        return {"geneval": self.verdicts.details()}

    def check_rows(self, rows: Sequence[Json]) -> None:
        if any("include" not in row for row in rows):
            raise SpecError("geneval needs images in GenEval's layout: 00000/metadata.jsonl and 00000/samples/0000.png")
        for row in rows:
            self.match(row)

    def report(self) -> Report:
        return self.verdicts.report(self._column(), self._settings())

    def _column(self) -> str:
        return "geneval" + "_partial" * self.verdicts.coverage.partial + "_no_exclude" * bool(self.without_exclude)

    def _settings(self) -> Json:
        return {
            "title": f"GenEval ({self.detector.title})",
            "detector": self.detector.identity(),
            "colors": self.colors.identity() if self.colors else "the detector's",
            "rows_without_exclude": len(self.without_exclude),
        }


def _benchmark(path: str | None, detector: Detector, per_task: int, seed: int, fill: bool) -> Benchmark:
    if path is None and detector.prompts(per_task, seed) is not None:
        return generated(lambda n: detector.prompts(n, seed) or [], per_task, fill)
    rows = read_rows(find_prompts(path or "geneval.jsonl"))
    return Benchmark(rows, [1] * len(rows))


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
