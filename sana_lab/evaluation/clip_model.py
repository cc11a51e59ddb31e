"""A released CLIP (arXiv 2103.00020) from a transformers folder: unit-length features (B, D) of images and texts."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPModel

from sana_lab.environment import place
from sana_lab.evaluation import transformers_models
from sana_lab.models.text.loading import load_tokenizer
from sana_lab.models.text.tokenizer import check_prompts, count_truncated, pad_rows, padding_id, token_rows
from sana_lab.types import Json


class PretrainedClip:
    """Both towers, in fp32. SpecError if the folder contains no CLIP."""

    def __init__(self, folder: str, device: str = "auto") -> None:
        self.network = transformers_models.load(CLIPModel, folder, "clip").to(place(device))
        self.processor, self.tokenizer = transformers_models.load_processor(folder), load_tokenizer(folder)
        self.max_tokens: int = self.network.config.text_config.max_position_embeddings
        self.weights_sha256 = transformers_models.weights_sha256(folder)

    @torch.no_grad()
    def image_features(self, images: Sequence[Tensor]) -> Tensor:
        """(B, D) of length 1, of uint8 (3, H, W) images preprocessed as the folder specifies."""
        pixels = transformers_models.pixel_values(self.processor, list(images)).to(self.network.device)
        return normalize(self.network.get_image_features(pixels).pooler_output, dim=-1)

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """(B, D) of length 1. A long text is truncated to `max_tokens`; its end-of-text token stays."""
        rows = token_rows(self.tokenizer, check_prompts(texts), self.max_tokens)
        ids, mask = (x.to(self.network.device) for x in pad_rows(rows, padding_id(self.tokenizer)))
        return normalize(self.network.get_text_features(ids, mask.long()).pooler_output, dim=-1)

    def is_truncated(self, text: str) -> bool:
        """Whether a text is longer than `max_tokens`."""
        rows = token_rows(self.tokenizer, [text], self.max_tokens)
        return bool(count_truncated(self.tokenizer, [text], rows, self.max_tokens))

    def identity(self) -> Json:
        return {
            "weights_sha256": self.weights_sha256,
            "preprocessing": transformers_models.preprocessing(self.processor),
            "max_tokens": self.max_tokens,
            "dtype": "float32",
        }
