"""`data: latents`: any other data, its images encoded once by a frozen autoencoder and kept on disk."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import lightning as L
import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from sana_lab.data.stream import Endless, Finite, Order, turn
from sana_lab.parts import RUNTIME, Spec, SpecError, build, canonical
from sana_lab.types import Batch

Split = Literal["train", "val"]
SHARD = 2048


class Latents(L.LightningDataModule):
    """Normalised latents (B, C, h, w) of `items` training images of `source` (all of a finite one), with `captions` texts each.

    The cache is named by what made it (source and its content, autoencoder and its weights, items), so nothing stale is
    ever read; shards are written whole, so a killed run goes on at the first one that is missing. Batch s is a function of
    (seed, s); an item's captions take turns from epoch to epoch.
    """

    def __init__(
        self,
        source: Annotated[Spec, "data"],
        autoencoder: Annotated[Spec, "autoencoder"],
        items: int | None = None,
        held_out: int = 256,
        captions: int = 4,
        batch: int = 64,
        seed: int = 0,
        cache: Annotated[str, RUNTIME] = "runs/latents",
    ) -> None:
        super().__init__()
        self.source = build("data", source)
        self.autoencoder, self.specs = autoencoder, (canonical("data", source), canonical("autoencoder", autoencoder))
        self.items, self.held_out, self.captions, self.batch, self.seed = items, held_out, captions, batch, seed
        self.cache = Path(cache)
        self._latents: dict[Split, Tensor] = {}
        self._texts: dict[Split, list[list[str]]] = {}

    @property
    def len_train(self) -> int:
        finite: int | None = getattr(self.source, "len_train", None)
        if finite is None and self.items is None:
            raise SpecError("data 'latents' needs 'items' (int): its source is endless")
        return min(n for n in (self.items, finite) if n is not None)

    @property
    def len_val(self) -> int:
        return min(self.held_out, self.source.len_val)

    def digest(self) -> str:
        return str(self.source.digest())

    def setup(self, stage: str | None = None) -> None:
        """Encode what is missing, then read it. A second process waits for the first."""
        self.source.setup(stage)
        self.cache.mkdir(parents=True, exist_ok=True)
        encoder: torch.nn.Module = build("autoencoder", self.autoencoder).requires_grad_(False).eval()
        for split, n in (("train", self.len_train), ("val", self.len_val)):
            folder = self.cache / self._name(encoder, split, n)
            with FileLock(self.cache / f"{folder.name}.lock"):
                shards = [self._shard(folder, split, range(i, min(i + SHARD, n)), encoder) for i in range(0, n, SHARD)]
            self._latents[split] = torch.cat([latents for latents, _ in shards])
            self._texts[split] = [texts for _, rows in shards for texts in rows]

    def batch_at(self, indices: Sequence[int], split: Split = "train", draw: int = 0) -> Batch:
        """The latents of these items, each with the caption whose turn it is."""
        return self._batch(split, [(i, draw) for i in indices])

    def train_dataloader(self) -> Endless:
        order = Order(self.len_train, self.seed)
        return Endless(lambda n: self._batch("train", order.at(range(n * self.batch, (n + 1) * self.batch))), self.trainer)

    def val_dataloader(self) -> Finite:
        return Finite(lambda rows: self.batch_at(rows, "val"), self.len_val, self.batch, self.trainer)

    def _batch(self, split: Split, turns: Sequence[tuple[int, int]]) -> Batch:
        texts = self._texts[split]
        prompts = [texts[i][turn(len(texts[i]), draw, self.seed, i)] for i, draw in turns]
        return Batch(None, prompts, self._latents[split][[i for i, _ in turns]])

    def _name(self, encoder: torch.nn.Module, split: Split, n: int) -> str:
        facts = [*self.specs, self.digest(), state_digest(encoder), split, n, self.captions]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def _shard(self, folder: Path, split: Split, rows: range, encoder: torch.nn.Module) -> tuple[Tensor, list[list[str]]]:
        """A shard's latents and captions, read or made."""
        path = folder / f"{rows.start:08d}.safetensors"
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            latents = self._encode(split, rows, encoder)
            texts = [self.source.prompts_at(rows, split, draw) for draw in range(self.captions)]
            draft = path.with_suffix(".partial")
            save_file({"latents": latents}, draft, {"captions": json.dumps([list(t) for t in zip(*texts, strict=True)])})
            draft.replace(path)
        with safe_open(path, "pt") as file:
            return file.get_tensor("latents"), json.loads(file.metadata()["captions"])

    @torch.no_grad()
    def _encode(self, split: Split, rows: range, encoder: torch.nn.Module) -> Tensor:
        device = self.trainer.strategy.root_device if self.trainer is not None else torch.device("cpu")
        encoder.to(device)
        chunks = [rows[i : i + 64] for i in range(0, len(rows), 64)]
        found = [encoder.encode(self.source.batch_at(c, split).images.to(device)).cpu() for c in tqdm(chunks, "latents", leave=False, disable=None)]
        return torch.cat(found)


def state_digest(module: torch.nn.Module) -> str:
    """A hash of a module's weights."""
    total = hashlib.sha256()
    for key, value in module.state_dict().items():
        total.update(key.encode() + value.detach().cpu().contiguous().float().numpy().tobytes())
    return total.hexdigest()[:16]
