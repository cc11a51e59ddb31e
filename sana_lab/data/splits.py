"""Which items are held out: by the manifest's own split, or by a hash of each group, which is never divided."""

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

CODES = {"": 0, "train": 1, "val": 2}
"""Split of a manifest as a number."""


def share(name: str) -> float:
    """A number in [0, 1) that depends on the name alone, so that new items do not change the split of others."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7]) / 2**56


def shares(names: Iterable[str]) -> NDArray[np.float64]:
    """The share of each name."""
    return np.array([share(name) for name in names])


def codes(entries: Iterable[Any]) -> NDArray[np.uint8]:
    """The code of each entry's `split`."""
    return np.array([CODES[entry.split] for entry in entries], np.uint8)


def check_held_out(held_out: int | float, where: str = "") -> None:
    """ValueError for a share that leaves nothing to train on; `where` begins its message."""
    if isinstance(held_out, float) and held_out >= 1:
        raise ValueError(f"{where}held_out is {held_out}; expected a share below 1.0 or a number of pictures")


def held_out(
    shares: NDArray[np.float64],
    codes: NDArray[np.uint8],
    held_out: int | float,
    name: Callable[[int], str],
    groups: bool = True,
) -> NDArray[np.bool_]:
    """Mask (N,) of the items that are held out.

    Items with a split keep it, and their whole group with them. Of the others those whose share is below `held_out`
    are, or so many with the least shares; fewer where a group would be divided. Of two items or more at least one is
    in each part. Without `groups` no two items are of one group. ValueError for a number or share that leaves none to
    train on, or a group with both splits, in which `name` names an item.
    """
    check_held_out(held_out)
    code = _group_codes(shares, codes, name) if groups and codes.any() else codes
    mask, free = code == CODES["val"], code == 0
    if free.any():
        mask[free] = _by_share(shares[free], held_out, any_train=bool((code == 1).any()), any_val=bool(mask.any()))
    return mask


def _group_codes(
    shares: NDArray[np.float64], codes: NDArray[np.uint8], name: Callable[[int], str]
) -> NDArray[np.uint8]:
    """The split of each item's group."""
    groups, inverse = np.unique(shares, return_inverse=True)
    code = np.zeros(len(groups), np.uint8)
    np.maximum.at(code, inverse, codes)
    both = (codes > 0) & (codes != code[inverse])
    if both.any():
        raise ValueError(f"the group of {name(int(np.flatnonzero(both)[0]))!r} has items of train and of val")
    return code[inverse]


def _by_share(shares: NDArray[np.float64], held_out: int | float, any_train: bool, any_val: bool) -> NDArray[np.bool_]:
    most = len(shares) - (not any_train)
    if isinstance(held_out, int) and held_out > most:
        raise ValueError(f"held_out is {held_out} of {len(shares)} pictures; at most {most} leave one to train on")
    below = shares < held_out if isinstance(held_out, float) else None
    if below is not None and int(held_out > 0 and not any_val) <= below.sum() <= most:
        return below
    count = held_out if isinstance(held_out, int) else int((shares < held_out).sum())
    count = min(max(count, int(held_out > 0 and not any_val)), most)
    order = np.sort(shares)
    if 0 < count < len(order) and order[count - 1] == order[count]:
        begin, end = np.searchsorted(order, order[count], "left"), np.searchsorted(order, order[count], "right")
        count = int(begin) or int(end if end <= most else 0)
    return np.zeros(len(shares), bool) if not count else shares <= order[count - 1]
