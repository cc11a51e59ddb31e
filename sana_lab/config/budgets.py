"""Budgets of a training in images or FLOPs: notations for a number of steps, whose hash is that of the steps."""

import importlib
import math
from typing import Any

from sana_lab.config import registry
from sana_lab.config.validation import SpecError, opened, plain

Config = dict[str, Any]

BUDGETS = ("max_images", "max_flops")
"""Options of `trainer:` that `max_steps` is computed from; a completed experiment has the steps and none of them."""


def without_steps(values: Config, title: str) -> Config:
    """A configuration before its completion, `trainer.max_steps: null` left out where a budget says the steps.

    SpecError for two budgets.
    """
    trainer = opened(values.get("trainer")) or {}
    if not isinstance(trainer, dict):
        return values
    given = {name: plain(trainer[name]) for name in (*BUDGETS, "max_steps", "max_seconds") if name in trainer}
    budgets = [name for name, value in given.items() if value is not None]
    if not any(name in budgets for name in BUDGETS):
        return values
    if len(budgets) > 1:
        both = " and ".join(f"trainer.{name} is {given[name]}" for name in budgets)
        raise SpecError(f"{title}: {both}; expected one of them, and the others null")
    return {**values, "trainer": {k: v for k, v in trainer.items() if k not in ("max_steps", "max_seconds")}}


def with_steps(config: Config, title: str) -> Config:
    """A completed configuration with its budget as `trainer.max_steps`, from 1. SpecError without a batch size."""
    trainer = config["trainer"]
    if all(trainer[name] is None for name in BUDGETS):
        return config
    if trainer["max_images"] is not None:
        batch = config["data"].get("batch")
        if batch is None:
            raise SpecError(f"{title}: trainer.max_images needs data with a batch size; expected trainer.max_steps")
        steps = trainer["max_images"] / (batch * trainer["accumulate"])
    else:
        module, _, name = registry.STEP_FLOPS.partition(":")
        steps = trainer["max_flops"] / getattr(importlib.import_module(module), name)(config)
    spent = {**trainer, **dict.fromkeys(BUDGETS), "max_steps": max(1, math.ceil(steps))}
    return {**config, "trainer": spent}
