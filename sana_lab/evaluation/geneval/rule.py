"""GenEval (Ghosh et al. 2023, arXiv 2310.11513): prompts that a detector can check, its decision rule and its summary.

A row is GenEval's own metadata: {"tag", "include", "exclude"?, "prompt"}. The same rows, rule and summary serve COCO
classes with a detector network and the embedded world with its exact judge.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from sana_lab.config import experiments
from sana_lab.config.specs import SpecError, nearest
from sana_lab.evaluation.geneval.detectors import Detector
from sana_lab.intervals import cluster_bootstrap
from sana_lab.shapes.scenes import COLORS, NUMBERS, SHAPES, article, plural
from sana_lab.types import Json, Object

POSITIONS = ("left of", "right of", "above", "below")
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

Sample = Callable[[list[str], list[int]], Tensor]
"""(prompts, noise indices) -> (B, 3, H, W) uint8"""

Namer = Callable[[Tensor, Sequence[Object]], list[Object]]
"""(one image uint8 (3, H, W), some of its objects) -> the same objects with their colours"""

MOST = 16  # objects of one class that are looked at


# --- prompts --------------------------------------------------------------------------------------------------------


class Vocabulary(NamedTuple):
    """What prompts may name. A colourless first class is never given a colour, as GenEval spares "person"."""

    classes: Sequence[str]
    colors: Sequence[str]
    colorless: bool = False


def prompts(
    n_per_task: int,
    seed: int = 43,
    classes: Sequence[str] = SHAPES,
    colors: Sequence[str] = COLORS,
    *,
    colorless: bool = False,
    top_up: bool = True,
) -> list[Json]:
    """Distinct rows of the six tasks, up to n each, drawn as GenEval draws them.

    GenEval draws n rows per task and drops duplicates; `top_up` goes on until there are n or all that exist: with four
    shapes and ten colours 4, 12, 12, 40, 48 and 1,080. With GenEval's 80 class names, n = 100, colourless and without
    topping up, these are its published 553 rows to the byte.
    """
    if n_per_task < 1 or len(classes) < 2 or len(colors) < 2:
        raise ValueError(
            f"prompts need n_per_task >= 1, two classes and two colours; "
            f"given {n_per_task}, {len(classes)} and {len(colors)}"
        )
    rng, words = np.random.default_rng(seed), Vocabulary(classes, colors, colorless)
    drawn = [_singles(rng, words)[: n_per_task if top_up else None]]
    for draw, space in _DRAWS:
        enough = min(n_per_task, space(words)) if top_up else 0
        drawn.append(_distinct(partial(draw, rng, words), n_per_task, enough))
    return [row for rows in drawn for row in rows]


def _distinct(draw: Callable[[], Json], n: int, enough: int) -> list[Json]:
    """n draws without the repeated ones, then more until there are `enough`."""
    found: dict[str, Json] = {}
    for _ in range(n):
        row = draw()
        found.setdefault(json.dumps(row), row)
    while len(found) < enough:
        row = draw()
        found.setdefault(json.dumps(row), row)
    return list(found.values())


def _row(tag: str, include: list[Json], phrase: str, **exclude: list[Json]) -> Json:
    return {"tag": tag, "include": include, **exclude, "prompt": f"a photo of {phrase}"}


def _one(name: str, color: str | None = None) -> Json:
    return {"class": name, "count": 1} | ({} if color is None else {"color": color})


def _singles(rng: Generator, words: Vocabulary) -> list[Json]:
    n = len(words.classes)
    names = [words.classes[i] for i in rng.choice(n, size=n, replace=False)]
    return [_row("single_object", [_one(name)], article(name)) for name in names]


def _pair(rng: Generator, words: Vocabulary) -> tuple[str, str]:
    a, b = rng.choice(len(words.classes), size=2, replace=False)
    return words.classes[a], words.classes[b]


def _two(rng: Generator, words: Vocabulary) -> Json:
    a, b = _pair(rng, words)
    return _row("two_object", [_one(a), _one(b)], f"{article(a)} and {article(b)}")


def _counting(rng: Generator, words: Vocabulary) -> Json:
    name = words.classes[rng.choice(len(words.classes))]
    n = int(rng.integers(2, 4, endpoint=True))
    phrase = f"{NUMBERS[n]} {plural(name)}"
    return _row("counting", [{"class": name, "count": n}], phrase, exclude=[{"class": name, "count": n + 1}])


def _colored(rng: Generator, words: Vocabulary) -> Json:
    spared = int(words.colorless)
    name = words.classes[rng.choice(len(words.classes) - spared) + spared]
    color = words.colors[rng.choice(len(words.colors))]
    return _row("colors", [_one(name, color)], article(f"{color} {name}"))


def _position(rng: Generator, words: Vocabulary) -> Json:
    a, b = _pair(rng, words)
    where = POSITIONS[rng.choice(len(POSITIONS))]
    include = [_one(b), {**_one(a), "position": [where, 0]}]
    return _row("position", include, f"{article(a)} {where} {article(b)}")


def _attributed(rng: Generator, words: Vocabulary) -> Json:
    spared = int(words.colorless)
    i, j = rng.choice(len(words.classes) - spared, size=2, replace=False) + spared
    k, m = rng.choice(len(words.colors), size=2, replace=False)
    a, b, c, d = words.classes[i], words.classes[j], words.colors[k], words.colors[m]
    return _row("color_attr", [_one(a, c), _one(b, d)], f"{article(f'{c} {a}')} and {article(f'{d} {b}')}")


def _ordered(n: int) -> int:
    return n * (n - 1)


_Draw = tuple[Callable[[Generator, Vocabulary], Json], Callable[[Vocabulary], int]]
_DRAWS: tuple[_Draw, ...] = (  # GenEval's order; how many distinct rows each can give
    (_two, lambda w: _ordered(len(w.classes))),
    (_counting, lambda w: 3 * len(w.classes)),
    (_colored, lambda w: (len(w.classes) - w.colorless) * len(w.colors)),
    (_position, lambda w: _ordered(len(w.classes)) * len(POSITIONS)),
    (_attributed, lambda w: _ordered(len(w.classes) - w.colorless) * _ordered(len(w.colors))),
)


def read_rows(path: str | Path) -> list[Json]:
    """The rows of a GenEval metadata .jsonl file, checked."""
    rows = []
    for n, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {n} is no JSON: {error}") from error
    check_rows(rows)
    return rows


def check_rows(rows: Sequence[Json]) -> None:
    """ValueError for what could not be scored truthfully: no rows, no text, a counting row without its `exclude`."""
    if not rows:
        raise ValueError("the list of prompts is empty")
    for i, row in enumerate(rows):
        wrong = fault(row) or (
            lacks_exclude(row) and "a counting row needs its 'exclude', or it would count 'at least'"
        )
        if wrong:
            raise ValueError(f"prompt {i}: {wrong}; given {row!r}")


def fault(row: object) -> str | None:
    """What keeps something from being a row, but for an `exclude` that is missing."""
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        return "expected a row with a 'prompt' that is text"
    if not isinstance(row.get("tag"), str) or not row.get("include"):
        return "expected a row with a 'tag' and an 'include' list"
    return None


def lacks_exclude(row: Json) -> bool:
    """Whether a counting row has lost its upper limit, as in the images of SANA's own script."""
    return row.get("tag") == "counting" and not row.get("exclude")


