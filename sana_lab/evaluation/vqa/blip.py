"""BLIP (arXiv 2201.12086) for yes-or-no questions. Legend: Q questions, P patches, L tokens, D width."""

from collections.abc import Sequence
from typing import Annotated, final

import torch
from torch import Tensor
from transformers import BlipForQuestionAnswering, PreTrainedTokenizerFast

from sana_lab.config.ranges import BatchSize
from sana_lab.config.specs import RUNTIME, SpecError
from sana_lab.environment import place
from sana_lab.evaluation import transformers_models
from sana_lab.evaluation.vqa import Vqa
from sana_lab.models.text.loading import load_tokenizer
from sana_lab.models.text.tokenizer import pad_rows, padding_id, token_rows
from sana_lab.types import Json


@final
class Blip(Vqa):
    """A BLIP for question answering; the answer is yes where "yes" is a likelier first word than "no".

    DPG-Bench's published numbers are of mPLUG-large, another network, and not comparable.
    """

    def __init__(
        self,
        model: str,  # transformers folder, such as a copy of Salesforce/blip-vqa-base
        batch: BatchSize = 32,  # questions at a time
        device: Annotated[str, RUNTIME] = "auto",  # auto, cpu, cuda, cuda:1 ...
    ) -> None:
        if batch < 1:
            raise SpecError(f"batch is {batch}, expected at least 1")
        self.network = transformers_models.load(BlipForQuestionAnswering, model, "blip").to(place(device))
        self.processor, self.tokenizer = transformers_models.load_processor(model), load_tokenizer(model)
        self.batch = batch
        self.words = [_word_id(self.tokenizer, word, model) for word in ("yes", "no")]
        self.weights_sha256 = transformers_models.weights_sha256(model)

    @torch.no_grad()
    def answer(self, image: Tensor, questions: Sequence[str]) -> list[bool]:
        pixels = transformers_models.pixel_values(self.processor, [image]).to(self.network.device)
        patches = self.network.vision_model(pixels).last_hidden_state  # (1, P, D), once for all questions
        groups = [questions[i : i + self.batch] for i in range(0, len(questions), self.batch)]
        return [yes for group in groups for yes in self._answers(patches, group)]

    def identity(self) -> Json:
        return {
            "vqa": "blip",
            "weights_sha256": self.weights_sha256,
            "preprocessing": transformers_models.preprocessing(self.processor),
            "rule": "yes is likelier than no as first word",
            "dtype": "float32",
        }

    def _answers(self, patches: Tensor, questions: Sequence[str]) -> list[bool]:
        rows = token_rows(self.tokenizer, questions, self.network.config.text_config.max_position_embeddings)
        ids, mask = (x.to(patches.device) for x in pad_rows(rows, padding_id(self.tokenizer)))
        image = {"encoder_hidden_states": patches.expand(len(ids), -1, -1)}
        states = self.network.text_encoder(ids, mask.long(), **image).last_hidden_state  # (Q, L, D)
        start = torch.full((len(ids), 1), self.network.decoder_start_token_id, device=ids.device)
        question = {"encoder_hidden_states": states, "encoder_attention_mask": mask.long()}
        yes, no = self.network.text_decoder(start, **question).logits[:, -1, self.words].unbind(-1)
        return (yes > no).tolist()


def _word_id(tokenizer: PreTrainedTokenizerFast, word: str, model: str) -> int:
    ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise SpecError(f"the tokenizer of {model!r} has no word {word!r}; expected that of a BLIP")
    return ids[0]
