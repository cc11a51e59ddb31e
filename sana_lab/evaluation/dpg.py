"""DPG-Bench (Hu et al. 2024, arXiv 2403.05135): dense prompts, each with yes-or-no questions that depend on each other.

A proposition holds if its answer is yes and all propositions that it depends on hold. The score is the original
script's: the mean over questions, over images, over prompts. Differences, where the script is wrong: its category
scores use only the last image and ignore dependence, it drops the file's first question, and it skips images that
raise.
"""

import re
from collections.abc import Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Annotated, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from sana_lab.config import digests, specs, text_files
from sana_lab.config.ranges import Count
from sana_lab.config.specs import Spec, nearest
from sana_lab.data import tables
from sana_lab.data.image_formats import is_image
from sana_lab.data.images import UnreadableError, read
from sana_lab.evaluation import Measure, Report
from sana_lab.evaluation.per_prompt import Coverage
from sana_lab.evaluation.vqa import Vqa
from sana_lab.intervals import Estimate, clustered_share
from sana_lab.types import Json

COLUMNS = (
    *("item_id", "text", "proposition_id", "dependency", "category_broad", "category_detailed"),
    "question_natural_language",
)
"""Columns of dpg_bench.csv that are read."""


class Question(NamedTuple):
    """One proposition about an image."""

    text: str
    parents: tuple[int, ...]  # propositions it depends on
    broad: str  # entity, attribute, relation, global, other
    detailed: str  # color, shape, spatial ...


class Item(NamedTuple):
    """A prompt with its questions by proposition."""

    item_id: str
    prompt: str
    questions: dict[int, Question]
    order: tuple[int, ...]  # of propositions, parents first


def read_items(path: str | Path) -> list[Item]:
    """The prompts of a dpg_bench.csv. ValueError names the line, or the proposition with an unknown dependency."""
    lines = tables.rows(Path(path), COLUMNS)
    header = tuple(lines[0][1]) if lines else ()
    if lines and (missing := [name for name in COLUMNS if name not in header]):
        raise ValueError(f"{path} has no column {missing[0]!r}; {nearest(missing[0], header)}")
    _check_texts(path, lines)
    groups: dict[str, dict[int, Question]] = {}
    prompts: dict[str, str] = {}
    for number, line in lines:
        if line["item_id"] == "item_id":  # a repeated header
            continue
        name, proposition, question = _question(line, f"{path}, line {number}")
        prompts.setdefault(name, (line["text"] or "").strip())
        if proposition in groups.setdefault(name, {}):
            raise ValueError(f"{path}, line {number}: proposition {proposition} of {name!r} is there twice")
        groups[name][proposition] = question
    if not groups:
        raise ValueError(f"{path} holds no questions")
    return [Item(name, prompts[name], questions, _order(name, questions)) for name, questions in groups.items()]


def _check_texts(path: str | Path, lines: Sequence[tables.Row]) -> None:
    """ValueError for a field that holds the start of another row, as an unclosed quote makes it, or no Unicode."""
    names = {line["item_id"] for _, line in lines}
    for number, line in lines:
        text = "\n".join(map(str, line.values()))
        if not text_files.is_unicode(text):
            raise ValueError(f"{path}, line {number}: it holds half of a surrogate pair, which is not valid Unicode")
        inner = (part for value in line.values() for part in str(value).split("\n")[1:])
        if name := next((name for part in inner if (name := re.split(r"[,;\t|]", part)[0].strip('"')) in names), None):
            raise ValueError(f"{path}, line {number}: a field in quotes holds the row of {name!r}; close its quote")


def holds(item: Item, answers: Mapping[int, bool]) -> dict[int, bool]:
    """Whether each proposition holds: answered with yes, as are all its ancestors."""
    result: dict[int, bool] = {}
    for proposition in item.order:
        parents = item.questions[proposition].parents
        result[proposition] = answers[proposition] and all(result[parent] for parent in parents)
    return result


