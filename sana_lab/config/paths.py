"""Checks that results can be written, before the work that computes them."""

import tempfile
from pathlib import Path


def check_file(path: Path | None) -> None:
    """ValueError if a file cannot be written; None is no file. An existing file is not changed."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder, expected a file, such as {path / 'results.json'}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"cannot write {path}: there is no folder {path.absolute().parent}")
    new = not path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from error
    if new:
        path.unlink()


def check_folder(path: Path) -> None:
    """Create a folder. ValueError if it cannot be written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()  # of a name that no file has
    except OSError as error:
        raise ValueError(
            f"cannot write to {path.absolute()}: {error.strerror}; expected a folder that you can write"
        ) from error
