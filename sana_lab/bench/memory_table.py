"""The table of `bench --memory`: memory of sampling by component and stage."""

import json
from pathlib import Path

from sana_lab.bench.memory import GIB, Counter, Peaks, Way
from sana_lab.bench.memory_advice import _shape_of, quarter
from sana_lab.bench.record import STAGES
from sana_lab.bench.stages import COMPONENT
from sana_lab.config import experiments
from sana_lab.config.paths import check_file
from sana_lab.costs.flops import parameters
from sana_lab.diffusion.sampling import Sampling
from sana_lab.systems.text2image import TextToImage
from sana_lab.types import Json

CARDS = (8, 16)
"""GiB of memory of the cards that a table is about."""

OTHERS = 1.0
"""GiB left to CUDA's context, libraries' workspaces and what the allocator cannot use again: an allowance, not a number
that was measured."""

NOTES = (
    "computed, not measured on a GPU: bytes of live tensors, operator by operator, on the meta device; not the "
    "workspace inside an operator; kernels that fuse what is plain torch here hold less",
    "prompts as long as the text encoder reads, guidance in one batched forward; decoded to 8-bit images",
    "weights: of the autoencoder, encoder included; with offload each stage has its own network alone",
    f"room: what a card has left, {OTHERS:g} GiB set aside for CUDA's context, workspaces and the allocator",
)


def main(experiment: Json, *, size: int | None, batch: int, json_file: Path | None) -> None:
    """`sana-lab bench EXPERIMENT --memory`: print the table, and write it to `json_file`."""
    check_file(json_file)
    record = computed(experiment, size, batch)
    print(table(record))
    if json_file is not None:
        json_file.write_text(json.dumps(record, indent=2) + "\n")


def computed(experiment: Json, size: int | None = None, batch: int = 1) -> Json:
    """The memory of drawing by a resolved experiment's system, in the dtype that it has on a GPU, as plain data."""
    system = _shape_of(experiment)
    size = size or experiments.image_size(experiment["data"])
    counter = Counter(system, size, batch, Sampling(**experiment["sampling"]).guidance != 1)
    ways, missing = _ways(counter)
    return {
        "size": size,
        "batch": batch,
        "dtype": str(next(system.dit.parameters()).dtype).removeprefix("torch."),
        "components": _components(system, ways),
        "ways": {name: _row(peaks) for name, peaks in ways.items()},
        "notes": [*NOTES, *missing],
    }


def table(record: Json) -> str:
    """The record for a reader, in GiB."""
    title = "{0}x{0} pixels, batch {1}, {2}; GiB; computed, not measured on a GPU".format(
        *(record[k] for k in ("size", "batch", "dtype"))
    )
    parts = [f"{'component':<14}{'params M':>10}" + "".join(f"{k:>10}" for k in ("weights", "int8", "w8a8"))]
    for name, one in record["components"].items():
        weights = "".join(f"{_gib(one.get(k)):>10}" for k in ("weights", "int8", "w8a8"))
        parts.append(f"{name:<14}{one['params_m']:>10.1f}{weights}")
    head = f"{'way':<34}" + "".join(f"{k:>9}" for k in (*STAGES, "peak")) + "".join(f"{f'of {c}':>9}" for c in CARDS)
    rows = [f"{name:<34}" + "".join(f"{_gib(v):>9}" for v in _shown(way)) for name, way in record["ways"].items()]
    return "\n".join([title, *parts, head, *rows, *(f"- {note}" for note in record["notes"])])


def _shown(way: Json) -> list[float]:
    return [*(way[stage] for stage in STAGES), way["peak"], *(way["room"][str(card)] for card in CARDS)]


def _gib(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _ways(counter: Counter) -> tuple[dict[str, Peaks], list[str]]:
    """Each saving on top of the one before, and W8A8 in place of int8; without torchao those that need none."""
    tile = quarter(counter)
    ways = {
        "all on the device": Way(),
        "+ offload": Way(offload=True),
        f"+ tiled decode, tile={tile}": Way(offload=True, tile=tile),
        "+ int8": Way("int8", True, tile),
        "+ w8a8 in its place": Way("w8a8", True, tile),
        f"tile={tile} alone": Way(tile=tile),
        "int8 alone": Way("int8"),
        f"int8, tile={tile}, no offload": Way("int8", tile=tile),
    }
    found, missing = {}, []
    for name, way in ways.items():
        try:
            found[name] = counter.peaks(way)
        except ImportError as error:
            missing = [f"left out: {error}"]
    return found, missing


def _components(system: TextToImage, ways: dict[str, Peaks]) -> Json:
    plain = ways["all on the device"].weights
    rounded = {"int8": "+ int8", "w8a8": "+ w8a8 in its place"}
    found: Json = {
        name: {"params_m": parameters(getattr(system, name))["total"] / 1e6, "weights": plain[name] / GIB}
        for name in COMPONENT.values()
    }
    found["dit"] |= {how: ways[row].weights["dit"] / GIB for how, row in rounded.items() if row in ways}
    return found


def _row(peaks: Peaks) -> Json:
    return {
        **{stage: peaks.stage(stage) / GIB for stage in STAGES},
        "peak": peaks.total / GIB,
        "work": {stage: held / GIB for stage, held in peaks.work.items()},
        "room": {str(card): card - OTHERS - peaks.total / GIB for card in CARDS},
    }
