"""Folders of tiny transformers models: features that equal the library's, and errors for incomplete ones."""

import shutil
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MPNetConfig,
    MPNetModel,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5EncoderModel,
)
from transformers.utils import logging

from sana_lab.config.specs import SpecError, build
from sana_lab.models.text import PromptTruncated, TextEncoder
from sana_lab.models.text.llm import Llm
from sana_lab.models.text.t5 import T5
from sana_lab.models.text.tokenizer import offline_tokenizer

PROMPTS = ["a red circle", "a photo of a blue square left of two green triangles", ""]
DECODER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
ENCODER = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "feed_forward_proj": "gated-gelu"}


EYE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 28}


def save(model: PreTrainedModel, folder: Path, start: bool) -> PreTrainedModel:
    model.save_pretrained(folder)
    offline_tokenizer(start=start).save_pretrained(folder)
    return model.eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, PreTrainedModel]]:
    """A folder with one folder per model, and the models themselves; T5 keeps its dropout and its decoder."""
    root, size = tmp_path_factory.mktemp("models"), len(offline_tokenizer(start=True))
    torch.manual_seed(0)
    decoder = {**DECODER, "vocab_size": size, "num_key_value_heads": 1, "head_dim": 16, "initializer_range": 0.3}
    references = {
        "t5": T5ForConditionalGeneration(T5Config(vocab_size=size, **ENCODER)),
        "t5_bf16": T5ForConditionalGeneration(T5Config(vocab_size=size, **ENCODER)).bfloat16(),
        "umt5": UMT5EncoderModel(UMT5Config(vocab_size=size, **ENCODER)),
        "gemma2": Gemma2ForCausalLM(Gemma2Config(query_pre_attn_scalar=16, **decoder)),
        "llama": LlamaForCausalLM(LlamaConfig(**decoder)),
        "gemma3": Gemma3ForCausalLM(Gemma3TextConfig(query_pre_attn_scalar=16, **decoder)),
        "gemma3_sees": Gemma3ForConditionalGeneration(Gemma3Config(text_config=decoder, vision_config=EYE)),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**decoder)),
        "qwen3": Qwen3ForCausalLM(Qwen3Config(**decoder)),
        "bert": BertForMaskedLM(BertConfig(vocab_size=size, **DECODER)),
        "mpnet": MPNetModel(MPNetConfig(vocab_size=size, **DECODER)),
    }
    return root, {name: save(m, root / name, start="t5" not in name) for name, m in references.items()}


