"""Verdicts on images of GenEval's rows, and the scores under a measure's name."""

from collections.abc import Sequence

from sana_lab.evaluation import Report
from sana_lab.evaluation.geneval import summary
from sana_lab.evaluation.geneval.prompts import Benchmark, lacks_exclude, row_of, rows_sha256
from sana_lab.evaluation.per_prompt import Coverage
from sana_lab.intervals import Estimate, clustered_share, wilson
from sana_lab.types import Json


class Verdicts:
    """Right or wrong, with a reason, for each image of a benchmark's rows."""

    def __init__(self, benchmark: Benchmark, images_per_prompt: int) -> None:
        """ValueError for two rows with one prompt."""
        self.rows, self.exhausted = benchmark.rows, benchmark.exhausted
        self.coverage = Coverage(self.rows, images_per_prompt, times=benchmark.times)
        self.items: list[tuple[int, bool, str]] = []  # per image: row index, correct, reason

    def match(self, row: Json, allow_missing_exclude: bool = False) -> tuple[int, Json]:
        """Index of a row and the row used to evaluate its images. ValueError if the two differ."""
        i = self.coverage.index_of(row)
        own = self.rows[i]
        if "include" not in row or all(row.get(key) == own.get(key) for key in ("tag", "include", "exclude")):
            return i, own
        if not lacks_exclude(row) or any(row.get(key) != own.get(key) for key in ("tag", "include")):
            raise ValueError(f"the row of {row['prompt']!r} asks for another thing than {own!r}; given {row!r}")
        if not allow_missing_exclude:
            raise ValueError(
                f"the counting row of {row['prompt']!r} lacks its 'exclude', so four would pass for three (a known "
                "bug of SANA's script); give whole metadata, or set allow_missing_exclude for a column of its own"
            )
        return i, row

    def row_of(self, prompt: str, classes: Sequence[str]) -> Json:
        """The benchmark's row with this prompt, or another row about these classes. SpecError if there is none."""
        i = self.coverage.indices.get(prompt)
        return row_of(prompt, classes) if i is None else self.rows[i]

    def add(self, index: int, correct: bool, reason: str) -> None:
        """Append the verdict on one image of row `index`."""
        self.items.append((index, correct, reason))
        self.coverage.count(index)

    def outcomes(self) -> list[Json]:
        """For each row with images, in order: {"tag", "prompt", "correct", "reasons"}, one entry per image."""
        groups: list[list[tuple[bool, str]]] = [[] for _ in self.rows]
        for i, correct, reason in self.items:
            groups[i].append((correct, reason))
        return [summary.outcome(row, group) for row, group in zip(self.rows, groups, strict=True) if group]

    def details(self) -> Json:
        """The whole summary, with the outcomes of each row."""
        outcomes = self.outcomes()
        extra = {"images_per_prompt": self.coverage.images_per_prompt, "outcomes": outcomes}
        return {**self._summary(outcomes), **extra}

    def report(self, name: str, settings: Json) -> Report:
        """`name`: the mean of the tasks' means; `name_<task>`; also correct images and prompts. ValueError without
        images."""
        outcomes = self.outcomes()
        scores = self._summary(outcomes)
        correct = [float(correct) for _, correct, _ in self.items]
        values = {name: _estimate(scores["overall"], scores)}
        values |= {f"{name}_{task}": _estimate(part["value"], part) for task, part in scores["tasks"].items()}
        values[f"{name}_correct_images"] = clustered_share(correct, [i for i, _, _ in self.items])
        values[f"{name}_correct_prompts"] = wilson([float(any(each["correct"])) for each in outcomes])
        tasks = [self.rows[i]["tag"] for i, _, _ in self.items]
        per_image = {name: summary.influences(correct, tasks), f"{name}_correct_images": correct}
        per_image |= {f"{name}_{task}": summary.influences(correct, tasks, task) for task in scores["tasks"]}
        return Report(values, self._settings() | settings, per_image)

    def _summary(self, outcomes: Sequence[Json]) -> Json:
        return summary.summarise(outcomes, exhausted=self.exhausted)

    def _settings(self) -> Json:
        over_images = f"; over images in {', '.join(sorted(self.exhausted))}, all prompts" if self.exhausted else ""
        return {
            "rows_sha256": rows_sha256(self.rows),
            **self.coverage.settings(),
            "interval": f"95 % bootstrap over prompts within tasks{over_images}",
        }


def _estimate(value: float, scores: Json) -> Estimate:
    low, high = scores["interval"]
    return Estimate(value, low, high, scores["prompts"])
