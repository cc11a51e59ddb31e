"""How several devices share a training (`trainer.strategy`), through Lightning: copies of the model, or shards."""

from typing import Any

from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy

from sana_lab.config.schema import Config
from sana_lab.config.specs import SpecError, name_of

ELEMENTWISE = ("adamw", "adam", "sgd")
"""Optimisers whose step of a slice of a parameter is the slice of the step."""

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")
"""Precisions of sharded training: those of Lightning's strategy without loss scaling."""


def build(name: str, ranks: int) -> Strategy:
    """The strategy of more than one rank."""
    if name == "fsdp2":  # one file per checkpoint, as of one device, from which either strategy resumes
        return ModelParallelStrategy(ranks, 1, save_distributed_checkpoint=False)
    # a part that a batch does not need, such as a discriminator before its start, has no gradient
    return DDPStrategy(find_unused_parameters=True)


def check(experiment: Config, system: Any, ranks: int) -> None:
    """SpecError for a strategy that does not fit the system, its options or the number of devices."""
    if experiment["trainer"]["strategy"] == "fsdp2" and (reason := obstacle(experiment, system, ranks)):
        raise SpecError(f"trainer.strategy is 'fsdp2', {reason}")


def obstacle(experiment: Config, system: Any, ranks: int) -> str | None:
    """Why the DiT's parameters cannot be sharded, and what is expected instead; None where they can."""
    trainer, sampling = experiment["trainer"], experiment["sampling"]
    if ranks == 1:
        return (
            "which shards parameters over several devices, and there is 1; expected ddp, or 2 trainer.devices or more"
        )
    if system.part("dit") is None:
        return f"which shards a DiT, and system {name_of(experiment['system'])!r} has none; expected ddp"
    others = [name for name, p in system.named_parameters() if p.requires_grad and not name.startswith("dit.")]
    if others:
        return f"which shards the DiT alone, and {others[0].partition('.')[0]} trains too; expected ddp"
    if (methods := system.part("methods")) is not None and methods.specs:
        return "and system.method reads hidden states of whole blocks; expected ddp"
    if system.settings.get("draws", 1) > 1:
        return f"and system.draws is {system.settings.draws}, which reads the blocks' weights; expected ddp or draws=1"
    if trainer["compile"]:
        return "and trainer.compile compiles whole blocks; expected ddp, or trainer.compile=false"
    if trainer["precision"] not in PRECISIONS:
        return f"which has no precision {trainer['precision']!r}; expected {', '.join(PRECISIONS)}, or ddp"
    if sampling["quantize"] != "none":
        return f"and sampling.quantize {sampling['quantize']!r} copies the DiT for previews; expected none, or ddp"
    optimizer = name_of(system.settings.optimizer)
    if optimizer not in ELEMENTWISE:
        return f"and optimizer {optimizer!r} needs whole matrices; expected {', '.join(ELEMENTWISE)}, or ddp"
    return None
