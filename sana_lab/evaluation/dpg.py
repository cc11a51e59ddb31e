"""DPG-Bench (Hu et al. 2024, arXiv 2403.05135): dense prompts as yes-or-no questions that depend on each other.

A proposition holds where its answer is yes and what it depends on holds. The original script differs where it is wrong:
its category scores take the last image alone and ignore dependence, it drops the file's first question, and it leaves
out images that raise. The score itself is the same: the mean over questions, over images, over prompts.
"""

import csv
import re
from collections.abc import Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Annotated, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from sana_lab.config import specs
from sana_lab.config.digests import sha256
from sana_lab.config.specs import Spec, nearest
from sana_lab.data.images import SUFFIXES, UnreadableError, read
from sana_lab.evaluation import Measure, Report, Value
from sana_lab.evaluation.per_prompt import Roster, clustered_mean
from sana_lab.evaluation.vqa import Vqa
from sana_lab.types import Json

COLUMNS = (
    *("item_id", "text", "proposition_id", "dependency", "category_broad", "category_detailed"),
    "question_natural_language",
)
"""What is read of dpg_bench.csv."""


class Question(NamedTuple):
    """One proposition about a picture."""

    text: str
    parents: tuple[int, ...]  # propositions that it depends on
    broad: str  # entity, attribute, relation, global, other
    detailed: str  # color, shape, spatial ...


class Item(NamedTuple):
    """A prompt with its questions by proposition."""

    item_id: str
    prompt: str
    questions: dict[int, Question]
    order: tuple[int, ...]  # of propositions, parents first


def read_items(path: str | Path) -> list[Item]:
    """The prompts of a dpg_bench.csv. ValueError names the line, or the proposition that depends on nothing known."""
    with Path(path).open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
            near = nearest(missing[0], reader.fieldnames or ())
            raise ValueError(f"{path} has no column {missing[0]!r}; {near}")
        lines = [(reader.line_num, line) for line in reader]
    groups: dict[str, dict[int, Question]] = {}
    prompts: dict[str, str] = {}
    for number, line in lines:
        if line["item_id"] == "item_id":  # a header that stands twice
            continue
        name, proposition, question = _question(line, f"{path}, line {number}")
        prompts.setdefault(name, (line["text"] or "").strip())
        if proposition in groups.setdefault(name, {}):
            raise ValueError(f"{path}, line {number}: proposition {proposition} of {name!r} is there twice")
        groups[name][proposition] = question
    if not groups:
        raise ValueError(f"{path} holds no questions")
    return [Item(name, prompts[name], asked, _order(name, asked)) for name, asked in groups.items()]


def holds(item: Item, answers: Mapping[int, bool]) -> dict[int, bool]:
    """Whether each proposition holds: answered with yes, and so is all that it depends on, however far up."""
    found: dict[int, bool] = {}
    for proposition in item.order:
        parents = item.questions[proposition].parents
        found[proposition] = answers[proposition] and all(found[parent] for parent in parents)
    return found


