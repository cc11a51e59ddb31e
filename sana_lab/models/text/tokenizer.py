"""The offline tokenizer of the tiny text encoders, checks of prompts, and padding of token ids.

The vocabulary is fixed rather than trained, so it is identical on every machine and library version: three special
tokens, 256 bytes, whole words, and letter groups that shorten the encoding of unlisted words.

Legend: B texts, L tokens.
"""

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

PAD, EOS, BOS = "<pad>", "</s>", "<s>"

WORLD = """
a an and are of the photo picture image drawing on in to with there is left right above below under over next beside
between one two three four five six seven eight nine ten red orange yellow green blue purple pink brown black white
gray grey circle circles square squares triangle triangles cross crosses star stars diamond diamonds ring rings plus
rectangle rectangles hexagon hexagons shape shapes object objects background color colored colour coloured
"""
"""Words of the embedded data set of shapes and related words."""

COMMON = """
at as by for from it its that this these those his her their our your my he she they we you who which what where while
when be been being was were has have had do does can could will would may not no yes or but if than then so very more
most much many some any all each every other another same different only also just both few several up down off out
into onto through across along around near far behind beyond inside outside front back top bottom middle center side
corner edge upper lower first second third last new old young big small large little tiny huge tall short long wide
narrow high low deep thin thick round flat straight curved soft hard smooth rough bright dark light pale vivid clear
clean dirty wet dry hot cold warm cool full empty open closed beautiful pretty cute happy sad simple plain detailed
realistic modern ancient gold golden silver beige cyan magenta violet turquoise wooden metal glass stone brick paper
plastic fabric leather man woman men women boy girl child children baby people person crowd group family friend hand
hands face head eye eyes hair hat shirt dress coat jacket shoes tie umbrella handbag suitcase backpack glasses dog
dogs cat cats bird birds horse horses sheep cow cows elephant bear zebra giraffe fish fox rabbit lion tiger mouse car
cars bicycle motorcycle airplane bus train truck boat ship street road traffic fire hydrant stop sign parking meter
bench bridge tower wheel city town house houses building buildings wall window door roof room kitchen bathroom bedroom
table chair couch sofa bed desk lamp shelf floor ceiling carpet mirror clock vase toilet sink oven toaster microwave
refrigerator tv television laptop computer remote keyboard cell phone book books scissors teddy drier toothbrush
bottle wine cup cups fork knife spoon bowl plate banana apple sandwich broccoli carrot pizza donut cake bread cheese
fruit fruits food coffee tea water milk potted plant plants dining flower flowers rose tree trees grass leaf leaves
forest wood garden park field hill mountain mountains river lake sea ocean beach sand rock rocks island sky cloud
clouds sun moon sunset sunrise rain snow ice wind fog day night morning evening summer winter autumn spring frisbee
skis snowboard sports ball kite baseball bat glove skateboard surfboard tennis racket game toy sitting standing
walking running lying looking holding wearing eating drinking playing riding flying swimming sleeping smiling made
shown seen set put taken painting sketch style art portrait landscape scene view close shot camera film digital oil
watercolor cartoon abstract texture pattern lines line dots stripes shadow reflection space world time
"""
"""Common words of captions, and the words of the 80 COCO classes in GenEval's prompts."""

MARKS = "0 1 2 3 4 5 6 7 8 9 . , : ; ! ? ' \" - ( ) / &"

FRAGMENTS = """
th he in er an re on at en nd ti es or te of ed is it al ar st nt ng se ha as ou io le ve co me de hi ri ro ic ne ea
ra ce li ch ll be ma si om ur ca el ta la ns di us no so tr un lo ow ai ot ph ck ss qu sh pe po pa mo ho ni to oo ee
am ac ad ab ig ag im id ir il et ut ul um op ap ey ly ry ty gy cy ing ion ent ess ant ate ous bl ble ver gh ght igh
est ist ack oun ter
"""
"""Frequent letter pairs, and triples whose first two letters are one of the pairs."""


def vocabulary() -> list[str]:
    """All tokens in the order of their ids; Ġ is the byte-level spelling of the space before a word."""
    words = (f"Ġ{word}" for word in (WORLD + COMMON + MARKS).split())
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return list(dict.fromkeys([PAD, EOS, BOS, *letters, *words, *FRAGMENTS.split()]))


def offline_tokenizer(*, start: bool) -> PreTrainedTokenizerFast:
    """A lower-casing byte-level tokenizer: listed words are one token, others are encoded losslessly in several.

    `start` prepends BOS to a prompt, as for decoder-only models; otherwise EOS is appended, as in T5.
    """
    ids = {token: i for i, token in enumerate(vocabulary())}
    core = Tokenizer(models.BPE(ids, [(f[:-1], f[-1]) for f in FRAGMENTS.split()], ignore_merges=True))
    core.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), spelled])
    core.decoder = decoders.ByteLevel()
    frame, special = (f"{BOS} $A", BOS) if start else (f"$A {EOS}", EOS)
    core.post_processor = processors.TemplateProcessing(single=frame, special_tokens=[(special, ids[special])])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=EOS, bos_token=BOS, split_special_tokens=True
    )


def check_prompts(prompts: Sequence[str]) -> list[str]:
    """The prompts as a list. ValueError for an empty list or a prompt that is not text."""
    if isinstance(prompts, str):
        raise ValueError(f"prompts is the text {prompts!r}, expected a list of texts; did you mean [{prompts!r}]?")
    if not len(prompts):
        raise ValueError('there are no prompts, expected at least one text; the null condition is [""]')
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(f"prompt {i} is {prompt!r} ({type(prompt).__name__}), expected text")
        if any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise ValueError(f"prompt {i} is {prompt!r}, which is not valid Unicode: it holds half of a surrogate pair")
    return list(prompts)


def token_rows(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], length: int) -> list[list[int]]:
    """Token ids of each text, truncated to `length`; the tokenizer's own BOS or EOS stays."""
    return tokenizer(list(texts), truncation=True, max_length=length)["input_ids"]


def count_truncated(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], rows: Sequence[Sequence[int]], length: int
) -> dict[int, int]:
    """Index of each text that `token_rows` truncated -> number of tokens removed."""
    full = [i for i, row in enumerate(rows) if len(row) >= length]
    untruncated = tokenizer([texts[i] for i in full], verbose=False)["input_ids"] if full else []
    return {i: len(row) - length for i, row in zip(full, untruncated, strict=True) if len(row) > length}


def pad_rows(rows: Sequence[Sequence[int]], fill: int, length: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids (B, L), right-padded to the longest row and at least to `length`, and their mask (B, L) bool.

    The first position is valid even in an empty row, so that attention always has a token.
    """
    lengths = torch.tensor([max(1, len(row)) for row in rows])
    length = max(length, int(lengths.max()))
    ids = torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows])
    return ids, torch.arange(length) < lengths[:, None]


def padding_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Padding id: PAD, or EOS if a decoder-only model has no PAD; padding is masked, so its value does not matter."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((i for i in candidates if i is not None), 0)
