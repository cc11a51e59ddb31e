"""`sana-lab bench --memory`: the computed memory of sampling by component, stage and options."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from sana_lab.bench.memory import GIB, MemoryCounter, MemoryOptions, PeakMemory, meta_system
from sana_lab.bench.record import COMPONENTS, STAGES
from sana_lab.config import experiments
from sana_lab.config.atomic_write import write_text
from sana_lab.config.paths import check_file
from sana_lab.costs.flops import count_parameters
from sana_lab.diffusion.guidance import reads_null
from sana_lab.diffusion.sampling import Sampling
from sana_lab.types import Json

if TYPE_CHECKING:
    from sana_lab.systems.text2image import TextToImage

CARDS_GIB = (8, 16)
"""Memory of the GPUs in the table, in GiB."""

RESERVED_GIB = 1.0
"""Allowance for CUDA's context, libraries' workspaces and the allocator's fragmentation; not measured."""

NOTES = (
    "computed, not measured on a GPU: bytes of live tensors, operator by operator, on the meta device; without the "
    "workspace inside an operator; kernels that fuse what is plain torch here need less",
    "prompts of the text encoder's maximum length, guidance in one batched forward, decoded to 8-bit images",
    "weights of the autoencoder include its encoder; with offload each stage holds its own network alone",
    f"free: what a card has left, with {RESERVED_GIB:g} GiB set aside for CUDA's context, workspaces and the allocator",
)


def main(experiment: Json, *, size: int | None, batch: int, json_file: Path | None) -> None:
    """`sana-lab bench EXPERIMENT --memory`: print the table, and write the record to `json_file`."""
    check_file(json_file)
    record = memory_record(experiment, size, batch)
    print(table(record))
    if json_file is not None:
        write_text(json_file, json.dumps(record, indent=2) + "\n")


def memory_record(experiment: Json, size: int | None = None, batch: int = 1) -> Json:
    """Memory of sampling by a resolved experiment's system, in GiB and in its dtype on a GPU, as plain data."""
    system = meta_system(experiment)
    size = size or experiments.image_size(experiment["data"])
    counter = MemoryCounter(system, size, batch, reads_null(system.dit, Sampling(**experiment["sampling"]).guidance))
    peaks, missing = _peaks(counter)
    return {
        "size": size,
        "batch": batch,
        "dtype": str(next(system.dit.parameters()).dtype).removeprefix("torch."),
        "components": _components(system, peaks),
        "configurations": {name: _row(peak) for name, peak in peaks.items()},
        "notes": [*NOTES, *missing],
    }


def table(record: Json) -> str:
    """The record as text, in GiB."""
    title = "{0}x{0} pixels, batch {1}, {2}; GiB; computed, not measured on a GPU".format(
        *(record[k] for k in ("size", "batch", "dtype"))
    )
    lines = [f"{'component':<14}{'params M':>10}" + "".join(f"{k:>10}" for k in ("weights", "int8", "w8a8"))]
    for name, one in record["components"].items():
        weights = "".join(f"{_gib(one.get(k)):>10}" for k in ("weights", "int8", "w8a8"))
        lines.append(f"{name:<14}{one['params_m']:>10.1f}{weights}")
    cards = "".join(f"{f'of {c}':>9}" for c in CARDS_GIB)
    lines.append(f"{'configuration':<34}" + "".join(f"{k:>9}" for k in (*STAGES, "peak")) + cards)
    for name, row in record["configurations"].items():
        lines.append(f"{name:<34}" + "".join(f"{_gib(v):>9}" for v in _columns(row)))
    return "\n".join([title, *lines, *(f"- {note}" for note in record["notes"])])


def _columns(row: Json) -> list[float]:
    return [*(row[stage] for stage in STAGES), row["peak"], *(row["free"][str(card)] for card in CARDS_GIB)]


def _gib(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _peaks(counter: MemoryCounter) -> tuple[dict[str, PeakMemory], list[str]]:
    """Peak by configuration, and a note if torchao is missing, in which case 8-bit configurations are omitted.

    Each "+" adds to the configuration before it; W8A8 replaces int8.
    """
    tile = counter.default_tile
    configurations = {
        "all on the device": MemoryOptions(),
        "+ offload": MemoryOptions(offload=True),
        f"+ tiled decode, tile={tile}": MemoryOptions(offload=True, tile=tile),
        "+ int8": MemoryOptions("int8", True, tile),
        "w8a8 instead of int8": MemoryOptions("w8a8", True, tile),
        f"tile={tile} alone": MemoryOptions(tile=tile),
        "int8 alone": MemoryOptions("int8"),
        f"int8, tile={tile}, no offload": MemoryOptions("int8", tile=tile),
    }
    peaks, missing = {}, []
    for name, options in configurations.items():
        try:
            peaks[name] = counter.peak(options)
        except ImportError as error:
            missing = [f"left out: {error}"]
    return peaks, missing


def _components(system: "TextToImage", peaks: dict[str, PeakMemory]) -> Json:
    weights = peaks["all on the device"].weights
    components: Json = {
        name: {"params_m": count_parameters(getattr(system, name))["total"] / 1e6, "weights": weights[name] / GIB}
        for name in COMPONENTS.values()
    }
    eight_bit = {"int8": "+ int8", "w8a8": "w8a8 instead of int8"}
    components["dit"] |= {k: peaks[name].weights["dit"] / GIB for k, name in eight_bit.items() if name in peaks}
    return components


def _row(peak: PeakMemory) -> Json:
    return {
        **{stage: peak.stage(stage) / GIB for stage in STAGES},
        "peak": peak.total / GIB,
        "activations": {stage: value / GIB for stage, value in peak.activations.items()},
        "free": {str(card): card - RESERVED_GIB - peak.total / GIB for card in CARDS_GIB},
    }