@final
class Dpg(Measure):
    """DPG-Bench score `dpg` and `dpg_<category>`, in percent; `dpg_partial...` where prompts or images are missing.

    Published numbers are of 1,065 prompts, four images each, and of mPLUG-large, whose answers another `vqa` does not
    reproduce.
    """

    scores_images = False

    rows: Sequence[Json]
    own_prompts = True

    def __init__(
        self,
        questions: str,  # path of dpg_bench.csv
        vqa: Annotated[Spec, "vqa"],  # model that answers its questions
        images_per_prompt: Count = 4,  # images per prompt
    ) -> None:
        self.items = read_items(questions)
        self.rows = [{"prompt": item.prompt, "item_id": item.item_id} for item in self.items]
        self.vqa: Vqa = specs.build("vqa", vqa)
        self.images_per_prompt, self.questions_sha256 = images_per_prompt, digests.sha256(Path(questions))
        self.coverage = Coverage(self.rows, images_per_prompt, "item_id")
        self.results: list[tuple[int, dict[int, bool]]] = []  # per image: item index, proposition -> whether it holds

    def add(self, images: Tensor, rows: Sequence[Json]) -> None:
        self.collect(self.extract(images, rows), rows)

    def extract(self, images: Tensor, rows: Sequence[Json]) -> list[dict[int, bool]]:
        items = (self.items[self.coverage.index_of(row)] for row in rows)
        return [self._holding(image, item) for image, item in zip(images, items, strict=True)]

    def collect(self, extracted: list[dict[int, bool]], rows: Sequence[Json]) -> None:
        for holding, row in zip(extracted, rows, strict=True):
            i = self.coverage.index_of(row)
            self.results.append((i, holding))
            self.coverage.count(i)

    def _holding(self, image: Tensor, item: Item) -> dict[int, bool]:
        answers = self.vqa.answer(image, [question.text for question in item.questions.values()])
        return holds(item, dict(zip(item.questions, answers, strict=True)))

    def add_folder(self, folder: Path) -> bool:
        score_folder(folder, self)
        return True

    def report(self) -> Report:
        if not self.results:
            raise ValueError("no images came, so there is no score")
        name = "dpg" + "_partial" * self.coverage.partial
        influences = by_prompt([100 * _share(holding) for _, holding in self.results], self._owners())
        values = {name: clustered_share(influences, self._owners(), 100.0)}
        values |= {f"{name}_{_identifier(broad)}": value for broad, value in self.categories(detailed=False).items()}
        return Report(values, self._settings(), {name: influences})

    def categories(self, *, detailed: bool) -> dict[str, Estimate]:
        """Percentage of propositions that hold, by category: "entity", or detailed "entity - whole"."""
        counts: dict[str, dict[int, list[bool]]] = {}
        for n, (i, holding) in enumerate(self.results):
            for proposition, right in holding.items():
                question = self.items[i].questions[proposition]
                name = f"{question.broad} - {question.detailed}" if detailed else question.broad
                counts.setdefault(name, {}).setdefault(n, []).append(right)
        return {name: self._ratio(images) for name, images in sorted(counts.items())}

    def outcomes(self) -> list[Json]:
        """For each prompt with images, in order: {"item_id", "prompt", "scores": percentage of each image}."""
        scores: dict[int, list[float]] = {}
        for i, holding in self.results:
            scores.setdefault(i, []).append(100 * _share(holding))
        return [{**self.rows[i], "scores": scores[i]} for i in sorted(scores)]

    def _owners(self) -> list[int]:
        return [i for i, _ in self.results]

    def _ratio(self, images: Mapping[int, Sequence[bool]]) -> Estimate:
        """The share of propositions of these images that hold, in percent; images of one prompt are one cluster."""
        sums, sizes = (np.array([f(holding) for holding in images.values()], np.float64) for f in (sum, len))
        value = sums.sum() / sizes.sum()
        influences = value + (sums - value * sizes) / sizes.mean()
        return clustered_share((100 * influences).tolist(), [self.results[n][0] for n in images], 100.0)

    def _settings(self) -> Json:
        return {
            "title": "DPG-Bench",
            "questions_sha256": self.questions_sha256,
            **self.coverage.settings(),
            "vqa": self.vqa.identity(),
            "rule": "a proposition holds with all that it depends on; mean over questions, images, prompts",
        }


