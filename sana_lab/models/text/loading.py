"""Pretrained text models of the transformers library: from a folder, the local cache or the hub, in this order."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import HfApi
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import logging

from sana_lab.config.archives import check_archive
from sana_lab.config.specs import SpecError, nearest
from sana_lab.models.text.configs import CONFIGS
from sana_lab.models.text.tokenizer import offline_tokenizer

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
"""`auto` is the dtype in which the weights are stored, and float32 for a tiny model."""

T5_FAMILY = ("t5", "mt5", "umt5")

Family = Literal["t5", "encoder", "llm"]
"""Name of the text encoder that reads a model: T5s, BERT-like encoders, decoders."""

_LOAD_ERRORS = (OSError, ValueError, ImportError, RuntimeError, SafetensorError)
_HUB_TIMEOUT = 10.0  # seconds


def tiny_dtype(dtype: Dtype) -> torch.dtype:
    return torch.float32 if dtype == "auto" else getattr(torch, dtype)


def family(config: PreTrainedConfig) -> Family:
    """The family of a model, by its configuration."""
    if config.model_type in T5_FAMILY or config.is_encoder_decoder:
        return "t5"
    return "encoder" if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES else "llm"


def check_family(config: PreTrainedConfig, model: str, expected: Family) -> None:
    """SpecError for a model of another family, with the text encoder that reads it."""
    actual = family(config)
    if actual != expected:
        kinds = {"t5": ", ".join(T5_FAMILY), "encoder": "a BERT-like encoder", "llm": "a decoder"}
        raise SpecError(
            f"{model!r} holds a {config.model_type} model, expected {kinds[expected]}; did you mean text_encoder "
            f"{actual!r}?"
        )


def read_config(model: str, random_init: bool = False) -> PreTrainedConfig:
    """The configuration of a folder or hub id; from `CONFIGS` for random weights and on the meta device.

    SpecError lists what was tried and how to get the model.
    """
    if _is_offline(model, random_init):
        return AutoConfig.for_model(**CONFIGS[model])
    with _quiet():
        return _fetch(AutoConfig, _locations(model)[0])


def _is_offline(model: str, random_init: bool) -> bool:
    """Whether to use the published configuration without reading files. SpecError if `random_init` has none."""
    if random_init and model not in CONFIGS:
        raise SpecError(
            f"the configuration of {model!r} is not listed, so random_init cannot build it; {nearest(model, CONFIGS)}"
        )
    without_weights = random_init or torch.get_default_device().type == "meta"
    return without_weights and model in CONFIGS and not Path(model).is_dir()


def load_network(
    auto: Any,
    model: str,
    dtype: Dtype,
    variant: str | None = None,
    random_init: bool = False,
    optional: str | tuple[str, ...] = (),
) -> Any:
    """A network in evaluation mode, loaded by the transformers class `auto`; without weights on the meta device.

    `variant` selects among weight files, such as fp16; None selects the default or the only file. `random_init` reads
    no files and needs a listed configuration. SpecError if the files lack weights, which transformers would initialise
    at random, other than those whose names begin with `optional`.
    """
    if random_init:
        torch_dtype = None if dtype == "auto" else getattr(torch, dtype)
        return auto.from_config(read_config(model, random_init), dtype=torch_dtype, trust_remote_code=False).eval()
    place = _locations(model)[0]
    _check_pickles(Path(place))
    variant = variant or _sole_variant(Path(place))
    with _quiet():
        if torch.get_default_device().type == "meta":
            return auto.from_config(read_config(model), trust_remote_code=False)
        network, info = _fetch(auto, place, dtype=dtype, variant=variant, output_loading_info=True, weights_only=True)
    if missing := sorted(key for key in info["missing_keys"] if not key.startswith(optional)):
        raise SpecError(f"the weights of {place!r} are incomplete: there is no {', '.join(missing[:3])}")
    return network


def load_tokenizer(model: str, random_init: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder or hub id, truncating on the right. SpecError if its vocabulary is missing.

    For a listed configuration with random or no weights, it is the offline tokenizer.
    """
    if _is_offline(model, random_init):
        return offline_tokenizer(start=True)
    place = _locations(model)[1]
    if Path(place).name == "tokenizer" and Path(place).parent.is_dir() and not Path(place).is_dir():
        raise SpecError(f"{model!r} lacks tokenizer/; expected tokenizer.json and tokenizer_config.json in it")
    with _quiet():
        tokenizer = _fetch(AutoTokenizer, place)
    red, blue = tokenizer(["red", "blue"])["input_ids"]
    if red == blue:  # with missing files, transformers silently builds an empty vocabulary
        raise SpecError(f"the tokenizer of {place!r} has no vocabulary; expected a tokenizer.json beside its settings")
    tokenizer.truncation_side = "right"
    return tokenizer


