"""What a row of a table, or the .json of a sample, says of a picture."""

import math
from typing import Any, NamedTuple

from sana_lab.config import text_files
from sana_lab.data import columns
from sana_lab.data.columns import TEXT_COLUMNS


class Description(NamedTuple):
    """Captions with scores, group and split."""

    captions: tuple[str, ...]
    scores: tuple[float, ...]
    group: str
    split: str


def described(row: dict[str, Any], where: str) -> Description:
    """The captions of a row's columns TEXT_COLUMNS, and its scores, group and split. ValueError."""
    values = [row[c] for c in TEXT_COLUMNS if row.get(c) is not None]
    texts = [text for value in values for text in (value if isinstance(value, list | tuple) else [value])]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{where} has captions {texts!r:.200}, expected text or a list of texts")
    scores = columns.scores(row, len(texts), where)
    kept: dict[str, float] = {}
    for text, score in zip(texts, scores, strict=True):
        if (clean := text.strip()) and text_files.is_unicode(clean):
            kept.setdefault(clean, score)
    scored = () if all(map(math.isnan, kept.values())) else tuple(kept.values())
    return Description(tuple(kept), scored, *columns.facts(row, where))
