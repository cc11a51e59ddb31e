"""What both text encoders share: pretrained folders, checked prompts, padded batches."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoTokenizer

from sana_lab.parts import SpecError

Dtype = Literal["float32", "bfloat16", "float16"]


def pretrained(load: Callable[..., Any], model: str, dtype: Dtype) -> tuple[Any, Any]:
    """(network, tokenizer) from a local folder, the local cache, or the hub, in this order. SpecError names all three."""
    errors = []
    for local in (True, False):
        try:
            network = load(model, dtype=getattr(torch, dtype), local_files_only=local)
            return network, AutoTokenizer.from_pretrained(model, local_files_only=local)
        except (OSError, ValueError) as error:
            errors.append(str(error).strip().splitlines()[0])
    raise SpecError(
        f"text encoder {model!r} is neither a folder with config.json, weights and tokenizer, nor in the local cache, "
        f"nor can it be fetched ({errors[-1]}); download the model and give its folder"
    )


def check_prompts(prompts: Sequence[str]) -> list[str]:
    """The prompts as a list. ValueError where there is none, or one is not text."""
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts is {prompts!r}, expected a list with at least one text")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(f"prompt {i} is {prompt!r} ({type(prompt).__name__}), expected text")
    return list(prompts)


def padded(rows: Sequence[Sequence[int]], fill: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (B, L), right-padded to the longest row, and their mask (B, L) bool."""
    length = max(map(len, rows))
    ids = [[*row, *[fill] * (length - len(row))] for row in rows]
    mask = [[True] * len(row) + [False] * (length - len(row)) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
