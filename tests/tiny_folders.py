"""Folders for tests: tiny random networks as transformers saves them, and images in GenEval's layout."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BlipConfig,
    BlipForQuestionAnswering,
    BlipImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    GemmaConfig,
    GemmaModel,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    PreTrainedTokenizerFast,
    SwinConfig,
)

from sana_lab.models.text.tokenizer import offline_tokenizer
from sana_lab.types import Json

TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
WORDS = (
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "yes", "no", "is", "there", "a", "the", "red", "blue", "circle"),
    *("square", "dog", "what", "color", "left", "of", "on"),
)


def clip(folder: Path, max_tokens: int = 77, seed: int = 0) -> str:
    """A CLIP of 32 x 32 pictures whose random features differ enough to be told apart."""
    tokenizer = offline_tokenizer(start=False)
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": max_tokens, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(seed)
    vision = {**TOWER, "image_size": 32, "patch_size": 8, "initializer_factor": 5.0}
    CLIPModel(
        CLIPConfig(
            text_config={**TOWER, **text, "initializer_factor": 5.0},
            vision_config=vision,
            projection_dim=12,
        )
    ).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def decoder(folder: Path) -> str:
    """A Gemma of width 32 with a tokenizer of bytes."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    tokenizer = offline_tokenizer(start=True)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": len(tokenizer)}
    GemmaModel(GemmaConfig(**sizes, **heads)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def mask2former(folder: Path, labels: list[str], side: int = 64) -> str:
    """A Mask2Former of ten queries on a Swin backbone; pictures are scaled to `side` pixels."""
    torch.manual_seed(1)
    backbone = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=10,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    network = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        network.class_predictor.weight.normal_(std=1.5)  # surer than a fresh head, and of different classes
    network.save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": side, "width": side}, size_divisor=32).save_pretrained(folder)
    return str(folder)


def owlv2(folder: Path) -> str:
    """An OWLv2 of 64 x 64 pictures and 16 patches."""
    torch.manual_seed(2)
    tokenizer = offline_tokenizer(start=False)
    wide = {**TOWER, "initializer_factor": 5.0}
    text = {**wide, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    vision = {**wide, "image_size": 64, "patch_size": 16}
    config = Owlv2Config(text_config=text, vision_config=vision, projection_dim=16)
    network = Owlv2ForObjectDetection(config)
    with torch.no_grad():
        network.class_head.logit_scale.bias.fill_(6.0)
    network.save_pretrained(folder)
    Owlv2ImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def blip(folder: Path) -> str:
    """A BLIP for questions of the few WORDS, whose answers change with question and colour."""
    torch.manual_seed(3)
    special = {"pad_token_id": 0, "bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3}
    text = {**TOWER, **special, "vocab_size": len(WORDS), "max_position_embeddings": 32, "encoder_hidden_size": 16}
    config = BlipConfig(text_config=text, vision_config={**TOWER, "image_size": 32, "patch_size": 8})
    network = BlipForQuestionAnswering(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(32) if parameter.ndim > 1 else None
        network.vision_model.embeddings.position_embedding.zero_()
        network.vision_model.embeddings.patch_embedding.weight.mul_(100)
        network.text_decoder.cls.predictions.bias[WORDS.index("no")] = 1.08
    network.save_pretrained(folder)
    BlipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


def word_tokenizer(words: Sequence[str] = WORDS) -> PreTrainedTokenizerFast:
    """BERT's frame around the words; others are unknown."""
    ids = {word: i for i, word in enumerate(words)}
    core = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    frame = [(word, ids[word]) for word in ("[CLS]", "[SEP]")]
    core.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=frame)
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def geneval(folder: Path, index: int, row: Json, images: torch.Tensor) -> None:
    """Images (B, 3, H, W) uint8 of one row in GenEval's layout."""
    inside = folder / f"{index:05d}"
    (inside / "samples").mkdir(parents=True)
    (inside / "metadata.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    for k, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(inside / "samples" / f"{k:04d}.png")
