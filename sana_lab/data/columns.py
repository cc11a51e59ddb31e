"""Columns of a manifest: files, captions, scores of captions, group and split."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

FILE_COLUMNS = ("file_name", "image", "file", "filename", "path", "image_path", "filepath", "file_path")
TEXT_COLUMNS = ("caption", "captions", "prompt", "prompts", "text", "texts")
TABLES = (".jsonl", ".csv", ".tsv", ".parquet")
MANIFESTS = tuple(stem + suffix for stem in ("captions", "metadata", "manifest") for suffix in TABLES)
IMAGE_COLUMNS = ("image", "img", "jpg", "png", "picture", "image_bytes", "bytes")
"""Columns that hold a picture: its bytes, or {bytes, path}."""

SCORES = ("clip_score", "clip_scores", "caption_score", "caption_scores", "score", "scores")
GROUPS = ("group", "group_id")
SPLITS = ("split", "subset")
TRAIN = ("train", "training")
HELD_OUT = ("val", "valid", "validation", "test", "testing", "dev", "held_out", "heldout", "holdout", "eval")


class Facts(NamedTuple):
    """What a row says of its image."""

    group: str
    split: str  # train, val or ""


NO_FACTS = Facts("", "")


def facts(row: dict[str, Any], where: str) -> Facts:
    """Group and split of a row; ValueError for a split of another name."""
    group = next((row[c] for c in GROUPS if row.get(c) not in (None, "")), "")
    return Facts(str(group), split(next((row[c] for c in SPLITS if row.get(c) not in (None, "")), ""), where))


def split(value: Any, where: str) -> str:
    """'train', 'val' or '' of a column's value. ValueError."""
    name = str(value).strip().lower().replace("-", "_")
    if name in ("", *TRAIN, *HELD_OUT):
        return "train" if name in TRAIN else "val" if name else ""
    raise ValueError(f"{where} has the split {value!r}; expected one of {', '.join(TRAIN + HELD_OUT)}")


def scores(row: dict[str, Any], captions: int, where: str) -> list[float]:
    """A score of each caption, NaN without one; ValueError for another number of scores, or no number."""
    value = next((row[c] for c in SCORES if row.get(c) not in (None, "", [])), None)
    if value is None:
        return [math.nan] * captions
    values = list(_numbers(value, where))
    if len(values) != captions:
        raise ValueError(f"{where} has {len(values)} scores of {captions} captions; expected one of each")
    return values


def _numbers(value: Any, where: str) -> Iterable[float]:
    texts = value.strip("[] ").replace(",", " ").split() if isinstance(value, str) else value
    try:
        return [float("nan" if v is None else v) for v in (texts if isinstance(texts, list | tuple) else [texts])]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} has the scores {value!r:.80}; expected numbers") from error
