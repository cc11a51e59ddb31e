"""Manifests for `data: folder` from published sets of images with captions."""

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sana_lab.config import text_files
from sana_lab.config.atomic_write import write_text
from sana_lab.data.captions import near
from sana_lab.types import Json

MANIFEST = "captions.jsonl"
MJHQ_IMAGES = "mjhq30k_imgs"


def mjhq(root: Path, manifest: Path | None = None, absent: float = 0.0) -> Path:
    """MJHQ-30K (arXiv 2402.17245): `meta_data.json`, {id: {category, prompt}}, beside a folder of images by category.

    Returns the manifest, by default `captions.jsonl` in the root, with a `category` for each image. ValueError for
    another layout, or more than the share `absent` of the images missing.
    """
    return _written(mjhq_rows(root), root, manifest, absent)


def mjhq_rows(root: Path) -> list[Json]:
    """The rows of MJHQ-30K's manifest, with file_name, caption and category. ValueError for another layout."""
    table = _json(root / "meta_data.json")
    return [_mjhq_row(root, name, entry) for name, entry in table.items()]


def coco(annotations: Path, images: Path, manifest: Path | None = None, absent: float = 0.0) -> Path:
    """COCO captions: `images` [{id, file_name}] and `annotations` [{image_id, caption}] of a JSON, a folder of images.

    Returns the manifest, by default `captions.jsonl` beside the images, with all captions of each image. ValueError as
    for `mjhq`, and for an image without a caption.
    """
    table = _json(annotations)
    if not images.is_dir():
        raise ValueError(f"there is no folder {str(images)!r} with COCO's images")
    captions: dict[Any, list[str]] = {}
    for entry in _listed(table, "annotations", ("image_id", "caption"), annotations):
        if not isinstance(entry["caption"], str) or not isinstance(entry["image_id"], int | str):
            raise ValueError(f"{str(annotations)!r} has the annotation {entry!r:.200}; expected a caption that is text")
        captions.setdefault(entry["image_id"], []).append(" ".join(entry["caption"].split()))
    pictures = _listed(table, "images", ("id", "file_name"), annotations)
    if bare := [p["file_name"] for p in pictures if p["id"] not in captions]:
        raise ValueError(f"{str(annotations)!r} has no caption of {_some(bare)} ({len(bare)} of {len(pictures)})")
    rows = [{"file_name": p["file_name"], "captions": captions[p["id"]]} for p in pictures]
    return _written(rows, images, manifest, absent)


def _mjhq_row(root: Path, name: str, entry: Any) -> Json:
    if not isinstance(entry, dict) or not {"category", "prompt"} <= entry.keys():
        raise ValueError(f"{str(root / 'meta_data.json')!r} has {entry!r} for {name!r}; expected category and prompt")
    inside = f"{entry['category']}/{name}.jpg"
    nested = f"{MJHQ_IMAGES}/{inside}"
    file = nested if (root / nested).is_file() else inside
    return {"file_name": file, "caption": entry["prompt"], "category": entry["category"]}


def _listed(table: Json, key: str, expected: tuple[str, ...], path: Path) -> list[Json]:
    rows = table.get(key)
    if not isinstance(rows, list) or not all(isinstance(r, dict) and set(expected) <= r.keys() for r in rows):
        raise ValueError(f"{str(path)!r} has no list {key!r} of {' and '.join(expected)}; it has {', '.join(table)}")
    return rows


def _json(path: Path) -> Json:
    if not path.is_file():
        names = [p.name for p in path.parent.glob("*.json")] if path.parent.is_dir() else []
        raise ValueError(f"there is no file {str(path)!r}{near(path.name, names)}")
    try:
        table = json.loads(text_files.read(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is no JSON: {error}") from error
    if not isinstance(table, dict) or not table:
        what = "nothing" if table == {} else type(table).__name__
        raise ValueError(f"{str(path)!r} holds {what}, expected an object")
    return table


def _written(rows: list[Json], root: Path, manifest: Path | None, absent: float) -> Path:
    """Write the manifest of the rows whose images exist; ValueError if more than the share `absent` are missing."""
    present = [row for row in rows if (root / row["file_name"]).is_file()]
    missing = [row["file_name"] for row in rows if row not in present] if len(present) < len(rows) else []
    if missing:
        message = f"{len(missing)} of {len(rows)} images are not in {str(root)!r}: {_some(missing)}"
        if len(missing) > absent * len(rows) or not present:
            raise ValueError(f"{message}; expected all of them, or leave them out by a share `absent`")
        warnings.warn(f"{message}; they are left out", stacklevel=3)
    return _write(present, manifest or root / MANIFEST)


def _write(rows: Iterable[Json], path: Path) -> Path:
    write_text(path, "".join(_line(row) + "\n" for row in rows))
    return path


def _line(row: Json) -> str:
    text = json.dumps(row, ensure_ascii=False)
    return text if text_files.is_unicode(text) else json.dumps(row)


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
