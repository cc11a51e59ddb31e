"""Published sets of images with captions, in their own layouts, as a manifest that `data: folder` reads."""

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sana_lab.data.captions import near
from sana_lab.types import Json

MANIFEST = "captions.jsonl"
MJHQ_IMAGES = "mjhq30k_imgs"


def mjhq(root: Path, manifest: Path | None = None, absent: float = 0.0) -> Path:
    """MJHQ-30K (arXiv 2402.17245): `meta_data.json`, {id: {category, prompt}}, beside a folder of images by category.

    Returns the manifest, `captions.jsonl` in the root where no other is given, with a `category` for each picture.
    ValueError: no such layout, or more than the share `absent` of its pictures missing, which are named.
    """
    table = _json(root / "meta_data.json")
    rows = [_mjhq_row(root, name, said) for name, said in table.items()]
    return _written(rows, root, manifest, absent)


def coco(annotations: Path, images: Path, manifest: Path | None = None, absent: float = 0.0) -> Path:
    """COCO captions: `images` [{id, file_name}] and `annotations` [{image_id, caption}] of a JSON, a folder of images.

    Returns the manifest, `captions.jsonl` beside the images where no other is given, with all captions of a picture.
    ValueError as for `mjhq`, and for a picture without a caption.
    """
    table = _json(annotations)
    if not images.is_dir():
        raise ValueError(f"there is no folder {str(images)!r} with COCO's images")
    captions: dict[Any, list[str]] = {}
    for said in _listed(table, "annotations", ("image_id", "caption"), annotations):
        captions.setdefault(said["image_id"], []).append(" ".join(said["caption"].split()))
    pictures = _listed(table, "images", ("id", "file_name"), annotations)
    if bare := [p["file_name"] for p in pictures if p["id"] not in captions]:
        raise ValueError(f"{str(annotations)!r} has no caption of {_some(bare)} ({len(bare)} of {len(pictures)})")
    rows = [{"file_name": p["file_name"], "captions": captions[p["id"]]} for p in pictures]
    return _written(rows, images, manifest, absent)


def _mjhq_row(root: Path, name: str, said: Any) -> Json:
    if not isinstance(said, dict) or not {"category", "prompt"} <= said.keys():
        raise ValueError(f"{str(root / 'meta_data.json')!r} says {said!r} of {name!r}; expected category and prompt")
    inside = f"{said['category']}/{name}.jpg"
    nested = f"{MJHQ_IMAGES}/{inside}"
    file = nested if (root / nested).is_file() else inside
    return {"file_name": file, "caption": said["prompt"], "category": said["category"]}


def _listed(table: Json, key: str, expected: tuple[str, ...], path: Path) -> list[Json]:
    rows = table.get(key)
    if not isinstance(rows, list) or not all(isinstance(r, dict) and set(expected) <= r.keys() for r in rows):
        raise ValueError(f"{str(path)!r} has no list {key!r} of {' and '.join(expected)}; it has {', '.join(table)}")
    return rows


def _json(path: Path) -> Json:
    if not path.is_file():
        beside = [p.name for p in path.parent.glob("*.json")] if path.parent.is_dir() else []
        raise ValueError(f"there is no file {str(path)!r}{near(path.name, beside)}")
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is no JSON: {error}") from error
    if not isinstance(found, dict) or not found:
        what = "nothing" if found == {} else type(found).__name__
        raise ValueError(f"{str(path)!r} holds {what}, expected an object")
    return found


def _written(rows: list[Json], root: Path, manifest: Path | None, absent: float) -> Path:
    """The manifest of rows whose pictures are there; the others are named, and an error where they are many."""
    there = [row for row in rows if (root / row["file_name"]).is_file()]
    lost = [row["file_name"] for row in rows if row not in there] if len(there) < len(rows) else []
    if lost:
        told = f"{len(lost)} of {len(rows)} images are not in {str(root)!r}: {_some(lost)}"
        if len(lost) > absent * len(rows) or not there:
            raise ValueError(f"{told}; expected all of them, or leave them out by a share `absent`")
        warnings.warn(f"{told}; they are left out", stacklevel=3)
    return _write(there, manifest or root / MANIFEST)


def _write(rows: Iterable[Json], path: Path) -> Path:
    part = path.with_name(f".{path.name}.part")
    part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return part.replace(path)


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
