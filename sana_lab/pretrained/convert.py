"""The verbs import and export."""

import argparse
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import nn

from sana_lab.checkpoints import files, weights
from sana_lab.config import experiments, specs
from sana_lab.config.specs import SpecError
from sana_lab.models.dit import Dit
from sana_lab.pretrained.loading import Spec, _released, export
from sana_lab.systems.text2image import TextToImage


def write_import(reference: str | Path, out: Path, kind: str | None = None, **options: Any) -> Spec:
    """Write a released model as one weights file of the lab, in its own dtype; its card, which rebuilds the model.

    Of a pipeline that is the DiT and the autoencoder; the text encoder is read from its folder. SpecError where the
    file is the lab's already.
    """
    path = files.whole(files.find(str(reference)))
    _check_foreign(path)
    model, notes = _released(path, kind, text=False, **options)
    whole = isinstance(model, TextToImage)
    made = {"dit": model.dit, "autoencoder": model.autoencoder} if whole else {_kind(model): model}
    card: Spec = {
        "imported": str(reference),
        "notes": list(notes),
        "parts": {k: {"spec": p.spec, "supplied": _supplied(p)} for k, p in made.items()},
    }
    if whole:
        size = model.experiment["data"]["size"] // model.autoencoder.downsample
        card |= {"system": model.spec, "sampling": model.experiment["sampling"], "size": size}
    weights.write(out, {f"{k}.{name}": v for k, p in made.items() for name, v in p.state_dict().items()}, card)
    return card


def _check_foreign(path: Path) -> None:
    own = path.suffix == ".safetensors" and weights.card(path)
    if path.suffix != ".ckpt" and not own:
        return
    use = f"as it is, such as `weights: {path}` in an experiment" if own else f"with `--model {path}`"
    raise SpecError(f"{path} is the lab's already, nothing to import: use it {use}, or export it for diffusers")


def _kind(part: nn.Module) -> str:
    return "dit" if isinstance(part, Dit) else "autoencoder"


def _supplied(part: nn.Module) -> Spec:
    return {"channels": part.channels, "text_dim": part.text_dim} if isinstance(part, Dit) else {}


def main_import(options: argparse.Namespace) -> None:
    """`sana-lab import PATH`: one weights file, and how it is used."""
    out = options.out or Path(f"{Path(options.path).stem}.safetensors")
    if out.exists():
        raise SpecError(f"{out} is there already; expected another --out")
    hints = experiments.apply({}, options.set)
    card = write_import(
        options.path, out, options.part, variant=options.variant, ema=False if options.raw else None, **hints
    )
    print("\n".join([str(out), *card["notes"]]))
    if "system" in card:
        print(f"draw:  sana-lab sample 'a red circle' --out DIR --model {out}")
    print("train: in an experiment's system")
    print(
        OmegaConf.to_yaml({k: {**_told(k, p["spec"]), "weights": str(out)} for k, p in card["parts"].items()}), end=""
    )


def _told(kind: str, spec: Spec) -> Spec:
    """The spec without what are defaults anyway."""
    usual = specs.resolve(kind, spec["name"])
    return {k: v for k, v in spec.items() if k == "name" or v != usual[k]}


def main_export(options: argparse.Namespace) -> None:
    """`sana-lab export CHECKPOINT FOLDER`."""
    notes = export(options.checkpoint, options.folder)
    print("\n".join([str(options.folder), *(f"note: {note}" for note in notes)]))
