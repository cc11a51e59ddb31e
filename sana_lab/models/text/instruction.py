"""Complex human instructions: what a decoder-only model reads before a prompt, so that its features say more (CHI)."""

import inspect
from pathlib import Path

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
"""Our own text, for models trained here."""

NAMES = ("sana_lab", "released")


def read_instruction(instruction: str | None) -> str:
    """The text that is meant: `sana_lab`, ours; `released`, that of the released models as diffusers holds it; a file's
    as `file:PATH`, to the last letter; or what is given, if it is no single word. None is none. SpecError.

    NVlabs' own copies have double quotes around "Enhanced prompt" where diffusers has single ones: to have theirs to
    the letter, put it in a file.
    """
    if instruction is None or not instruction:
        return ""
    if instruction.startswith("file:"):
        return _of_file(Path(instruction.removeprefix("file:")).expanduser())
    if instruction in NAMES:
        return SANA_LAB if instruction == "sana_lab" else _released()
    if instruction.isidentifier():
        expected = "expected sana_lab, released, file:PATH, or the text itself"
        raise SpecError(f"instruction is {instruction!r}, {expected}; {nearest(instruction, NAMES)}")
    return instruction


def _of_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"instruction file {str(path)!r} cannot be read as text: {error}") from error


def _released() -> str:
    """The default of SanaPipeline's `complex_human_instruction`, its lines joined as it joins them."""
    try:
        from diffusers import SanaPipeline
    except ImportError as error:
        raise SpecError(
            "instruction 'released' is read from diffusers, which is not installed: pip install 'sana_lab[diffusers]', "
            "or put the text into a file and say file:PATH (for a pipeline: --set text_encoder.instruction=file:PATH)"
        ) from error
    lines = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    return "\n".join(lines)
