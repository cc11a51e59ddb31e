"""BERT-like encoders (arXiv 1810.04805): bidirectional, small, such as those of sentence-transformers."""

from typing import Annotated, Any, final

from torch import Tensor
from transformers import AutoModel, BertConfig, BertModel

from sana_lab.config.ranges import Depth, Tokens, Width
from sana_lab.config.specs import RUNTIME, AsBefore, SpecError
from sana_lab.models.text import Null
from sana_lab.models.text.bidirectional import BidirectionalEncoder
from sana_lab.models.text.loading import Dtype, check_family, load_network, load_tokenizer, read_config, tiny_dtype
from sana_lab.models.text.tokenizer import offline_tokenizer

POSITIONS = 512  # of the tiny BERT, as of BERT


@final
class Encoder(BidirectionalEncoder):
    """A pretrained BERT, RoBERTa, MPNet, MiniLM ..., or without `model` a tiny BERT that trains with the DiT.

    Features are the last hidden states of all tokens, the first of which (CLS) and the last (SEP) the tokenizer adds;
    nothing is pooled. In the network's dtype.
    """

    def __init__(
        self,
        model: str | None = None,  # folder or hub id of an encoder; null builds a tiny BERT to train
        max_tokens: Tokens = 300,  # tokens read per prompt, CLS and SEP included; longer prompts are truncated
        dtype: Dtype = "auto",  # dtype of weights and features; auto: as stored, float32 for the tiny BERT
        width: Width = 64,  # channels of the tiny BERT, a multiple of `heads`
        layers: Depth = 2,  # transformer blocks of the tiny BERT
        heads: Width = 2,  # attention heads of the tiny BERT
        pad_to_max: Annotated[bool, RUNTIME] = False,  # pad to `max_tokens`, not to the batch's longest prompt
        # attention mask of the null condition: diffusers (its own, CLS and SEP for "") or nvlabs (the prompt's)
        null: Annotated[Null, AsBefore("diffusers")] = "diffusers",
        # random weights in the published configuration of `model`, offline tokenizer: for measuring speed
        random_init: Annotated[bool, AsBefore(False)] = False,
    ) -> None:
        if model is None:
            tokenizer = offline_tokenizer(start=False)
            network = _tiny(width, layers, heads, len(tokenizer), max_tokens, dtype)
        else:
            network, tokenizer = _pretrained(model, max_tokens, dtype, random_init), load_tokenizer(model, random_init)
        trained = model is not None
        super().__init__(
            network, tokenizer, pretrained=trained, max_tokens=max_tokens, pad_to_max=pad_to_max, null=null
        )

    def features(self, ids: Tensor, mask: Tensor, host_mask: Tensor) -> Tensor:
        states: Tensor = self.network(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return states


def _pretrained(model: str, max_tokens: int, dtype: Dtype, random_init: bool) -> Any:
    config = read_config(model, random_init)
    check_family(config, model, "encoder")
    longest = getattr(config, "max_position_embeddings", max_tokens)
    if config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        longest -= 2  # positions begin after that of padding
    if max_tokens > longest:
        raise SpecError(f"max_tokens is {max_tokens}, and {model!r} reads at most {longest}")
    network = load_network(AutoModel, model, dtype, random_init=random_init, optional="pooler.")
    if getattr(network, "pooler", None) is not None:
        network.pooler = None  # unused
    return network


def _tiny(width: int, layers: int, heads: int, vocabulary: int, max_tokens: int, dtype: Dtype) -> Any:
    """Tiny BERT without dropout."""
    if width % heads:
        raise SpecError(f"width {width} is not a multiple of heads {heads}")
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=2 * width,
        max_position_embeddings=max(POSITIONS, max_tokens),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        type_vocab_size=1,
        initializer_range=0.1,
    )
    encoder: Any = BertModel(config, add_pooling_layer=False)
    return encoder.to(tiny_dtype(dtype))
