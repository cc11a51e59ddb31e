"""T5 encoders (arXiv 1910.10683): bidirectional, the text encoders of Imagen and PixArt."""

from typing import Annotated, Any, final

from torch import Tensor, nn
from transformers import AutoModelForTextEncoding, T5Config, T5EncoderModel

from sana_lab.config.ranges import Depth, Tokens, Width
from sana_lab.config.specs import RUNTIME, AsBefore, SpecError
from sana_lab.models.text import Null
from sana_lab.models.text.attention_masks import attention_mask
from sana_lab.models.text.bidirectional import BidirectionalEncoder
from sana_lab.models.text.loading import Dtype, check_family, load_network, load_tokenizer, read_config, tiny_dtype
from sana_lab.models.text.tokenizer import offline_tokenizer


@final
class T5(BidirectionalEncoder):
    """A pretrained T5, mT5 or UMT5 encoder, or without `model` a tiny T5 that trains with the DiT.

    Features are the last hidden states, in the network's dtype.
    """

    def __init__(
        self,
        model: str | None = None,  # folder or hub id of a T5, mT5 or UMT5; null builds a tiny T5 to train
        max_tokens: Tokens = 300,  # tokens read per prompt, EOS included; at least 2, longer prompts are truncated
        dtype: Dtype = "auto",  # dtype of weights and features; auto: as stored, float32 for the tiny T5
        width: Width = 64,  # channels of the tiny T5, a multiple of `heads`
        layers: Depth = 2,  # transformer blocks of the tiny T5
        heads: Width = 2,  # attention heads of the tiny T5
        pad_to_max: Annotated[bool, RUNTIME] = False,  # pad to `max_tokens`, not to the batch's longest prompt
        # attention mask of the null condition: diffusers (its own, one token for "") or nvlabs (the prompt's)
        null: Annotated[Null, AsBefore("diffusers")] = "diffusers",
        # random weights in the published configuration of `model`, offline tokenizer: for measuring speed
        random_init: Annotated[bool, AsBefore(False)] = False,
    ) -> None:
        if max_tokens < 2:
            raise SpecError(f"max_tokens is {max_tokens}, expected at least 2: a word and EOS")
        if model is None:
            tokenizer = offline_tokenizer(start=False)
            network = _tiny(width, layers, heads, len(tokenizer), dtype)
        else:
            network, tokenizer = _pretrained(model, dtype, random_init), load_tokenizer(model, random_init)
        trained = model is not None
        super().__init__(
            network, tokenizer, pretrained=trained, max_tokens=max_tokens, pad_to_max=pad_to_max, null=null
        )

    def features(self, ids: Tensor, mask: Tensor, host_mask: Tensor) -> Tensor:
        visible = attention_mask(self.network, host_mask, mask)
        states: Tensor = self.network(input_ids=ids, attention_mask=visible).last_hidden_state
        return states


def _pretrained(model: str, dtype: Dtype, random_init: bool) -> Any:
    check_family(read_config(model, random_init), model, "t5")
    network = load_network(AutoModelForTextEncoding, model, dtype, random_init=random_init)
    return network.encoder  # its state dict has the embedding under one name


def _tiny(width: int, layers: int, heads: int, vocabulary: int, dtype: Dtype) -> Any:
    """Tiny T5 1.1 without dropout."""
    if width % heads:
        raise SpecError(f"width {width} is not a multiple of heads {heads}")
    config = T5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=width // heads,
        d_ff=2 * width,
        num_layers=layers,
        num_heads=heads,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )
    encoder: Any = T5EncoderModel(config).encoder
    bias = encoder.block[0].layer[0].SelfAttention.relative_attention_bias
    nn.init.normal_(bias.weight)  # T5's 1/sqrt(width) leaves attention near uniform for hundreds of steps
    return encoder.to(tiny_dtype(dtype))
