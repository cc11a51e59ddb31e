"""Tiny archives of emoji for tests: a dozen labels drawn by two vendors, in the layout of the real ones."""

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sana_lab.emoji import archives

SKIN = {"noto": (219, 186, 143, 113, 89), "twemoji": (222, 198, 158, 116, 78)}
"""Luminance of the five skin tones, light to dark."""

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")

THINGS = {"1F34E": "red apple", "1F697": "automobile", "1F431": "cat face", "1F1F3-1F1F4": "flag: Norway"}
PEOPLE = {
    "1F44B": "waving hand",
    "1F9D1-200D-1F680": "astronaut",
    "1F468-200D-1F680": "man astronaut",
    "1F469-200D-1F680": "woman astronaut",
    "1F6B6-200D-2640-FE0F-200D-27A1-FE0F": "woman walking: facing right",
    "1F6B6": "person walking",
}
REPEATED = {"1F1F8-1F1EF": "flag: Svalbard & Jan Mayen"}  # drawn as the flag of Norway


def entries() -> list[dict[str, Any]]:
    """emojibase's table."""
    things = [_entry(c, label, 5) for c, label in {**THINGS, **REPEATED}.items()]
    people = [{**_entry(c, label, 20), "skins": _skins(c, label)} for c, label in PEOPLE.items()]
    return [*things, *people]


def _entry(points: str, label: str, subgroup: int) -> dict[str, Any]:
    return {"label": label, "hexcode": points, "tags": ["tag", label.split()[0]], "subgroup": subgroup}


def _skins(points: str, label: str) -> list[dict[str, Any]]:
    first, *rest = points.split("-")
    return [
        {"label": f"{label}: {tone} skin tone", "hexcode": "-".join([first, f"1F3F{'BCDEF'[i]}", *rest]), "tone": i + 1}
        for i, tone in enumerate(TONES)
    ]


def picture(vendor: str, label: str, tone: int) -> Image.Image:
    """Coloured blocks that depend on label and vendor; skin fills the middle of a person."""
    seed = int.from_bytes(hashlib.sha256(f"{vendor} {label}".encode()).digest()[:4])
    blocks = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    pixels = np.dstack([blocks.repeat(8, 0).repeat(8, 1), np.full((64, 64), 255, np.uint8)])
    pixels[:8] = 0  # transparent
    if tone:
        luminance = SKIN[vendor][tone - 1]
        pixels[16:48, 16:48, :3] = np.clip([luminance * 1.16, luminance * 0.95, luminance * 0.78], 0, 255)
    elif label in PEOPLE.values():
        pixels[16:48, 16:48, :3] = (255, 200, 50)
    return Image.fromarray(pixels, "RGBA")


def write(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The three archives in a folder, and their hashes in place of the real ones'."""
    folder.mkdir(parents=True, exist_ok=True)
    contents: dict[str, Mapping[str, bytes]] = {
        vendor: {f"{archives.ARCHIVES[vendor].inside}{name}": png for name, png in _drawings(vendor).items()}
        for vendor in archives.VENDORS
    }
    contents["names"] = {archives.ARCHIVES["names"].inside: json.dumps(entries()).encode()}
    for name, files in contents.items():
        archive = archives.ARCHIVES[name]
        path = _tar(folder / archive.file, files)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        monkeypatch.setitem(archives.ARCHIVES, name, archive._replace(sha256=digest))
    return folder


def _drawings(vendor: str) -> dict[str, bytes]:
    files = {}
    for entry in entries():
        label = "flag: Norway" if entry["hexcode"] in REPEATED else entry["label"]
        for each in (entry, *entry.get("skins", ())):
            buffer = io.BytesIO()
            picture(vendor, label, each.get("tone", 0)).save(buffer, "PNG")
            files[f"{each['hexcode'].lower()}.png"] = buffer.getvalue()
    return files


def _tar(path: Path, files: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in {"package/package.json": b"{}", **files}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path
