"""Published configurations: sizes that the paper gives, and the same network as from a folder."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from sana_lab.config import specs
from sana_lab.models.text.configs import CONFIGS
from sana_lab.models.text.tokenizer import offline_tokenizer

PUBLISHED = {
    "google/t5-v1_1-small": (512, 35),
    "google/t5-v1_1-base": (768, 110),
    "google/t5-v1_1-large": (1024, 341),
    "google/t5-v1_1-xl": (2048, 1224),
    "google/t5-v1_1-xxl": (4096, 4762),
    "DeepFloyd/t5-v1_1-xxl": (4096, 4762),
    "Efficient-Large-Model/gemma-2-2b-it": (2304, 2614),
    "google/gemma-2-2b": (2304, 2614),
    "google/gemma-2-2b-it": (2304, 2614),
    "google/gemma-2b": (2048, 2506),
    "google/gemma-2b-it": (2048, 2506),
    "sentence-transformers/all-MiniLM-L6-v2": (384, 23),
}
"""Hub id -> width, and millions of parameters: the SANA paper's Tables 9 and 13, and MiniLM's model card (22.7)."""


def on_meta(model: str, name: str) -> Any:
    with torch.device("meta"):
        kind = "t5" if "t5" in name else "encoder" if "MiniLM" in name else "llm"
        return specs.build("text_encoder", {"name": kind, "model": model})


@pytest.mark.parametrize("model", CONFIGS)
def test_width_and_parameters_are_those_as_published(model: str):
    encoder = on_meta(model, model)
    assert (encoder.dim, round(sum(p.numel() for p in encoder.parameters()) / 1e6)) == PUBLISHED[model]


@pytest.mark.parametrize("model", ["google/t5-v1_1-small", "google/gemma-2b", "google/gemma-2-2b"])
def test_a_folder_with_the_configuration_gives_the_same_shapes(model: str, tmp_path: Path):
    AutoConfig.for_model(**CONFIGS[model]).save_pretrained(tmp_path)
    offline_tokenizer(start=True).save_pretrained(tmp_path)
    listed, read = on_meta(model, model), on_meta(str(tmp_path), model)
    assert {k: v.shape for k, v in listed.state_dict().items()} == {k: v.shape for k, v in read.state_dict().items()}
