"""Weights of many models as a few archives, for machines that send back few files: written there, taken here."""

import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from trainings import LAST, Model

from sana_lab.checkpoints import weights
from sana_lab.config.atomic_write import replacing

ARCHIVES, ARCHIVE_MIB, ALL_MIB = 7, 15.0, 63.0  # most archives, the size of one and of all


def pack(models: Sequence[Model], out: Path, folder: Path) -> list[str]:
    """Write results.jsonl and archives of the weights, first seeds first; lines that name what has no room."""
    folder.mkdir(parents=True, exist_ok=True)
    copied(out / "results.jsonl", folder / "results.jsonl")
    ordered = sorted(models, key=lambda model: (model.priority >= LAST, model.seed))
    paths = [path for model in ordered if (path := out / f"{model.hash}.safetensors").is_file()]
    groups, without_room = _groups(paths)
    for number, group in enumerate(groups):
        with tarfile.open(folder / f"weights-{number}.tar", "w") as archive:
            for path in group:
                archive.add(path, path.name)
    names = {model.hash: model.name for model in models}
    return [f"no room for {names[path.stem]}: {path}" for path in without_room]


def _groups(paths: Sequence[Path]) -> tuple[list[list[Path]], list[Path]]:
    """Files by archive, each in the first that has room, and those that fit into none."""
    sizes, groups, without_room = [0.0] * ARCHIVES, [list[Path]() for _ in range(ARCHIVES)], list[Path]()
    for path in paths:
        size = path.stat().st_size / 2**20 + 0.01
        place = next((i for i, used in enumerate(sizes) if used + size <= ARCHIVE_MIB), None)
        if place is None or sum(sizes) + size > ALL_MIB:
            without_room.append(path)
        else:
            sizes[place] += size
            groups[place].append(path)
    return [group for group in groups if group], without_room


def take(folder: Path) -> int:
    """Move the weights of archives to runs/models/HASH, where they are found as trained here; present ones stay."""
    with tempfile.TemporaryDirectory() as unpacked:
        for path in sorted(folder.glob("weights-*.tar")):
            with tarfile.open(path) as archive:
                archive.extractall(unpacked, filter="data")
        files = sorted([*Path(unpacked).glob("*.safetensors"), *folder.glob("*.safetensors")])
        for path in files:
            target = weights.HOME / "models" / path.stem / "weights.safetensors"
            present = target.is_file()
            print(f"{'present already' if present else 'taken'}: {target}, {weights.card(path)['experiment']}")
            if not present:
                copied(path, target)
    print(f"{len(files)} models")
    return 0 if files else 1


def copied(source: Path, target: Path) -> Path:
    with replacing(target) as partial:
        partial.write_bytes(source.read_bytes())
    return target
