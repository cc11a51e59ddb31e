"""Loading and sampling of trained models, in Python and by the verb `sample`."""

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from sana_lab.config import experiments, interpolation, schema
from sana_lab.config.atomic_write import replacing
from sana_lab.config.paths import check_folder
from sana_lab.config.specs import SpecError
from sana_lab.costs.out_of_memory import advise_on_out_of_memory
from sana_lab.costs.too_large import check_pixels
from sana_lab.diffusion.regions import Fixed
from sana_lab.diffusion.sampling import Sampling
from sana_lab.environment import place
from sana_lab.pretrained import loading, lora
from sana_lab.systems.text2image import TextToImage


def load(name: str, overrides: Sequence[str] = (), variant: str | None = None) -> Any:
    """The trained system of an experiment (averaged weights), or what a file, folder or hub id holds, for evaluation.

    SpecError if it is neither trained here nor shipped, or nothing that `sana_lab.pretrained.loading.load` reads.
    `system.experiment` is its resolved configuration, where that is known; `variant` is diffusers', such as fp16.
    """
    return loading.open_model(name, overrides, variant)


def sample(
    model: str | TextToImage,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    size: int | None = None,
    negative: str = "",
    **changes: Any,
) -> Tensor:
    """Images (B, 3, H, W) uint8 of prompts, from a trained experiment's name or a loaded system.

    `changes` are fields of `Sampling`: solver, steps, guidance, shift.
    """
    system = _sampled(model)
    how = _how(system, len(prompts), size, changes)
    return system.sample(prompts, **how, seed=seed, negative=negative)


def sample_batches(
    model: str | TextToImage,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    size: int | None = None,
    negative: str = "",
    **changes: Any,
) -> Iterator[Tensor]:
    """The images of `sample` in its order, batch by batch (b, 3, H, W) as each is done, so that few are in memory."""
    system = _sampled(model)
    how = _how(system, len(prompts), size, changes)
    return system.sample_batches(prompts, **how, seed=seed, negative=negative)


def _sampled(model: str | TextToImage) -> TextToImage:
    """The system of a name, or itself. SpecError for one that samples no images of prompts."""
    system = load(model) if isinstance(model, str) else model
    if not isinstance(system, TextToImage):
        raise SpecError(f"model is a {type(system).__name__}, expected a text2image system")
    return system


def _how(system: TextToImage, count: int, size: int | None, changes: schema.Config) -> dict[str, Any]:
    """Size and sampling of `count` images. SpecError where the size is neither given nor that of the training."""
    experiment: Any = getattr(system, "experiment", None)
    if size is None and experiment is None:
        raise SpecError("size is not given, and a checkpoint does not hold it; expected pixels a side, such as size=64")
    size = size or experiments.image_size(experiment["data"])
    check_pixels("size of this sampling", min(count, 64), size)
    return {"size": size, "sampling": Sampling(**settings(system, changes))}


def settings(system: TextToImage, changes: schema.Config) -> schema.Config:
    """Sampling options of a system: its experiment's `sampling`, or the defaults, with `changes`. SpecError."""
    experiment: Any = getattr(system, "experiment", None)
    return experiments.check_sampling({**(experiment["sampling"] if experiment else {}), **changes})


def stored_settings(system: TextToImage) -> schema.Config:
    """The sampling options to store in a picture: what came from the environment as it was written."""
    experiment: Any = getattr(system, "experiment", None)
    config = {**(experiment or {}), "sampling": settings(system, {})}
    stored: schema.Config = interpolation.as_written(config)["sampling"]
    return stored


def main(options: argparse.Namespace) -> None:
    """`sana-lab sample`: write DIR/000-a-red-circle.png ... batch by batch, with prompt and settings in each file."""
    check_folder(options.out)
    system = load(options.model, [*sampling_overrides(options), *options.set], options.variant)
    if isinstance(system, TextToImage):
        if options.lora is not None:
            lora.merge(system.dit, options.lora, options.lora_scale)
        system.prepare_for_sampling(Sampling(**settings(system, {})), place("auto"))
    with advise_on_out_of_memory(
        lambda: memory_advice(system, options.size, len(options.prompts), "prompts at a time")
    ):
        batches = sample_batches(
            system, options.prompts, seed=options.seed, size=options.size, negative=options.negative
        )
        sampling = {"lora": options.lora, "lora_scale": options.lora_scale} if options.lora else {}
        sampling |= {"sampling": stored_settings(system)}
        for index, image in enumerate(chain.from_iterable(batches)):
            about = {"prompt": options.prompts[index], "model": options.model, "seed": options.seed, "index": index}
            print(write(options.out, image, {**about, "negative": options.negative, **sampling}), flush=True)


def sampling_overrides(options: argparse.Namespace) -> list[str]:
    """`--region`, `--best-of` and `--by` as overrides of `sampling`. SpecError for regions that cannot be, and for one
    of the last two without the other."""
    overrides = []
    if options.region:
        Fixed(options.region)
        overrides += [f"sampling.regions={json.dumps({'name': 'fixed', 'regions': options.region})}"]
    if (options.best_of is None) != (options.by is None):
        raise SpecError("--best-of and --by belong together; expected both, such as --best-of 4 --by clip_shapes")
    if options.best_of is not None:
        overrides += [f"sampling.best_of={options.best_of}", f"sampling.best_by={options.by}"]
    return overrides


def memory_advice(system: TextToImage, size: int | None, batch: int, batch_option: str) -> list[str]:
    """Options that lower the memory of sampling; `batch_option` is the option that sets the batch."""
    from sana_lab.bench.memory_advice import SamplingPass

    size = size or experiments.image_size(system.experiment["data"])
    return SamplingPass(system, size, min(batch, 64), Sampling(**settings(system, {})), batch_option).advice()


def write(folder: Path, image: Tensor, about: dict[str, Any]) -> Path:
    """Write a PNG named by its index and prompt, with all settings; its path."""
    slug = re.sub(r"[^a-z0-9]+", "-", about["prompt"].lower()).strip("-")[:60]
    path = folder / f"{about['index']:03d}-{slug or 'image'}.png"
    write_file(path, image, about)
    return path


def write_file(path: Path, image: Tensor, about: dict[str, Any]) -> None:
    """Write an image (3, H, W) uint8 as a PNG whose text chunks hold the prompt and all settings."""
    text = PngInfo()
    text.add_itxt("prompt", about["prompt"])
    text.add_itxt("sana_lab", json.dumps(about))
    with replacing(path) as partial:
        Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(partial, "PNG", pnginfo=text)
