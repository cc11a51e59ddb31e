"""Rows of latents with captions in files that are written atomically, so that a crash leaves no partial files."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path

import torch
from filelock import AcquireReturnProxy, FileLock, Timeout
from rich.console import Console
from rich.progress import Progress
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sana_lab.config.atomic_write import DiskFull, replacing

Captions = tuple[str, ...]
Encode = Callable[[range], tuple[Tensor, list[Captions]]]
"""Row numbers -> their latents (n, C, h, w) and captions."""


class Shards:
    """`rows` rows in `folder`, `per_shard` in each pair of files: latents (.safetensors), captions (.jsonl).

    Row i depends on the fingerprint and not on the number of rows, so that a longer set extends a shorter one.
    """

    def __init__(self, folder: Path, split: str, rows: int, per_shard: int, fingerprint: str) -> None:
        self.folder, self.split, self.rows, self.per_shard = folder, split, rows, per_shard
        self.fingerprint = fingerprint
        self._open: dict[int, Tensor] = {}

    def fill(self, encode: Encode) -> None:
        """Encode shards that are missing, truncated or of another fingerprint; several processes share the work.

        ValueError if the folder cannot be written; DiskFull.
        """
        missing = [k for k in range(len(self)) if not self._fits(k)]
        if missing:
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
        with Progress(console=Console(stderr=True), disable=not missing) as bar:
            task = bar.add_task(f"encoding {self.split}", total=len(missing))
            for patient in (False, True):  # first shards that no process works on, then those abandoned by another
                missing = [k for k in missing if not self._make(k, encode, patient, partial(bar.advance, task))]

    def latents(self, rows: Sequence[int]) -> Tensor:
        """(B, C, h, w) in float32, read through a memory map."""
        return torch.stack([self.row(i) for i in rows]).float()

    def row(self, i: int) -> Tensor:
        """One row of the memory map, in its stored dtype."""
        return self._shard(i // self.per_shard)[i % self.per_shard]

    @cached_property
    def captions(self) -> list[Captions]:
        """Captions of every row."""
        texts = (self._path(k, "jsonl").read_text("utf-8") for k in range(len(self)))
        lines = [line for text in texts for line in text.rstrip("\n").split("\n")]
        return [tuple(json.loads(line)["captions"]) for line in lines[: self.rows]]

    def __len__(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.per_shard)

    def __getstate__(self) -> dict[str, object]:
        """Without the memory maps; a worker process opens its own."""
        return {**self.__dict__, "_open": {}}

    def _make(self, k: int, encode: Encode, patient: bool, advance: Callable[[], None]) -> bool:
        """Encode shard k; False if another process has its lock."""
        lock = self._claim(k, -1 if patient else 0)
        if lock is None:
            return False
        with lock:
            if not self._fits(k):
                self._write(k, *encode(self._range(k)))
        advance()
        return True

    def _claim(self, k: int, timeout: float) -> AcquireReturnProxy | None:
        with writing(self.folder):
            try:
                return FileLock(self._path(k, "lock")).acquire(timeout=timeout)
            except Timeout:
                return None

    def _range(self, k: int) -> range:
        return range(self.rows)[k * self.per_shard : (k + 1) * self.per_shard]

    def _path(self, k: int, suffix: str) -> Path:
        return self.folder / f"{self.split}-{k:05}.{suffix}"

    def _shard(self, k: int) -> Tensor:
        if k not in self._open:
            with safe_open(self._path(k, "safetensors"), "pt") as file:
                self._open[k] = file.get_tensor("latents")
        return self._open[k]

    def _fits(self, k: int) -> bool:
        """Whether both files of a shard are whole, belong together and have the fingerprint."""
        try:
            with safe_open(self._path(k, "safetensors"), "pt") as file:
                about, rows = file.metadata(), file.get_slice("latents").get_shape()[0]
            index = self._path(k, "jsonl").read_bytes()
        except (OSError, SafetensorError):
            return False
        expected = {"fingerprint": self.fingerprint, "index": hashlib.sha256(index).hexdigest()}
        return about == expected and rows >= len(self._range(k))

    def _write(self, k: int, latents: Tensor, captions: Iterable[Captions]) -> None:
        """Write the captions first: a shard is complete when its latents exist."""
        lines = (json.dumps({"captions": several}, ensure_ascii=False) + "\n" for several in captions)
        index = "".join(lines).encode()
        about = {"fingerprint": self.fingerprint, "index": hashlib.sha256(index).hexdigest()}
        with writing(self.folder):
            with replacing(self._path(k, "jsonl")) as partial:
                partial.write_bytes(index)
            with replacing(self._path(k, "safetensors")) as partial:
                save_file({"latents": latents.contiguous()}, partial, about)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """A context in which an OSError is a ValueError that names the folder; DiskFull as it is."""
    try:
        yield
    except DiskFull:
        raise
    except OSError as error:
        raise ValueError(f"cannot write to {str(folder)!r}: {error}; choose another place with `cache`") from error