def _locations(model: str) -> tuple[str, str]:
    """Locations of network and tokenizer: one folder, two folders of a diffusers pipeline, or a hub id."""
    folder = Path(model).expanduser()
    if (folder / "text_encoder").is_dir():
        return str(folder / "text_encoder"), str(folder / "tokenizer")
    if folder.is_dir():
        return str(folder), str(folder)
    if model.startswith(("/", ".", "~")) or model.count("/") > 1:
        near = nearest(folder.name, (p.name for p in folder.parent.glob("*/")))
        raise SpecError(f"there is no folder {model!r} with a text model; {near}")
    return model, model


def _fetch(part: Any, place: str, **options: Any) -> Any:
    """`from_pretrained` on local files, then on the hub with a timeout, so that nothing hangs offline.

    Code contained in a folder is never run (`trust_remote_code` is False).
    """
    options = {**options, "trust_remote_code": False}
    try:
        return part.from_pretrained(place, local_files_only=True, **options)
    except _LOAD_ERRORS as error:
        if Path(place).is_dir():
            _check_complete(Path(place))
            raise SpecError(
                f"{place!r} lacks a text model's config, weights or tokenizer: {_first_line(error)}"
            ) from error
    try:
        HfApi().model_info(place, timeout=_HUB_TIMEOUT)
        return part.from_pretrained(place, **options)
    except Exception as error:  # the hub's client does not wrap errors of its HTTP library
        raise SpecError(
            f"text model {place!r} is neither a folder here nor in the local Hugging Face cache, and the hub says: "
            f"{_first_line(error)}; get it with `hf download {place}` (where it is gated: accept its licence and "
            "`hf auth login` first), or give the folder that holds it"
        ) from error


def _sole_variant(folder: Path) -> str | None:
    """The variant that all weight files of a folder share, as fp16 in `model.fp16.safetensors`; None if they differ."""
    matches = (re.fullmatch(r"model(?:\.(\w+))?(?:-\d{5}-of-\d{5})?\.safetensors", p.name) for p in folder.glob("*"))
    variants = {match[1] for match in matches if match}
    return next(iter(variants)) if len(variants) == 1 else None


def _check_complete(folder: Path) -> None:
    """SpecError if a weight file is truncated."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            safe_open(path, "pt").__enter__().__exit__(None, None, None)
        except SafetensorError as error:
            raise SpecError(f"{path} is truncated or is no safetensors file: {error}") from error


def _check_pickles(folder: Path) -> None:
    """SpecError for a folder whose weights are pickles that hold more than tensors, or that cannot be read."""
    if any(folder.glob("*.safetensors")):  # which transformers prefers
        return
    for path in sorted(folder.glob("*.bin")):
        try:
            check_archive(path)
            torch.load(path, map_location="meta", weights_only=True)
        except Exception as error:  # on other bytes the reader raises anything
            raise SpecError(
                f"{path} is refused: it is cut short, or a pickle of more than tensors, which can run any code; ask "
                f"for safetensors ({_first_line(error)})"
            ) from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the progress bars and load reports of transformers, but not the bars of a download."""
    verbosity = logging.get_verbosity()
    hook = logging.set_tqdm_hook(lambda bar, args, options: bar(*args, **{**options, "disable": True}))
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_tqdm_hook(hook)
        logging.set_verbosity(verbosity)
