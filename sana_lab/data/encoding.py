"""Encoding of pictures and captions for `data: cached`, the items of one shard at a time."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sana_lab.data.images import UnreadableError
from sana_lab.data.pictures import Pictures
from sana_lab.data.ragged import Encoded
from sana_lab.models.autoencoders import Autoencoder
from sana_lab.models.text import TextEncoder

PIXELS = 2**22
"""Pictures are encoded about this many pixels at a time: 64 of 256 pixels, 4 of 1024."""

CAPTIONS = 32
"""Captions that are encoded at a time, sorted by length."""

THREADS = 4
"""Threads of a process that read and decode pictures."""


@torch.no_grad()
def latents(pictures: Pictures, autoencoder: Autoencoder, kind: torch.dtype, rows: range) -> Encoded:
    """Latents (C x h x w, 1) of these rows, in order; of length 0 where a picture cannot be read. SpecError where the
    root is missing, which says nothing about any picture."""
    pictures.check_root()
    device, encoded, faults = next(autoencoder.buffers()).device, dict[int, Tensor](), dict[str, str]()
    with ThreadPoolExecutor(THREADS) as pool:
        for group in _groups(pictures, rows):
            views = list(pool.map(lambda row: _view(pictures, row), group))
            faults |= {pictures.name_of(r): v for r, v in zip(group, views, strict=True) if isinstance(v, str)}
            good = {r: v for r, v in zip(group, views, strict=True) if not isinstance(v, str)}
            if good:
                pixels = torch.from_numpy(np.stack([*good.values()])).to(device).float().mul_(2 / 255).sub_(1)
                encoded |= dict(zip(good, autoencoder.encode(pixels).to(kind).cpu(), strict=True))
    if faults:
        pictures.check_root()
    flat = [encoded[row].reshape(-1, 1) if row in encoded else torch.empty(0, 1, dtype=kind) for row in rows]
    return Encoded(torch.cat(flat), [len(item) for item in flat], faults)


@torch.no_grad()
def features(encoder: TextEncoder, captions: Sequence[str], kind: torch.dtype) -> Encoded:
    """Features (T, D) of these captions, in order, without padding."""
    device = next(encoder.parameters()).device
    order = sorted(range(len(captions)), key=lambda i: len(captions[i]))
    encoded: dict[int, Tensor] = {}
    for first in range(0, len(order), CAPTIONS):
        group = order[first : first + CAPTIONS]
        text = encoder([captions[i] for i in group])
        tokens = text.tokens.to(kind)
        encoded |= {i: row[mask].cpu() for i, row, mask in zip(group, tokens, text.mask.to(device), strict=True)}
    items = [encoded[i] for i in range(len(captions))]
    return Encoded(torch.cat(items), [len(item) for item in items], {})


def _groups(pictures: Pictures, rows: range) -> Iterator[list[int]]:
    """Rows of one bucket, about PIXELS at a time."""
    buckets = pictures.buckets_of[rows.start : rows.stop]
    for bucket in np.unique(buckets):
        inside = (rows.start + np.flatnonzero(buckets == bucket)).tolist()
        height, width = pictures.shapes[int(bucket)]
        at_once = max(1, min(64, PIXELS // (height * width)))
        yield from (inside[first : first + at_once] for first in range(0, len(inside), at_once))


def _view(pictures: Pictures, row: int) -> NDArray[np.uint8] | str:
    """A picture as it is cached, or why it cannot be read."""
    try:
        return pictures.view(row, 0, "val", pictures.shapes[int(pictures.buckets_of[row])])
    except (UnreadableError, OSError, ValueError) as error:
        return str(error)