def find_prompts(name: str) -> Path:
    """The file of prompts at that path, or of that name in `eval/prompts`. SpecError with the nearest name."""
    folders = [root / "prompts" for root in experiments.roots("eval")]
    found = next((path for path in (Path(name), *(f / name for f in folders)) if path.is_file()), None)
    if found is None:
        raise SpecError(
            f"there is no file of prompts {name!r}; {nearest(name, (p.name for f in folders for p in f.glob('*')))}"
        )
    return found


def coco_classes() -> list[str]:
    """GenEval's 80 classes: COCO's, three of them renamed."""
    return find_prompts("geneval_classes.txt").read_text().splitlines()


# --- decision -------------------------------------------------------------------------------------------------------


def relations(a: Object, b: Object) -> set[str]:
    """Where a lies as seen from b: none, one or two of POSITIONS. Boxes that nearly overlap have no relation."""
    pa, pb = np.reshape(a.box, (2, 2)), np.reshape(b.box, (2, 2))
    offset = pa.mean(0) - pb.mean(0)
    apart = np.maximum(np.abs(offset) - 0.1 * (np.ptp(pa, 0) + np.ptp(pb, 0)), 0) * np.sign(offset)
    if (np.abs(apart) < 1e-3).all():
        return set()
    dx, dy = apart / np.linalg.norm(offset)
    return {name for name, holds in zip(POSITIONS, (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5), strict=True) if holds}


def judge_row(objects: Iterable[Object], row: Json) -> tuple[bool, str]:
    """Whether the objects meet GenEval's row, and why not; only the `count` most confident of a class are looked at."""
    seen = _by_class(objects)
    groups: list[list[Object] | None] = []
    faults = []
    for need in row["include"]:
        found = seen[need["class"]][: need["count"]]
        fault = _fault(found, need, groups)
        groups.append(None if fault else found)
        faults.append(fault)
    faults += [_surplus(len(seen[limit["class"]]), limit) for limit in row.get("exclude", [])]
    reasons = [fault for fault in faults if fault]
    return not reasons, "; ".join(reasons)


def _by_class(objects: Iterable[Object]) -> defaultdict[str, list[Object]]:
    seen: defaultdict[str, list[Object]] = defaultdict(list)
    for thing in sorted(objects, key=lambda o: -o.score):
        seen[thing.label] += [thing] if len(seen[thing.label]) < MOST else []
    return seen


def _fault(found: list[Object], need: Json, groups: list[list[Object] | None]) -> str | None:
    name, count = need["class"], need["count"]
    if len(found) < count:
        return f"expected {count} {name}, found {len(found)}"
    right = sum(thing.color == need.get("color") for thing in found)
    if "color" in need and right < count:
        return f"expected {count} {need['color']} {name}, found {', '.join(str(thing.color) for thing in found)}"
    return _misplaced(found, need, groups) if "position" in need else None


