"""State dicts as people save them: nested in a checkpoint, wrapped by DDP, FSDP or torch.compile, averaged or raw.

A state dict is recognised by tensors that the model must have (`anchors`), below whatever prefix they are.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from sana_lab.checkpoints.files import LazyTensors
from sana_lab.config.validation import SpecError

State = Mapping[str, Tensor]

WRAPPERS = frozenset(
    ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "_flat_param")
)
"""Segments that DistributedDataParallel, torch.compile, FSDP, DeepSpeed and AveragedModel put into names."""

AVERAGED = re.compile(r"(^|_)(ema|swa|avg|average|averaged|shadow)(_|$|\d)|^shadow_params$", re.IGNORECASE)
"""A key or prefix of averaged weights: ema, model_ema, ema_model, state_dict_ema, shadow_params, average ..."""

TRAINING = re.compile(r"optim|sched|rng|scaler|callback|loop", re.IGNORECASE)
"""Entries of a checkpoint that hold tensors of the training, not of a model."""

DEPTH = 6  # mappings inside each other that are looked through


class ChosenState(NamedTuple):
    """One state dict of a checkpoint."""

    tensors: State
    name: str  # which one, for the reader
    ignored: tuple[str, ...]  # the checkpoint's other entries


class RenamedTensors(Mapping[str, Tensor]):
    """A state dict under other names, its tensors read when they are accessed."""

    def __init__(self, state: State, names: Mapping[str, str]) -> None:
        self.state, self.names = state, names  # new name -> old name

    def __getitem__(self, name: str) -> Tensor:
        return self.state[self.names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class _Candidate(NamedTuple):
    path: tuple[str, ...]  # keys of the checkpoint that lead to it
    prefix: str  # of its tensors' names there
    tensors: State

    @property
    def is_averaged(self) -> bool:
        return any(AVERAGED.search(word) for word in (*self.path, *self.prefix.split(".")))

    @property
    def title(self) -> str:
        return ".".join(filter(None, (*self.path, self.prefix.rstrip("."))))


def unwrapped(name: str) -> str:
    """A tensor's name without the segments of wrappers, wherever they are."""
    return ".".join(segment for segment in name.split(".") if segment not in WRAPPERS)


def choose(checkpoint: Any, anchors: Collection[str], ema: bool | None, source: str) -> ChosenState | None:
    """The averaged state dict that has the anchors, if there is one; the raw one if not, or where `ema` is false.

    Buffers that an average lacks are the raw state's. None if no state dict has all anchors. SpecError if there
    are several, or not the one that `ema` wants.
    """
    candidates = _candidates(checkpoint, anchors)
    raw = [c for c in candidates if not c.is_averaged]
    averaged = [c for c in candidates if c.is_averaged] or _averages_by_order(checkpoint, raw, source)
    if not candidates:
        return None
    if ema and not averaged:
        entries = ", ".join(map(str, checkpoint))[:200]
        raise SpecError(f"{source} holds no state_dict_ema or other average, only {entries}; expected ema=False")
    if ema is False and not raw:
        raise SpecError(f"{source} has only averaged weights, {averaged[0].title}; expected them, without --raw")
    chosen = _only(averaged if averaged and ema is not False else raw, source)
    tensors = chosen.tensors
    if chosen.is_averaged and raw:
        base = _only(raw, source).tensors
        if missing := [name for name in base if name not in tensors]:
            tensors = {**{name: tensors[name] for name in tensors}, **{name: base[name] for name in missing}}
    if not chosen.title:
        return ChosenState(tensors, "the file's only state", _others(checkpoint, ()))
    what = "averaged" if chosen.is_averaged else "raw"
    return ChosenState(tensors, f"{chosen.title}, the {what} weights", _others(checkpoint, chosen.path))


def select(state: Any, expected: Collection[str], source: str, ema: bool | None = None) -> State:
    """The tensors of a model with the names `expected`, without any prefix and wrappers; else `state` itself."""
    names = list(expected)
    if not isinstance(state, Mapping) or not names or (len(state) == len(names) and all(n in state for n in names)):
        return state
    anchors = (names[0], names[len(names) // 2], names[-1])
    for group in (anchors, *((anchor,) for anchor in anchors)):  # one alone where the others are what is missing
        if chosen := choose(state, group, ema, source):
            return chosen.tensors
    return state


def _candidates(checkpoint: Any, anchors: Collection[str]) -> list[_Candidate]:
    return [
        candidate
        for path, state in _states(checkpoint, ())
        for candidate in (*_by_prefix(path, state, anchors), *_without_dots(path, state, anchors))
    ]


def _states(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], State]]:
    """Every mapping with tensors in it, and the keys that lead there."""
    if isinstance(value, LazyTensors | RenamedTensors):
        yield path, value
    elif isinstance(value, Mapping) and len(path) <= DEPTH:
        if tensors := {k: v for k, v in value.items() if isinstance(v, Tensor) and isinstance(k, str)}:
            yield path, tensors
        for key, inner in value.items():
            if isinstance(key, str) and isinstance(inner, Mapping) and not TRAINING.search(key):
                yield from _states(inner, (*path, key))


