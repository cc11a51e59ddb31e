"""Class labels in place of text: class-conditional generation, as DiT (arXiv 2212.09748) reports on ImageNet."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, final

import torch
from torch import nn

from sana_lab.config.ranges import Count, Width
from sana_lab.config.specs import AsBefore, SpecError, nearest
from sana_lab.models.text import TextEncoder
from sana_lab.models.text.tokenizer import check_prompts
from sana_lab.types import Text

STD = 0.02  # of the initial vectors, as DiT's


@final
class Label(TextEncoder):
    """A learned vector per class, and one for the empty prompt: the null condition of guidance.

    A prompt is the name of a class. It has one token, so that cross-attention adds one vector to all image tokens.
    ValueError for a prompt that is no class, with the nearest.
    """

    def __init__(
        self,
        # Number of classes, called "0", "1" ...; or their names. Null takes those of the file.
        classes: Count | list[str] | None = 1000,
        names: Annotated[str | None, AsBefore(None)] = None,  # file with the name of a class in each line; null is none
        width: Width = 384,  # channels of a class's vector
    ) -> None:
        super().__init__()
        self.prompts = _names(classes, names)
        self.dim, self.max_tokens = width, 1
        self.table = nn.Embedding(len(self.prompts) + 1, width)
        nn.init.normal_(self.table.weight, std=STD)
        self._index = {"": len(self.prompts), **{name: i for i, name in enumerate(self.prompts)}}

    def forward(self, prompts: Sequence[str]) -> Text:
        """The vectors (B, 1, width) of classes."""
        indices = torch.tensor([self._number(prompt) for prompt in check_prompts(prompts)])
        tokens = self.table(indices.to(self.table.weight.device))[:, None]
        return Text(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device))

    def _number(self, prompt: str) -> int:
        number = self._index.get(prompt)
        if number is None:
            raise ValueError(
                f"{prompt!r} is no class of text_encoder 'label'; {nearest(prompt, filter(None, self._index))}"
            )
        return number


def _names(classes: int | list[str] | None, file: str | None) -> tuple[str, ...]:
    if (classes is None) == (file is None):
        raise SpecError(f"classes is {classes!r} and names is {file!r}; expected one of them, and null for the other")
    if file is not None:
        path = Path(file)
        if not path.is_file():
            raise SpecError(f"names is {file!r}, which is no file; expected the name of a class in each line")
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip())
    else:
        names = tuple(map(str, range(classes))) if isinstance(classes, int) else tuple(classes or ())
    if repeated := [name for name, n in Counter(names).items() if n > 1]:
        raise SpecError(f"classes have {repeated[0]!r} more than once; expected another name for each")
    if not names or "" in names:
        raise SpecError("classes have an empty name, or there are none; expected a name for each")
    return names