def _misplaced(found: list[Object], need: Json, groups: list[list[Object] | None]) -> str | None:
    where, target = need["position"]
    others = groups[target]
    if others is None:
        return f"no target for {need['class']} to be {where}"
    for thing in found:
        for other in others:
            held = relations(thing, other)
            if where not in held:
                return f"expected {thing.label} {where} {other.label}, found {' and '.join(sorted(held)) or 'neither'}"
    return None


def _surplus(found: int, limit: Json) -> str | None:
    return f"expected fewer than {limit['count']} {limit['class']}, found {found}" if found >= limit["count"] else None


def verdict(image: Tensor, row: Json, detector: Detector, namer: Namer | None = None) -> tuple[bool, str]:
    """Whether one uint8 (3, H, W) image meets its row, and why not; `namer` for a detector that sees no colours."""
    least = detector.threshold_for(row)
    objects = [thing for thing in detector.detect(image) if thing.score > least]
    return judge_row(objects if namer is None else _named(image, objects, row, namer), row)


def _named(image: Tensor, objects: list[Object], row: Json, namer: Namer) -> list[Object]:
    """With colours where the row asks for one, of as many of a class as the rule looks at."""
    asked = [(need["class"], need["count"]) for need in row["include"] if "color" in need]
    found = []
    for label, group in _by_class(objects).items():
        n = max((count for name, count in asked if name == label), default=0)
        found += [*namer(image, group[:n]), *group[n:]]
    return found


# --- summary --------------------------------------------------------------------------------------------------------


def summarise(outcomes: Sequence[Json], *, seed: int = 0) -> Json:
    """Means per task, and overall their unweighted mean, each with a 95 % interval over prompts within tasks.

    An outcome is {"tag", "prompt", "correct": [one bool per image]}. Also the shares of correct images and of prompts
    with at least one correct image, as GenEval prints them, and the numbers of prompts and images.
    """
    if not outcomes:
        raise ValueError("there are no outcomes to sum up")
    tasks: dict[str, list[list[float]]] = defaultdict(list)
    for outcome in outcomes:
        tasks[outcome["tag"]].append([float(right) for right in outcome["correct"]])
    overall = cluster_bootstrap(tasks, seed=seed)
    images = [right for clusters in tasks.values() for cluster in clusters for right in cluster]
    return {
        "overall": overall.value,
        "interval": [overall.low, overall.high],
        "tasks": {tag: _task(clusters, seed) for tag, clusters in tasks.items()},
        "prompts": len(outcomes),
        "images": len(images),
        "correct_images": float(np.mean(images)),
        "correct_prompts": float(np.mean([any(outcome["correct"]) for outcome in outcomes])),
    }


def _task(clusters: list[list[float]], seed: int) -> Json:
    estimate = cluster_bootstrap({"": clusters}, seed=seed)
    return {
        "value": estimate.value,
        "interval": [estimate.low, estimate.high],
        "prompts": estimate.n,
        "images": sum(map(len, clusters)),
    }


# --- the whole way --------------------------------------------------------------------------------------------------


def evaluate_geneval(
    sample: Sample,
    rows: Sequence[Json],
    detector: Detector,
    images_per_prompt: int = 4,
    batch: int = 64,
    seed: int = 0,
) -> Json:
    """`summarise` of images sampled for each row, with the outcome of each prompt beside it.

    Image k of prompt i is asked for with noise index i * images_per_prompt + k, so that two systems that are given the
    same rows see the same noise. `seed` is that of the intervals.
    """
    check_rows(rows)
    if images_per_prompt < 1 or batch < 1:
        raise ValueError(f"images_per_prompt and batch must be at least 1; given {images_per_prompt} and {batch}")
    verdicts: list[tuple[bool, str]] = []
    owners = [i for i in range(len(rows)) for _ in range(images_per_prompt)]
    for first in range(0, len(owners), batch):
        part = owners[first : first + batch]
        images = _checked(sample([rows[i]["prompt"] for i in part], list(range(first, first + len(part)))), len(part))
        verdicts += [verdict(image, rows[i], detector) for image, i in zip(images, part, strict=True)]
    outcomes = [outcome(row, verdicts[i * images_per_prompt :][:images_per_prompt]) for i, row in enumerate(rows)]
    return {**summarise(outcomes, seed=seed), "images_per_prompt": images_per_prompt, "outcomes": outcomes}


def outcome(row: Json, verdicts: Sequence[tuple[bool, str]]) -> Json:
    """What became of one row's images: {"tag", "prompt", "correct", "reasons"}."""
    return {
        "tag": row["tag"],
        "prompt": row["prompt"],
        "correct": [right for right, _ in verdicts],
        "reasons": [reason for _, reason in verdicts],
    }


def _checked(images: Tensor, n: int) -> Tensor:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[:2] != (n, 3):
        raise ValueError(f"expected {n} uint8 images (B, 3, H, W); given {images.dtype} {tuple(images.shape)}")
    return images
