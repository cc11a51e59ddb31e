"""GenEval's prompts (Ghosh et al. 2023, arXiv 2310.11513): sampled for any vocabulary, read from a file, validated.

A row is GenEval's own metadata: {"tag", "include", "exclude"?, "prompt"}. The published 553 rows are in
`eval/prompts/geneval.jsonl`.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

from sana_lab.config import experiments, text_files
from sana_lab.config.specs import SpecError, nearest
from sana_lab.evaluation.geneval.vocabulary import COLORS, NUMBERS, POSITIONS, article, plural
from sana_lab.types import Json


class Vocabulary(NamedTuple):
    """Class and colour names of prompts."""

    classes: Sequence[str]
    colors: Sequence[str]
    colorless: bool = False  # the first class is never given a colour, like GenEval's "person"


def prompts(
    n_per_task: int,
    seed: int = 43,
    *,
    classes: Sequence[str],
    colors: Sequence[str] = COLORS,
    colorless: bool = False,
    top_up: bool = True,
) -> list[Json]:
    """Distinct rows of the six tasks, up to `n_per_task` each, in GenEval's sampling order.

    GenEval samples n rows per task and drops duplicates; `top_up` continues to n rows, or to all that exist: with four
    classes and ten colours 4, 12, 12, 40, 48 and 1,080. GenEval's 80 classes with n = 100, `colorless` and without
    `top_up` give its published 553 rows, byte for byte. ValueError for a vocabulary of one class or colour.
    """
    if n_per_task < 1 or len(classes) < 2 or len(colors) < 2:
        raise ValueError(
            f"prompts need n_per_task >= 1, two classes and two colours; "
            f"given {n_per_task}, {len(classes)} and {len(colors)}"
        )
    rng, words = np.random.default_rng(seed), Vocabulary(classes, colors, colorless)
    tasks = [_single_object(rng, words)[: n_per_task if top_up else None]]
    for sample_row, count in _SAMPLERS:
        minimum = min(n_per_task, count(words)) if top_up else 0
        tasks.append(_distinct(partial(sample_row, rng, words), n_per_task, minimum))
    return [row for rows in tasks for row in rows]


def _distinct(sample_row: Callable[[], Json], n: int, minimum: int) -> list[Json]:
    """The distinct rows of n samples, continued to `minimum` rows."""
    rows: dict[str, Json] = {}
    for _ in range(n):
        row = sample_row()
        rows.setdefault(json.dumps(row), row)
    while len(rows) < minimum:
        row = sample_row()
        rows.setdefault(json.dumps(row), row)
    return list(rows.values())


def _row(tag: str, include: list[Json], phrase: str, **exclude: list[Json]) -> Json:
    return {"tag": tag, "include": include, **exclude, "prompt": f"a photo of {phrase}"}


def _one(name: str, color: str | None = None) -> Json:
    return {"class": name, "count": 1} | ({} if color is None else {"color": color})


def _single_object(rng: Generator, words: Vocabulary) -> list[Json]:
    n = len(words.classes)
    names = [words.classes[i] for i in rng.choice(n, size=n, replace=False)]
    return [_row("single_object", [_one(name)], article(name)) for name in names]


def _class_pair(rng: Generator, words: Vocabulary) -> tuple[str, str]:
    a, b = rng.choice(len(words.classes), size=2, replace=False)
    return words.classes[a], words.classes[b]


def _two_object(rng: Generator, words: Vocabulary) -> Json:
    a, b = _class_pair(rng, words)
    return _row("two_object", [_one(a), _one(b)], f"{article(a)} and {article(b)}")


def _counting(rng: Generator, words: Vocabulary) -> Json:
    name = words.classes[rng.choice(len(words.classes))]
    n = int(rng.integers(2, 4, endpoint=True))
    phrase = f"{NUMBERS[n]} {plural(name)}"
    return _row("counting", [{"class": name, "count": n}], phrase, exclude=[{"class": name, "count": n + 1}])


def _colors(rng: Generator, words: Vocabulary) -> Json:
    skipped = int(words.colorless)
    name = words.classes[rng.choice(len(words.classes) - skipped) + skipped]
    color = words.colors[rng.choice(len(words.colors))]
    return _row("colors", [_one(name, color)], article(f"{color} {name}"))


def _position(rng: Generator, words: Vocabulary) -> Json:
    a, b = _class_pair(rng, words)
    where = POSITIONS[rng.choice(len(POSITIONS))]
    include = [_one(b), {**_one(a), "position": [where, 0]}]
    return _row("position", include, f"{article(a)} {where} {article(b)}")


def _color_attr(rng: Generator, words: Vocabulary) -> Json:
    skipped = int(words.colorless)
    i, j = rng.choice(len(words.classes) - skipped, size=2, replace=False) + skipped
    k, m = rng.choice(len(words.colors), size=2, replace=False)
    a, b, c, d = words.classes[i], words.classes[j], words.colors[k], words.colors[m]
    return _row("color_attr", [_one(a, c), _one(b, d)], f"{article(f'{c} {a}')} and {article(f'{d} {b}')}")


def _pairs(n: int) -> int:
    return n * (n - 1)


_Sampler = tuple[Callable[[Generator, Vocabulary], Json], Callable[[Vocabulary], int]]
_SAMPLERS: tuple[_Sampler, ...] = (  # GenEval's order; beside each task the number of distinct rows that exist
    (_two_object, lambda w: _pairs(len(w.classes))),
    (_counting, lambda w: 3 * len(w.classes)),
    (_colors, lambda w: (len(w.classes) - w.colorless) * len(w.colors)),
    (_position, lambda w: _pairs(len(w.classes)) * len(POSITIONS)),
    (_color_attr, lambda w: _pairs(len(w.classes) - w.colorless) * _pairs(len(w.colors))),
)


class Benchmark(NamedTuple):
    """Rows of one benchmark."""

    rows: Sequence[Json]  # distinct
    times: Sequence[int]  # how often the images of each row are generated
    exhausted: frozenset[str] = frozenset()  # tasks whose rows are all that exist

    @property
    def repeated(self) -> list[Json]:
        """The rows, each as often as its images are generated."""
        return [row for row, n in zip(self.rows, self.times, strict=True) for _ in range(n)]


def generated(generate: Callable[[int], Sequence[Json]], per_task: int, fill: bool = False) -> Benchmark:
    """The benchmark of `generate`, which gives rows of at most so many per task.

    With `fill` the rows of a task that has fewer are repeated, all equally often, to at least `per_task`.
    """
    rows = generate(per_task)
    counts, larger = (Counter(row["tag"] for row in some) for some in (rows, generate(per_task + 1)))
    times = [-(-per_task // counts[row["tag"]]) if fill else 1 for row in rows]
    return Benchmark(rows, times, frozenset(tag for tag, n in counts.items() if larger[tag] == n))


MAX_ROWS = 2000
"""Rows of each task among which `row_of` looks; all rows of the embedded world are (1,080 of `color_attr`)."""

PREFIX = "a photo of "


def row_of(prompt: str, classes: Sequence[str]) -> Json:
    """The row of a prompt about these classes, with or without "a photo of". SpecError for one that is none."""
    rows = _rows_by_prompt(tuple(classes))
    for text in (prompt, PREFIX + prompt):
        if text in rows:
            return rows[text]
    raise SpecError(
        f"{prompt!r} is none of GenEval's prompts, whose rule judges; expected one of its forms, such as 'a red "
        f"{classes[0]}', or a measure that reads any text, such as clip_score or clip_shapes"
    )


@cache
def _rows_by_prompt(classes: tuple[str, ...]) -> dict[str, Json]:
    return {row["prompt"]: row for row in prompts(MAX_ROWS, classes=classes)}


# --- files ----------------------------------------------------------------------------------------------------------


def read_rows(path: str | Path) -> list[Json]:
    """The validated rows of a GenEval metadata .jsonl file. ValueError names the line or row."""
    rows = []
    for n, line in enumerate(text_files.read(path).split("\n"), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {n} is no JSON: {error}") from error
    check_rows(rows)
    return rows


def check_rows(rows: Sequence[Json]) -> None:
    """ValueError for an empty list, a row without text, and a counting row without its `exclude`."""
    if not rows:
        raise ValueError("the list of prompts is empty")
    for i, row in enumerate(rows):
        wrong = row_error(row) or (
            lacks_exclude(row) and "a counting row needs its 'exclude', or it would count 'at least'"
        )
        if wrong:
            raise ValueError(f"prompt {i}: {wrong}; given {row!r}")


def row_error(row: object) -> str | None:
    """The reason why something is not a GenEval row, a missing `exclude` aside; None for a row."""
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        return "expected a row with a 'prompt' that is text"
    if not text_files.is_unicode(row["prompt"]):
        return "expected a 'prompt' of valid Unicode; this one holds half of a surrogate pair"
    if not isinstance(row.get("tag"), str) or not row.get("include"):
        return "expected a row with a 'tag' and an 'include' list"
    return None


def lacks_exclude(row: Json) -> bool:
    """Whether a counting row has no upper limit, as in the metadata that SANA's own script writes."""
    return row.get("tag") == "counting" and not row.get("exclude")


def find_prompts(name: str) -> Path:
    """The file of prompts at a path, or of that name in `eval/prompts`. SpecError with the nearest name."""
    folders = [root / "prompts" for root in experiments.roots("eval")]
    path = next((path for path in (Path(name), *(f / name for f in folders)) if path.is_file()), None)
    if path is None:
        raise SpecError(
            f"there is no file of prompts {name!r}; {nearest(name, (p.name for f in folders for p in f.glob('*')))}"
        )
    return path


def coco_classes() -> list[str]:
    """GenEval's 80 classes: COCO's, three of them renamed."""
    return find_prompts("geneval_classes.txt").read_text().splitlines()


def rows_sha256(rows: Sequence[Json]) -> str:
    """SHA-256 of the rows as a .jsonl file."""
    return hashlib.sha256("".join(json.dumps(row) + "\n" for row in rows).encode()).hexdigest()