def _by_prefix(path: tuple[str, ...], state: State, anchors: Collection[str]) -> Iterator[_Candidate]:
    """A candidate for each prefix below which all anchors are."""
    names = {unwrapped(name): name for name in state if isinstance(name, str)}
    first = next(iter(anchors))
    prefixes = [name[: -len(first)] for name in names if name == first or name.endswith(f".{first}")]
    for prefix in prefixes:
        if all(f"{prefix}{anchor}" in names for anchor in anchors):
            inner = {name.removeprefix(prefix): old for name, old in names.items() if name.startswith(prefix)}
            if not prefix:  # a model beside others, such as its average under a prefix of its own
                inner = {new: old for new, old in inner.items() if not AVERAGED.search(new.split(".")[0])}
                inner.pop("n_averaged", None)
            same = all(new == old for new, old in inner.items()) and len(inner) == len(state)
            yield _Candidate(path, prefix, state if same else RenamedTensors(state, inner))


def _without_dots(path: tuple[str, ...], state: State, anchors: Collection[str]) -> Iterator[_Candidate]:
    """Averages as latent-diffusion's LitEma keeps them, `model_ema.` and the raw name without its dots."""
    groups: dict[str, dict[str, str]] = {}
    for name in state:
        head, dot, rest = name.rpartition(".")
        if dot and AVERAGED.search(head.split(".")[-1]):
            groups.setdefault(head, {})[rest] = name
    for head, names in groups.items():
        for raw in _by_prefix(path, {k: state[k] for k in state if not k.startswith(f"{head}.")}, anchors):
            owners = ["".join(raw.prefix.split(".")[i:]) for i in range(raw.prefix.count(".") + 1)]
            keys = {name: [f"{owner}{name}".replace(".", "") for owner in owners] for name in raw.tensors}
            inner = {name: names[key] for name, options in keys.items() for key in options if key in names}
            if all(anchor in inner for anchor in anchors):
                yield _Candidate(path, f"{head}.", RenamedTensors(state, inner))


def _averages_by_order(checkpoint: Any, raw: list[_Candidate], source: str) -> list[_Candidate]:
    """An average that is a list in the order of the parameters (`shadow_params`), under the raw state's names."""
    lists = list(_tensor_lists(checkpoint, ()))
    if not lists or not raw:
        return []
    path, values = lists[0]
    owner = _only(raw, source)
    names = [name for name, tensor in owner.tensors.items() if tensor.is_floating_point()]
    if len(names) > len(values):  # buffers have no average
        names = _in_order(owner.tensors, names, values)
    shapes = [tuple(owner.tensors[name].shape) for name in names]
    if shapes != [tuple(value.shape) for value in values]:
        raise SpecError(
            f"{source}: {'.'.join(path)} has {len(values)} tensors in an order that is not that of the raw weights' "
            f"{len(names)}; expected the raw ones: ema=False, --raw"
        )
    return [_Candidate(path, "", dict(zip(names, values, strict=True)))]


def _in_order(state: State, names: list[str], values: list[Tensor]) -> list[str]:
    """The names, buffers left out, whose shapes follow each other as the values' do."""
    kept, rest = [], iter(names)
    for value in values:
        kept += [next((name for name in rest if state[name].shape == value.shape), "")]
    return [name for name in kept if name]


def _tensor_lists(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], list[Tensor]]]:
    if isinstance(value, LazyTensors | RenamedTensors) or not isinstance(value, Mapping) or len(path) > DEPTH:
        return
    for key, inner in value.items():
        if not isinstance(key, str) or TRAINING.search(key):
            continue
        is_list = isinstance(inner, list | tuple) and inner and all(isinstance(v, Tensor) for v in inner)
        if is_list and any(AVERAGED.search(word) for word in (*path, key)):
            yield (*path, key), list(inner)
        yield from _tensor_lists(inner, (*path, key))


def _only(candidates: list[_Candidate], source: str) -> _Candidate:
    """The one candidate, or of several the one nearest to the top. SpecError if two are equally near."""
    near = sorted(candidates, key=lambda c: (len(c.path), c.prefix.count(".")))
    level = [c for c in near if (len(c.path), c.prefix.count(".")) == (len(near[0].path), near[0].prefix.count("."))]
    if len(level) > 1:
        titles = ", ".join(c.title for c in level)
        raise SpecError(f"{source} holds several models, {titles}; expected a file with one of them")
    return level[0]


def _others(checkpoint: Any, path: tuple[str, ...]) -> tuple[str, ...]:
    """The checkpoint's other entries that hold something."""
    if isinstance(checkpoint, LazyTensors | RenamedTensors) or not isinstance(checkpoint, Mapping):
        return ()
    skipped = (lambda k: k == path[0]) if path else (lambda k: isinstance(checkpoint[k], Tensor))
    return tuple(str(k) for k, v in checkpoint.items() if not skipped(k) and (isinstance(v, Tensor) or v))