@final
class Dpg(Measure):
    """`dpg` and `dpg_<category>`, in percent; where prompts or images are missing they are called `dpg_partial...`.

    `questions` is the path of dpg_bench.csv. Published numbers are of 1,065 prompts, four images each, and of
    mPLUG-large, whose answers another `vqa` does not repeat.
    """

    rows: Sequence[Json]

    def __init__(self, questions: str, vqa: Annotated[Spec, "vqa"], images_per_prompt: int = 4) -> None:
        self.items = read_items(questions)
        self.rows = [{"prompt": item.prompt, "item_id": item.item_id} for item in self.items]
        self.vqa: Vqa = specs.build("vqa", vqa)
        self.images_per_prompt, self.source = images_per_prompt, sha256(Path(questions))
        self.roster = Roster(self.rows, images_per_prompt, "item_id")
        self.found: list[tuple[int, dict[int, bool]]] = []  # of each image: its item, what holds

    def add(self, images: Tensor, rows: Sequence[Json]) -> None:
        for image, row in zip(images, rows, strict=True):
            i = self.roster.position_of(row)
            questions = self.items[i].questions
            answers = self.vqa.answer(image, [question.text for question in questions.values()])
            self.found.append((i, holds(self.items[i], dict(zip(questions, answers, strict=True)))))
            self.roster.came[i] += 1

    def report(self) -> Report:
        if not self.found:
            raise ValueError("no images came, so there is no score")
        name = "dpg" + "_partial" * self.roster.partial
        influences = by_prompt([100 * _share(held) for _, held in self.found], self._owners())
        values = {name: clustered_mean(influences, self._owners())}
        values |= {f"{name}_{_word(broad)}": value for broad, value in self.categories(detailed=False).items()}
        return Report(values, self._settings(), {name: influences})

    def categories(self, *, detailed: bool) -> dict[str, Value]:
        """Percent of a category's propositions that hold, over all images; "entity", or in detail "entity - whole"."""
        counts: dict[str, dict[int, list[bool]]] = {}
        for n, (i, held) in enumerate(self.found):
            for proposition, right in held.items():
                question = self.items[i].questions[proposition]
                name = f"{question.broad} - {question.detailed}" if detailed else question.broad
                counts.setdefault(name, {}).setdefault(n, []).append(right)
        return {name: self._ratio(images) for name, images in sorted(counts.items())}

    def outcomes(self) -> list[Json]:
        """For each prompt with images, in order: {"item_id", "prompt", "scores": percent of each image}."""
        scores: dict[int, list[float]] = {}
        for i, held in self.found:
            scores.setdefault(i, []).append(100 * _share(held))
        return [{**self.rows[i], "scores": scores[i]} for i in sorted(scores)]

    def _owners(self) -> list[int]:
        return [i for i, _ in self.found]

    def _ratio(self, images: Mapping[int, Sequence[bool]]) -> Value:
        """Of all propositions of these images; those of one prompt depend on each other."""
        sums, sizes = (np.array([f(held) for held in images.values()], np.float64) for f in (sum, len))
        value = sums.sum() / sizes.sum()
        influences = value + (sums - value * sizes) / sizes.mean()
        return clustered_mean((100 * influences).tolist(), [self.found[n][0] for n in images])

    def _settings(self) -> Json:
        return {
            "title": "DPG-Bench",
            "questions_sha256": self.source,
            **self.roster.settings(),
            "vqa": self.vqa.identity(),
            "rule": "a proposition holds with all that it depends on; mean over questions, images, prompts",
        }


def by_prompt(values: Sequence[float], prompts: Sequence[int]) -> list[float]:
    """One number for each image whose mean is the mean over prompts of their images' mean."""
    x, owner = np.asarray(values, np.float64), np.unique(prompts, return_inverse=True)[1]
    sizes = np.bincount(owner)
    mean = (np.bincount(owner, x) / sizes).mean()
    return (mean + (x - mean) * len(x) / (len(sizes) * sizes[owner])).tolist()


def cut(image: Tensor, side: int) -> list[Tensor]:
    """The squares of `side` pixels of an image (3, H, W), row by row. ValueError where they do not fill it."""
    height, width = image.shape[1:]
    if height % side or width % side:
        raise ValueError(f"a picture of {width} x {height} pixels is no grid of squares of {side}")
    return [part for row in image.split(side, 1) for part in row.split(side, 2)]


def score_folder(folder: Path, measure: Dpg, side: int | None = None) -> Report:
    """What the measure says of images called after their `item_id`; grids of squares of `side` pixels are cut.

    ValueError names a file that is broken, belongs to no prompt or is another grid than of `images_per_prompt`.
    """
    known = {item.item_id: row for item, row in zip(measure.items, measure.rows, strict=True)}
    files = sorted(p for p in folder.glob("*") if p.suffix.lower() in SUFFIXES)
    if strange := [p.name for p in files if p.stem not in known]:
        raise ValueError(
            f"{folder} holds {strange[0]!r}, which belongs to no item; {len(strange)} such in {len(files)}"
        )
    if not files:
        raise ValueError(f"{folder} holds no images called after the items, such as {next(iter(known))}.png")
    for path in files:
        squares = _squares(path, side, measure.images_per_prompt)
        measure.add(torch.stack(squares), [known[path.stem]] * len(squares))
    return measure.report()


def _squares(path: Path, side: int | None, n: int) -> list[Tensor]:
    try:
        image = torch.from_numpy(np.array(read(path))).permute(2, 0, 1)
        squares = [image] if side is None else cut(image, side)
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


def _share(held: Mapping[int, bool]) -> float:
    return sum(held.values()) / len(held)


def _word(text: str) -> str:
    return re.sub(r"\W+", "_", text).strip("_")
