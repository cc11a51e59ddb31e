"""The verb `edit`: a picture inverted to noise under one prompt and sampled under another."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from sana_lab.config.specs import SpecError
from sana_lab.diffusion import inversion
from sana_lab.diffusion.sampling import Sampling
from sana_lab.environment import place

DEFAULTS = ("sampling.solver=rf_solver",)
"""Of an edit, before the options that are given; steps and guidance are the model's own."""


def main(options: Namespace) -> None:
    """`sana-lab edit IMAGE --from PROMPT --to PROMPT --out FILE`: write the edited picture."""
    from sana_lab import api
    from sana_lab.systems.editing import check, edit
    from sana_lab.systems.text2image import TextToImage

    for name, prompt in (("--from", options.source), ("--to", options.target)):
        if not prompt.strip():
            raise SpecError(f"{name} is empty; expected text, such as 'a red circle'")
    if options.out.suffix.lower() != ".png":
        raise SpecError(
            f"--out is {str(options.out)!r}, expected a .png; the nearest is {options.out.with_suffix('.png')}"
        )
    inversion.check("rf_solver", options.inject)
    image = read(options.image, options.size)
    system = api.load(options.model, [*DEFAULTS, *options.set])
    if not isinstance(system, TextToImage):
        raise SpecError(f"model is a {type(system).__name__}, expected a text2image system")
    sampling = Sampling(**api.settings(system, {}))
    check(sampling, options.inject)
    system.prepare_for_sampling(sampling, place("auto"))
    result = edit(system, image[None], [options.source], [options.target], sampling=sampling, inject=options.inject)[0]
    about = {"prompt": options.target, "source": options.source, "model": options.model, "inject": options.inject}
    api.write_file(options.out, result, {**about, "sampling": api.stored_settings(system)})
    print(options.out)


def read(path: Path, size: int | None = None) -> Tensor:
    """A picture (3, H, W) uint8, turned as its EXIF says, and resized to `size` pixels a side if given.

    SpecError for a file that is none.
    """
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file).convert("RGB")
    except UnidentifiedImageError:
        raise SpecError(f"{path} is no picture that Pillow reads; expected a .png or .jpg") from None
    if size is not None:
        picture = picture.resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
