"""Commands `sana-lab import` and `sana-lab export`."""

import argparse
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sana_lab.config import experiments, specs
from sana_lab.config.validation import SpecError, plain

Spec = dict[str, Any]


def main_import(options: argparse.Namespace) -> None:
    """`sana-lab import PATH`: write one weights file and print how to use it."""
    from sana_lab.pretrained.imported import write_import

    out = options.out or Path(f"{Path(options.path).stem}.safetensors")
    if out.exists():
        raise SpecError(f"{out} exists already; expected another --out")
    hints = plain(experiments.apply({}, options.set))
    ema = False if options.raw else None
    card = write_import(options.path, out, options.part, variant=options.variant, ema=ema, **hints)
    print("\n".join([str(out), *card["notes"]]))
    if "system" in card:
        print(f"sample: sana-lab sample 'a red circle' --out DIR --model {out}")
    parts = {k: {**_without_defaults(k, part["spec"]), "weights": str(out)} for k, part in card["parts"].items()}
    print("train: in an experiment's system")
    print(OmegaConf.to_yaml(parts), end="")


def _without_defaults(kind: str, spec: Spec) -> Spec:
    """The spec without options at their default value."""
    defaults = specs.resolve(kind, spec["name"])
    return {k: v for k, v in spec.items() if k == "name" or v != defaults[k]}


def main_export(options: argparse.Namespace) -> None:
    """`sana-lab export CHECKPOINT FOLDER`: write a folder for diffusers and print the notes."""
    from sana_lab.pretrained.export import export

    notes = export(options.checkpoint, options.folder, options.part)
    print("\n".join([str(options.folder), *(f"note: {note}" for note in notes)]))