def hidden(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        if model.config.model_type in ("bert", "mpnet"):
            return model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
        inner = model.get_encoder() if model.config.model_type in ("t5", "umt5") else model.get_decoder()
        return inner(input_ids=ids, attention_mask=mask).last_hidden_state


def by_the_library(model: PreTrainedModel, folder: Path, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
    """Features and mask as pipelines make them: the library pads to a fixed length."""
    inputs = AutoTokenizer.from_pretrained(folder)(
        texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    return hidden(model, inputs.input_ids, inputs.attention_mask), inputs.attention_mask.bool()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("t5", "t5"),
        ("umt5", "t5"),
        ("bert", "encoder"),
        ("mpnet", "encoder"),
        *((n, "llm") for n in ("gemma2", "gemma3", "gemma3_sees", "llama", "qwen2", "qwen3")),
    ],
)
def test_a_folder_gives_what_the_model_that_was_saved_gives(
    models: tuple[Path, dict[str, PreTrainedModel]], name: str, kind: str
) -> None:
    root, references = models
    encoder = build("text_encoder", {"name": kind, "model": str(root / name), "max_tokens": 48, "pad_to_max": True})
    with torch.no_grad():
        text = encoder(PROMPTS)
    tokens, mask = by_the_library(references[name], root / name, PROMPTS, 48)
    assert encoder.pretrained
    assert not any(m.training for m in encoder.modules())
    assert encoder.dim == 32
    assert torch.equal(text.mask, mask)
    torch.testing.assert_close(text.tokens[mask], tokens[mask], rtol=1e-5, atol=1e-5)


def released_selection(model: PreTrainedModel, instruction: str, prompt: str, length: int) -> tuple[Tensor, Tensor]:
    """SANA's rule, one prompt at a time: pad to a fixed length, keep [0] and the last length - 1."""
    tokenizer = offline_tokenizer(start=True)
    room = len(tokenizer.encode(instruction)) + length - 2
    ids = (tokenizer.encode(instruction + prompt) + [0] * room)[:room]
    mask = torch.tensor([[i > 0 for i in ids]])
    positions = [0, *range(-length + 1, 0)]
    return hidden(model, torch.tensor([ids]), mask)[0, positions], mask[0, positions]


@pytest.mark.parametrize("pad_to_max", [True, False])
def test_the_instruction_keeps_the_positions_that_sana_keeps(
    models: tuple[Path, dict[str, PreTrainedModel]], pad_to_max: bool
) -> None:
    root, references = models
    instruction = "Describe the picture in detail.\n- not too long\nUser Prompt: "
    encoder = Llm(str(root / "gemma2"), max_tokens=10, instruction=instruction, pad_to_max=pad_to_max)
    prompts = [*PROMPTS[:2], "a very long prompt " * 9]
    over = len(encoder.tokenizer([prompts[2]])["input_ids"][0]) - 9  # BOS and the instruction's last token stay too
    with (
        torch.no_grad(),
        pytest.warns(PromptTruncated, match=rf"over 10 tokens .*: 3 of prompt 1, {over} of prompt 2$"),
    ):
        text = encoder(prompts)
    assert text.tokens.shape == (3, 10, 32)
    for i, prompt in enumerate(prompts):
        tokens, mask = released_selection(references["gemma2"], instruction, prompt, 10)
        assert torch.equal(text.mask[i], mask)
        torch.testing.assert_close(text.tokens[i][mask], tokens[mask], rtol=1e-5, atol=1e-5)


def test_a_short_batch_with_an_instruction_is_not_padded_to_the_maximum() -> None:
    encoder = Llm(instruction="in detail: ", max_tokens=50)
    text = encoder(["a red circle", "circle"])
    assert text.mask.sum(1).tolist() == [1 + 1 + 3, 1 + 1 + 1]  # BOS, the instruction's last token, the words
    assert text.tokens.shape[1] == 5


def test_the_null_condition_has_no_instruction() -> None:
    torch.manual_seed(0)
    plain = Llm(max_tokens=20)
    instructed = Llm(max_tokens=20, instruction="a picture in detail of: ")
    instructed.load_state_dict(plain.state_dict())
    mixed = instructed(["a red circle", ""])
    assert torch.equal(instructed([""]).tokens, plain([""]).tokens)
    assert mixed.mask.sum(1).tolist() == [5, 1]
    torch.testing.assert_close(mixed.tokens[1, :1], plain([""]).tokens[0], rtol=0, atol=1e-5)
    assert not torch.allclose(mixed.tokens[0, 2:5], plain(["a red circle"]).tokens[0, 1:4], atol=1e-3)


def test_a_tokenizer_without_a_beginning_still_has_a_null_condition(
    models: tuple[Path, dict[str, PreTrainedModel]], tmp_path: Path
) -> None:
    shutil.copytree(models[0] / "llama", tmp_path / "bare")
    tokenizer = offline_tokenizer(start=True)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    tokenizer.save_pretrained(tmp_path / "bare")
    text = Llm(str(tmp_path / "bare"))(["", "a red circle"])
    assert text.mask.tolist() == [[True, False, False], [True, True, True]]
    assert text.tokens.isfinite().all()


def test_the_dtype_is_the_stored_one_unless_it_is_named(models: tuple[Path, dict[str, PreTrainedModel]]) -> None:
    folder = str(models[0] / "t5_bf16")
    assert T5(folder)(PROMPTS).tokens.dtype == torch.bfloat16
    assert T5(folder, dtype="float32")(PROMPTS).tokens.dtype == torch.float32


def test_a_pipeline_folder_of_diffusers(models: tuple[Path, dict[str, PreTrainedModel]], tmp_path: Path) -> None:
    models[1]["gemma2"].model.save_pretrained(tmp_path / "text_encoder")
    offline_tokenizer(start=True).save_pretrained(tmp_path / "tokenizer")
    with torch.no_grad():
        assert torch.equal(Llm(str(tmp_path))(PROMPTS).tokens, Llm(str(models[0] / "gemma2"))(PROMPTS).tokens)


def test_on_the_meta_device_only_the_shape_is_read(models: tuple[Path, dict[str, PreTrainedModel]]) -> None:
    with torch.device("meta"):
        encoders: list[TextEncoder] = [T5(str(models[0] / "umt5")), Llm(str(models[0] / "gemma2"))]
    assert all(p.is_meta for e in encoders for p in e.parameters())
    assert [e.dim for e in encoders] == [32, 32]


def test_loading_says_nothing_and_leaves_the_library_as_it_was(
    models: tuple[Path, dict[str, PreTrainedModel]], capfd: pytest.CaptureFixture[str]
) -> None:
    before = logging.get_verbosity()
    T5(str(models[0] / "t5")), Llm(str(models[0] / "llama"))
    assert capfd.readouterr() == ("", "")
    assert logging.get_verbosity() == before
    assert list(logging.tqdm([1], disable=True)) == [1]
    assert logging.set_tqdm_hook(None) is None


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("t5", "gemma2", "holds a gemma2 model, expected t5, mt5, umt5; did you mean text_encoder 'llm'"),
        ("llm", "umt5", "holds a umt5 model, expected a decoder; did you mean text_encoder 't5'"),
        ("llm", "bert", "holds a bert model, expected a decoder; did you mean text_encoder 'encoder'"),
        ("encoder", "llama", "holds a llama model, expected a BERT-like encoder; did you mean text_encoder 'llm'"),
        ("encoder", "t5", "did you mean text_encoder 't5'"),
        ("t5", "mpnet", "did you mean text_encoder 'encoder'"),
    ],
)
def test_a_model_of_the_other_kind(
    models: tuple[Path, dict[str, PreTrainedModel]], kind: str, name: str, message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        build("text_encoder", {"name": kind, "model": str(models[0] / name)})


def test_a_folder_that_is_not_there_names_its_neighbour(models: tuple[Path, dict[str, PreTrainedModel]]) -> None:
    with pytest.raises(SpecError, match=r"there is no folder .*gemma22.*did you mean 'gemma2'"):
        Llm(str(models[0] / "gemma22"))


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=f"'{tmp_path}' lacks a text model's config, weights or tokenizer"):
        T5(str(tmp_path))


