"""Complex human instructions (CHI): text before a prompt that enriches a decoder's features (SANA, section 2.3)."""

import inspect
from pathlib import Path

from sana_lab.config import text_files
from sana_lab.config.specs import SpecError, nearest

SANA_LAB = """\
Below is the caption of a picture. Before it is painted, imagine the picture as a whole and tell what can be seen in it.
- If the caption is brief, work out what each thing in it looks like: form, colour, material, light and surroundings.
- If the caption is long, leave nothing of it out, and let each colour and number stay with the thing it belongs to.
- Count what is to be counted, and say where things stand to each other.
Two examples:
- Caption: an old boat. Picture: a wooden rowing boat with flaking blue paint, pulled up on a pebble beach at low tide.
- Caption: two birds on a wire. Picture: two small grey birds on a black cable, an orange evening sky behind them.
Tell the picture alone, without remarks about the task.
Caption: """
"""Instruction `sana_lab`, written for models trained in this lab."""

NAMES = ("sana_lab", "released")


def read_instruction(instruction: str | None) -> str:
    """The text of an `instruction` option; None and "" give "". SpecError.

    `sana_lab` is this lab's own text, `released` that of the released models as diffusers holds it, `file:PATH` the
    exact content of a UTF-8 file. Any other value that is more than one word is the text itself. NVlabs' own configs
    have double quotes around "Enhanced prompt" where diffusers has single ones; use `file:PATH` for their version.
    """
    if instruction is None or not instruction:
        return ""
    if instruction.startswith("file:"):
        return _read_file(Path(instruction.removeprefix("file:")).expanduser())
    if instruction in NAMES:
        return SANA_LAB if instruction == "sana_lab" else _released()
    if instruction.isidentifier():
        expected = "expected sana_lab, released, file:PATH, or the text itself"
        raise SpecError(f"instruction is {instruction!r}, {expected}; {nearest(instruction, NAMES)}")
    return instruction


def _read_file(path: Path) -> str:
    try:
        return text_files.read(path)
    except (OSError, ValueError) as error:
        raise SpecError(f"instruction file {str(path)!r} cannot be read as text: {error}") from error


def _released() -> str:
    """The default of SanaPipeline's `complex_human_instruction`, its lines joined as the pipeline joins them."""
    try:
        from diffusers import SanaPipeline
    except ImportError as error:
        raise SpecError(
            "instruction 'released' is read from diffusers, which is not installed: pip install 'sana_lab[diffusers]', "
            "or put the text into a file and say file:PATH (for a pipeline: --set text_encoder.instruction=file:PATH)"
        ) from error
    lines = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    return "\n".join(lines)
