"""A tokenizer that needs no download: one token for each word of the embedded world, bytes for anything else."""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
WORDS = """
a an and are at background behind below beside between big black blue brown by canvas center circle circles color colored
cross crosses diamond diamonds different drawing each four from gray green grey hexagon hexagons image in is it its large
left lower many middle next no object objects of on one orange other over photo picture pink plain plus pluses position
purple rectangle rectangles red right ring rings row scene shape shapes shows side single small square squares star stars
the their there things three to together top triangle triangles two under up upper with white yellow above
""".split()


def offline_tokenizer() -> PreTrainedTokenizerFast:
    """Lower-cased; words in the list are one token, others are spelled in bytes, so that nothing is lost.

    The vocabulary is the same on every machine and with every version: 3 special tokens, 256 bytes, then the words.
    """
    tokens = [PAD, BOS, EOS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"Ġ{word}" for word in sorted(set(WORDS)))]
    core = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [], ignore_merges=True))
    core.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), bytewise])
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, bos_token=BOS, eos_token=EOS)