@pytest.mark.parametrize(("lost", "message"), [("tokenizer.json", "tokenizer"), ("model.safetensors", "no file named")])
def test_a_folder_that_lacks_a_file(
    models: tuple[Path, dict[str, PreTrainedModel]], tmp_path: Path, lost: str, message: str
) -> None:
    folder = shutil.copytree(models[0] / "t5", tmp_path / "t5")
    (folder / lost).unlink()
    if lost == "tokenizer.json":
        (folder / "tokenizer_config.json").unlink()
    with pytest.raises(SpecError, match=message):
        T5(str(folder))


def test_weights_that_are_cut_short_or_lack_a_tensor(
    models: tuple[Path, dict[str, PreTrainedModel]], tmp_path: Path
) -> None:
    folder = shutil.copytree(models[0] / "gemma2", tmp_path / "gemma2")
    weights = folder / "model.safetensors"
    state = load_file(weights)
    save_file({k: v for k, v in state.items() if "layers.1.mlp.up_proj" not in k}, weights, {"format": "pt"})
    with pytest.raises(SpecError, match=r"incomplete: there is no layers.1.mlp.up_proj.weight"):
        Llm(str(folder))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(SpecError, match=r"model.safetensors is truncated"):
        Llm(str(folder))


@pytest.fixture
def pickled(models: tuple[Path, dict[str, PreTrainedModel]], tmp_path: Path) -> Path:
    """The weights of gemma2 as torch.save writes them."""
    folder = shutil.copytree(models[0] / "gemma2", tmp_path / "gemma2")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def test_a_bin_of_tensors_gives_what_safetensors_give(
    pickled: Path, models: tuple[Path, dict[str, PreTrainedModel]]
) -> None:
    texts = [Llm(str(folder))(PROMPTS) for folder in (pickled, models[0] / "gemma2")]
    assert torch.equal(texts[0].tokens, texts[1].tokens)


