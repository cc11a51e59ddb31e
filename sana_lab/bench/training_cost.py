"""The cost of a training before it begins: parameters, FLOPs, memory, disk, and time by a training that this machine
has done."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sana_lab import environment
from sana_lab.bench import stored_costs
from sana_lab.bench.training_memory import TrainingMemory, on_cpu, training_bytes, training_memory
from sana_lab.checkpoints import weights
from sana_lab.checkpoints.build import build_on_meta
from sana_lab.checkpoints.meta import on_meta
from sana_lab.config import experiments
from sana_lab.config.memo import reuse
from sana_lab.config.schema import Config
from sana_lab.config.specs import SpecError
from sana_lab.costs.flops import CAPTION_TOKENS, count_macs
from sana_lab.costs.fused_attention import fused_attention
from sana_lab.costs.live_memory import LiveBytes, tensor_bytes
from sana_lab.costs.too_large import GIB
from sana_lab.types import Text

GRADIENTS = WEIGHTS = 4
"""Bytes per trained parameter of the gradients, which no checkpoint holds, and of a weights file."""

SAME = ("device", "cpu", "cores")
"""Entries of a card's environment that make a machine."""


class TrainingCost(NamedTuple):
    """The cost of one training, on each of its devices."""

    parameters: int
    trainable: int
    flops: float  # of an optimiser step: forward and backward of what trains, without frozen encoders, on a device
    stages: TrainingMemory  # bytes, computed
    batch: int  # images at a time on a device
    checkpoint: int  # bytes of a checkpoint: weights, average and state of the optimiser
    steps: int
    seconds: float | None  # a step; None if this machine has trained nothing comparable
    origin: str  # what the time is taken from
    devices: int = 1

    def lines(self) -> list[str]:
        """The cost in words."""
        step = "" if self.seconds is None else f", {self.seconds:.3g} s a step, {self.hours:.2g} h"
        return [
            f"parameters {self.parameters / 1e6:.1f} M, trained {self.trainable / 1e6:.1f} M; {self.flops / 1e9:,.3g} "
            f"GFLOPs a step without frozen encoders; memory {self.memory / GIB:.2f} GiB, computed, on each of "
            f"{_devices(self.devices)}; disk {self.disk / GIB:.2f} GiB",
            f"{self.steps:,} steps{step} ({self.origin})",
            f"memory in GiB: {self.stages.line()}",
        ]

    @property
    def memory(self) -> int:
        """Bytes at the peak."""
        return self.stages.peak

    @property
    def disk(self) -> int:
        """Bytes of two checkpoints, as one is written before the last is removed, and of the weights."""
        return 2 * self.checkpoint + WEIGHTS * self.trainable

    @property
    def fixed(self) -> int:
        """Of these, what does not depend on the batch."""
        return self.stages.fixed

    @property
    def hours(self) -> float:
        """Of the whole training; 0 if unknown."""
        return self.steps * (self.seconds or 0.0) / 3600


def training_cost(experiment: Config, devices: int = 1) -> TrainingCost:
    """The cost of a resolved experiment's training. SpecError for a system without a DiT that is no autoencoder."""
    system = _system(experiment["system"])
    trainer = experiment["trainer"]
    batch = _share(experiment["data"], devices)
    macs, activations = _step(system, experiment, batch)
    parameters = sum(p.numel() for p in system.parameters())
    trainable = sum(p.numel() for p in system.parameters() if p.requires_grad)
    stages = training_memory(experiment, system, batch, activations, devices)
    flops = 2.0 * macs * trainer["accumulate"]
    seconds, origin = _step_time(experiment, flops, devices)
    checkpoint = (training_bytes(experiment["system"]) - GRADIENTS) * trainable
    return TrainingCost(
        parameters, trainable, flops, stages, batch, checkpoint, trainer["max_steps"], seconds, origin, devices
    )


def step_flops(experiment: Config) -> float:
    """FLOPs of an optimiser step: forward and backward of what trains, on all devices. SpecError."""
    system = _system(experiment["system"])
    batch = experiment["data"].get("batch") or 1
    return 2.0 * _step(system, experiment, batch)[0] * experiment["trainer"]["accumulate"]


def _system(spec: Config) -> Any:
    """A system on the meta device as it trains: with its adapter, if it has one."""
    return reuse(("cost system", spec), lambda: _adapted(spec))


def _adapted(spec: Config) -> Any:
    system: Any = build_on_meta("system", spec)
    if system.adapter is not None:
        with on_meta():
            system.adapt()
    return system


def _trained_names(network: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, p in network.named_parameters() if p.requires_grad)


def _step(system: Any, experiment: Config, batch: int) -> tuple[int, int]:
    """MACs of forward and backward of a batch, and the bytes of activations at the peak."""
    size, precision = experiments.image_size(experiment["data"]), experiment["trainer"]["precision"]
    dtype = torch.bfloat16 if precision.startswith(("bf16", "16")) else torch.float32
    dit = system.part("dit")
    if dit is not None:
        encoder = _text_encoder(system, experiment)
        tokens, side = min(CAPTION_TOKENS, encoder.max_tokens), size // _downsample(system)
        key = ("step", dit.spec, dit.text_dim, tokens, side, batch, precision, _trained_names(dit))
        return reuse(key, lambda: _known(dit, key, lambda: _denoiser_inputs(dit, tokens, side, batch, dtype), dtype))
    autoencoder = system.part("autoencoder")
    if autoencoder is None:
        raise SpecError("the cost of a training is known for systems with a DiT and for autoencoders")
    network, shape = _Reconstruction(autoencoder), (batch, 3, size, size)
    of_images = ("step", autoencoder.spec, size, batch, precision, _trained_names(autoencoder))
    images = lambda: (torch.empty(shape, device="meta", dtype=dtype),)  # noqa: E731
    return reuse(of_images, lambda: _known(network, of_images, images, dtype))


