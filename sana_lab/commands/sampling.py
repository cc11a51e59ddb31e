"""Arguments of the verbs that sample pictures, and what runs them; modules are imported when they run."""

from argparse import ArgumentParser, Namespace
from pathlib import Path


def sample_arguments(parser: ArgumentParser) -> None:
    """Prompts, and how they are sampled."""
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="text to generate an image from")
    parser.add_argument(
        "--prompts",
        dest="prompts_file",
        metavar="FILE",
        help="file with a prompt on each line, in place of PROMPT; - is standard input",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write DIR/*.png to")
    parser.add_argument(
        "--model", default="shapes_sana", metavar="EXPERIMENT", help="trained experiment, file, folder or hub id "
        "(shapes_sana)"
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise; image i uses (seed, i) (0)")
    parser.add_argument("--size", type=int, help="pixels a side (the training size)")
    parser.add_argument("--negative", default="", metavar="TEXT", help="negative prompt for guidance")
    parser.add_argument(
        "--region",
        action="append",
        default=[],
        metavar="'X0,Y0,X1,Y1: PROMPT'",
        help="box in fractions of the picture, with a prompt of its own; repeat it for more of them",
    )
    parser.add_argument(
        "--best-of", type=int, metavar="N", help="images to sample for each prompt, of which one is kept"
    )
    parser.add_argument(
        "--by", metavar="MEASURE", help="measure that scores them, a name or a spec, such as clip_shapes"
    )
    parser.add_argument("--variant", metavar="NAME", help="variant of a diffusers folder's files, such as fp16")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="such as sampling.steps=50")
    parser.add_argument("--lora", metavar="FILE", help="LoRA of the DiT to add, in diffusers' layout")
    parser.add_argument("--lora-scale", type=float, default=1.0, metavar="X", help="strength of the LoRA (1)")


def sample_verb(options: Namespace) -> None:
    """`sana-lab sample`."""
    from sana_lab import api
    from sana_lab.commands import prompts

    options.prompts = prompts.given(options)
    api.main(options)


def edit_arguments(parser: ArgumentParser) -> None:
    """The picture, and what is in it before and after."""
    parser.add_argument("image", type=Path, metavar="IMAGE", help="picture to edit")
    parser.add_argument("--from", dest="source", required=True, metavar="PROMPT", help="text of the picture as it is")
    parser.add_argument(
        "--to", dest="target", required=True, metavar="PROMPT", help="text of the picture as it will be"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=".png to write")
    parser.add_argument(
        "--model", default="shapes_sana", metavar="EXPERIMENT", help="trained experiment, file, folder or hub id "
        "(shapes_sana)"
    )  # fmt: skip
    parser.add_argument("--size", type=int, help="pixels a side to resize to (the picture's own size)")
    parser.add_argument(
        "--inject",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the steps that take values of self-attention from the picture; more keeps more (0)",
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="such as sampling.steps=50")


def edit_verb(options: Namespace) -> None:
    """`sana-lab edit`."""
    from sana_lab.commands import edit

    edit.main(options)