class Code:
    """A pickle of it makes a file."""

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("it-ran"),)


@pytest.mark.parametrize("damage", ["code", "truncated", "compressed"])
def test_a_bin_that_holds_code_or_is_damaged_is_one_line(pickled: Path, here: Path, damage: str) -> None:
    path = pickled / "pytorch_model.bin"
    if damage == "code":
        torch.save({"model.norm.weight": Code()}, path)
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    else:
        content = BytesIO(path.read_bytes())
        with zipfile.ZipFile(content) as whole, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
            for entry in whole.infolist():
                bomb.writestr(entry.filename, whole.read(entry))
    with pytest.raises(SpecError, match=r"pytorch_model.bin is (refused|cut short)") as caught:
        Llm(str(pickled))
    assert "\n" not in str(caught.value)
    assert not Path("it-ran").exists()


def test_a_pipeline_folder_without_its_tokenizer(
    models: tuple[Path, dict[str, PreTrainedModel]], tmp_path: Path
) -> None:
    models[1]["gemma2"].model.save_pretrained(tmp_path / "text_encoder")
    with pytest.raises(SpecError, match=rf"'{tmp_path}' lacks tokenizer/; expected tokenizer.json"):
        Llm(str(tmp_path))


@pytest.mark.parametrize("name", ["no such model", "--"])
def test_a_name_that_can_be_no_model(name: str) -> None:
    with pytest.raises(SpecError, match="neither a folder here nor in the local Hugging Face cache"):
        T5(name)


@pytest.mark.network
def test_a_model_that_the_hub_does_not_have() -> None:
    with pytest.raises(SpecError, match=r"the hub says: .*; get it with `hf download"):
        Llm("sana-lab/there-is-no-such-model")


@pytest.mark.parametrize(
    ("kind", "config"), [("t5", {"model_type": "t5", **ENCODER}), ("llm", {"model_type": "gemma2", **DECODER})]
)
def test_a_known_shape_is_drawn_without_any_file(kind: str, config: dict[str, object], monkeypatch: pytest.MonkeyPatch):
    """Random weights and the offline tokenizer, for speed; a shape that is not known is refused."""
    listed = {**config, "vocab_size": 2000, "head_dim": 16, "num_key_value_heads": 1}
    monkeypatch.setattr("sana_lab.models.text.loading.CONFIGS", {"org/small": listed})
    monkeypatch.setattr("sana_lab.models.text.loading.HfApi", None)
    encoder = build("text_encoder", {"name": kind, "model": "org/small", "random_init": True, "dtype": "bfloat16"})
    assert encoder.pretrained
    text = encoder(PROMPTS)
    assert (text.tokens.shape[-1], text.tokens.dtype) == (encoder.dim, torch.bfloat16)
    assert text.tokens.isfinite().all()
    with pytest.raises(SpecError, match=r"org/smal.*did you mean 'org/small'"):
        build("text_encoder", {"name": kind, "model": "org/smal", "random_init": True})