def _known(
    network: nn.Module, key: tuple[Any, ...], inputs: Callable[[], Sequence[Any]], dtype: torch.dtype
) -> tuple[int, int]:
    """What `_measure` gives, from an earlier command if nothing that it depends on has changed."""
    return stored_costs.recall(network, key, lambda: _measure(network.to(dtype), inputs()))


class _Reconstruction(nn.Module):
    def __init__(self, autoencoder: Any) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, images: Tensor) -> Tensor:
        """Images encoded and decoded."""
        decoded: Tensor = self.autoencoder.decode(self.autoencoder.encode(images))
        return decoded


def _text_encoder(system: Any, experiment: Config) -> Any:
    """The text encoder of a system, or of the features that it is trained on."""
    if (own := system.part("text_encoder")) is not None:
        return own
    spec = experiment["system"]["text_encoder"]
    return reuse(("encoder", spec), lambda: build_on_meta("text_encoder", spec))


def _downsample(system: Any) -> int:
    own = system.part("autoencoder")
    return int(system.downsample if own is None else own.downsample)


def _denoiser_inputs(dit: Any, tokens: int, side: int, batch: int, dtype: torch.dtype) -> tuple[Any, ...]:
    with torch.device("meta"):
        x, t = torch.empty(batch, dit.channels, side, side, dtype=dtype), torch.empty(batch, dtype=dtype)
        features = torch.empty(batch, tokens, dit.text_dim, dtype=dtype)
        features.requires_grad_(not _trained_names(dit))  # of a text encoder that trains alone
        return x, t, Text(features, torch.ones(batch, tokens, dtype=torch.bool))


def _measure(network: nn.Module, inputs: Sequence[Any]) -> tuple[int, int]:
    """MACs of a step and the bytes of its activations at the peak, on the meta device."""
    gradients, forward_peak = tensor_bytes(p for p in network.parameters() if p.requires_grad), 0

    def step() -> None:
        nonlocal forward_peak
        loss = network.train()(*inputs).float().square().mean()
        forward_peak = live.peak
        loss.backward()

    try:
        with fused_attention(), LiveBytes(network.parameters(), "meta") as live:
            step()
        peak = max(forward_peak, live.peak - gradients)
        network.zero_grad()
        return count_macs(step), peak  # counted by itself, as the counter keeps tensors
    finally:
        network.zero_grad()


def _step_time(experiment: Config, flops: float, devices: int) -> tuple[float | None, str]:
    """Seconds of a step of so many FLOPs on each of `devices`, at the rate of the last training here on devices of this
    kind: on as many, if there is one."""
    cpu = on_cpu(experiment["trainer"]["accelerator"])
    last = [(card, count) for card, count in reuse(("cards",), _cards) if on_cpu(_accelerator(card)) == cpu]
    last.sort(key=lambda item: item[1] == devices)
    if not last:
        return None, (
            "time unknown: it is taken from the last training here, and this machine has trained nothing yet; sana-lab "
            "profile EXPERIMENT measures a step, and stores nothing"
        )
    card, count = last[-1]
    rate = reuse(("rate", str(card.get("hash")), count), lambda: _rate(card, count))
    if rate is None:
        return None, "time unknown: the last training here is not comparable"
    if cpu:
        rate *= count / devices  # which share the cores
    others = "" if count == devices else f" on {_devices(count)}"
    return (
        flops / rate,
        f"at {rate / 1e9:.3g} GFLOP/s, as {card['experiment']!r} trained here on {card['date']}{others}",
    )


def _rate(card: Config, devices: int) -> float | None:
    """FLOPs a second of each device of a finished training, all of its work included."""
    try:
        config = experiments.from_card(card["config"], str(card["experiment"]))
        macs, _ = _step(_system(config["system"]), config, _share(config["data"], devices))
    except (ValueError, KeyError):
        return None
    return 2.0 * macs * config["trainer"]["accumulate"] * card["steps"] / card["seconds"]


def _share(data: Config, devices: int) -> int:
    """Images of a batch on a device."""
    return math.ceil((data.get("batch") or 1) / devices)


def _devices(count: int) -> str:
    return f"{count} device{'s' * (count > 1)}"


def _cards() -> list[tuple[Config, int]]:
    """The cards of this machine's trainings and their numbers of devices, the newest last."""
    here = environment.environment()
    paths = sorted(_trained(), key=lambda path: path.stat().st_mtime)
    cards = [(card, _devices_of(card)) for path in paths if _is_of(card := weights.card(path), here)]
    return sorted([(c, n) for c, n in cards if n is not None], key=lambda item: str(item[0]["date"]))


def _devices_of(card: Config) -> int | None:
    """Number of devices of a training; None where the card of an earlier version leaves it open."""
    if (count := card.get("devices")) is not None:
        return int(count)
    given = str(card.get("config", {}).get("trainer", {}).get("devices", "auto"))
    several = not on_cpu(_accelerator(card)) and torch.cuda.device_count() > 1
    return 1 if given == "1" or (given == "auto" and not several) else None


def _accelerator(card: Config) -> str:
    return str(card.get("config", {}).get("trainer", {}).get("accelerator", "auto"))


def _trained() -> Iterable[Path]:
    return (weights.HOME / "models").glob("*/weights.safetensors")


def _is_of(card: Config, here: Config) -> bool:
    where = card.get("environment", {})
    return bool(card.get("seconds") and card.get("steps")) and all(where.get(name) == here[name] for name in SAME)