def by_prompt(values: Sequence[float], prompts: Sequence[int]) -> list[float]:
    """One number per image; their mean is the mean over prompts of the mean over the prompt's images."""
    x, owner = np.asarray(values, np.float64), np.unique(prompts, return_inverse=True)[1]
    sizes = np.bincount(owner)
    mean = (np.bincount(owner, x) / sizes).mean()
    return (mean + (x - mean) * len(x) / (len(sizes) * sizes[owner])).tolist()


def split_grid(image: Tensor, side: int) -> list[Tensor]:
    """The squares of `side` pixels of an image (3, H, W), in row-major order. ValueError if they do not tile it."""
    height, width = image.shape[1:]
    if height % side or width % side:
        raise ValueError(f"an image of {width} x {height} pixels is no grid of squares of {side}")
    return [part for row in image.split(side, 1) for part in row.split(side, 2)]


def score_folder(folder: Path, measure: Dpg, side: int | None = None) -> Report:
    """Report on image files named after their `item_id`; grids of squares of `side` pixels are split.

    ValueError names a file that is unreadable, belongs to no prompt or is not a grid of `images_per_prompt`.
    """
    rows = {item.item_id: row for item, row in zip(measure.items, measure.rows, strict=True)}
    files = sorted(p for p in folder.glob("*") if is_image(p))
    if unknown := [p.name for p in files if p.stem not in rows]:
        raise ValueError(
            f"{folder} holds {unknown[0]!r}, which belongs to no item; {len(unknown)} such in {len(files)}"
        )
    if not files:
        raise ValueError(f"{folder} holds no images called after the items, such as {next(iter(rows))}.png")
    for path in files:
        squares = _squares(path, side, measure.images_per_prompt)
        measure.add(torch.stack(squares), [rows[path.stem]] * len(squares))
    return measure.report()


def _squares(path: Path, side: int | None, n: int) -> list[Tensor]:
    try:
        image = torch.from_numpy(np.array(read(path))).permute(2, 0, 1)
        squares = [image] if side is None else split_grid(image, side)
    except (UnreadableError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    if side is not None and len(squares) != n:
        raise ValueError(f"{path} is a grid of {len(squares)} images, expected {n}")
    return squares


def _question(line: Mapping[str, str], where: str) -> tuple[str, int, Question]:
    try:
        parents = tuple(int(part) for part in line["dependency"].split(",") if int(part))  # 0 is none
        proposition = int(line["proposition_id"])
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{where}: expected whole numbers as proposition_id and dependency; {error}") from error
    text = (line["question_natural_language"] or "").strip()
    if not text:
        raise ValueError(f"{where}: there is no question")
    broad, detailed = (line[key].strip().lower() for key in ("category_broad", "category_detailed"))
    return line["item_id"], proposition, Question(text, parents, broad, detailed)


def _order(name: str, questions: Mapping[int, Question]) -> tuple[int, ...]:
    for proposition, question in questions.items():
        if unknown := set(question.parents) - questions.keys():
            raise ValueError(f"{name}: proposition {proposition} depends on {unknown.pop()}, which it does not have")
    try:
        return tuple(TopologicalSorter({p: q.parents for p, q in questions.items()}).static_order())
    except CycleError as error:
        raise ValueError(f"{name}: its propositions depend on each other in a ring, {error.args[1]}") from error


def _share(holding: Mapping[int, bool]) -> float:
    return sum(holding.values()) / len(holding)


def _identifier(text: str) -> str:
    return re.sub(r"\W+", "_", text).strip("_")
