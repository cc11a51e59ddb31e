"""Prompts of the verb `sample`: words of the command line, or the lines of a file."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from sana_lab.config import text_files
from sana_lab.config.specs import SpecError

STDIN = "-"


def given(options: Namespace) -> list[str]:
    """The prompts in their order. SpecError for none, for an empty one, and for words beside a file."""
    path = options.prompts_file
    if options.prompts and path is not None:
        raise SpecError(f"PROMPT and --prompts {path} are both given, expected one of them")
    prompts = list(options.prompts) if path is None else lines(path)
    if not prompts:
        what = "no prompt is given" if path is None else f"{_name(path)} holds no prompt"
        raise SpecError(f"{what}; expected PROMPT ..., or --prompts FILE with one per line")
    if (empty := _first_empty(prompts)) is not None:
        where = f"prompt {prompts[empty]!r}" if path is None else f"{_name(path)}:{empty + 1}"
        raise SpecError(f"{where} is empty; expected text, such as 'a red circle'")
    return prompts


def lines(path: str) -> list[str]:
    """The lines of a file in any UTF, or of standard input for -, without their ends. SpecError for what is no text."""
    try:
        text = text_files.decode(sys.stdin.buffer.read(), _name(path)) if path == STDIN else text_files.read(path)
    except OSError as error:
        raise SpecError(f"--prompts {path}: {error.strerror}; expected a text file, or - for standard input") from error
    except ValueError as error:
        raise SpecError(str(error)) from error
    return text.removesuffix("\n").split("\n") if text else []


def _name(path: str) -> str:
    return "standard input" if path == STDIN else str(Path(path))


def _first_empty(prompts: Sequence[str]) -> int | None:
    return next((i for i, prompt in enumerate(prompts) if not prompt.strip()), None)
