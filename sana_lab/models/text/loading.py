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
from transformers.utils import logging

from sana_lab.config.specs import SpecError, nearest
from sana_lab.models.text.configs import KNOWN
from sana_lab.models.text.tokenizer import offline_tokenizer

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
"""`auto` is what the weights are stored in, and float32 for a tiny model."""

T5_FAMILY = ("t5", "mt5", "umt5")

_FAILURES = (OSError, ValueError, ImportError, RuntimeError, SafetensorError)
_SECONDS = 10.0  # for the hub to answer


def tiny_dtype(dtype: Dtype) -> torch.dtype:
    return torch.float32 if dtype == "auto" else getattr(torch, dtype)


def read_config(model: str, drawn: bool = False) -> PreTrainedConfig:
    """The configuration of a folder or hub id; on the meta device, and where weights are drawn, as known here.

    SpecError says what was tried and how to get the model.
    """
    if _only_shape(model, drawn):
        return AutoConfig.for_model(**KNOWN[model])
    with _quiet():
        return _fetch(AutoConfig, _places(model)[0])


def _only_shape(model: str, drawn: bool) -> bool:
    """Whether the shape is all that is asked for, and is known without any file. SpecError where it should be."""
    if drawn and model not in KNOWN:
        raise SpecError(
            f"the shape of {model!r} is not known here, so its weights cannot be drawn; {nearest(model, KNOWN)}"
        )
    shape = drawn or torch.get_default_device().type == "meta"
    return shape and model in KNOWN and not Path(model).is_dir()


def load_network(auto: Any, model: str, dtype: Dtype, variant: str | None = None, drawn: bool = False) -> Any:
    """The network that the transformers class `auto` reads, for evaluation; without weights on the meta device.

    `variant` chooses among several files, such as fp16; where there is one alone it is taken. SpecError also where the
    files lack weights, which transformers would draw at random; `drawn` asks for that, for a known shape.
    """
    if drawn:
        return auto.from_config(
            read_config(model, drawn), dtype=None if dtype == "auto" else getattr(torch, dtype)
        ).eval()
    place = _places(model)[0]
    variant = variant or _sole_variant(Path(place))
    with _quiet():
        if torch.get_default_device().type == "meta":
            return auto.from_config(read_config(model))
        network, info = _fetch(auto, place, dtype=dtype, variant=variant, output_loading_info=True)
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise SpecError(f"the weights of {place!r} are incomplete: there is no {missing}")
    return network


def load_tokenizer(model: str, drawn: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder or hub id, cutting at the right; the offline one where the network has no numbers, or
    drawn ones, and its shape is known here. SpecError where its vocabulary is missing."""
    if _only_shape(model, drawn):
        return offline_tokenizer(start=True)
    place = _places(model)[1]
    if Path(place).name == "tokenizer" and Path(place).parent.is_dir() and not Path(place).is_dir():
        raise SpecError(f"{model!r} lacks tokenizer/; expected tokenizer.json and tokenizer_config.json in it")
    with _quiet():
        tokenizer = _fetch(AutoTokenizer, place)
    red, blue = tokenizer(["red", "blue"])["input_ids"]
    if red == blue:  # where its files are missing, transformers makes an empty one in silence
        raise SpecError(f"the tokenizer of {place!r} has no vocabulary; expected a tokenizer.json beside its settings")
    tokenizer.truncation_side = "right"
    return tokenizer


def _places(model: str) -> tuple[str, str]:
    """Where network and tokenizer lie: one folder, two of a diffusers pipeline's, or a hub id."""
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
    """Files of this machine first; the hub only if it answers that it has the model, so that nothing hangs offline."""
    try:
        return part.from_pretrained(place, local_files_only=True, **options)
    except _FAILURES as error:
        if Path(place).is_dir():
            _check_whole(Path(place))
            raise SpecError(f"{place!r} lacks a text model's config, weights or tokenizer: {_line(error)}") from error
    try:
        HfApi().model_info(place, timeout=_SECONDS)
        return part.from_pretrained(place, **options)
    except Exception as error:  # the hub's client lets the errors of its HTTP library through
        raise SpecError(
            f"text model {place!r} is neither a folder here nor in the local Hugging Face cache, and the hub says: "
            f"{_line(error)}; get it with `hf download {place}` (where it is gated: accept its licence and "
            "`hf auth login` first), or give the folder that holds it"
        ) from error


def _sole_variant(folder: Path) -> str | None:
    """The variant of which all weights in a folder are, as `model.fp16.safetensors`; None where there is another."""
    named = (re.fullmatch(r"model(?:\.(\w+))?(?:-\d{5}-of-\d{5})?\.safetensors", p.name) for p in folder.glob("*"))
    found = {match[1] for match in named if match}
    return next(iter(found)) if len(found) == 1 else None


def _check_whole(folder: Path) -> None:
    """SpecError where a file of weights is cut short."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            safe_open(path, "pt").__enter__().__exit__(None, None, None)
        except SafetensorError as error:
            raise SpecError(f"{path} is cut short or is no safetensors file: {error}") from error


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars and no load reports of transformers meanwhile; the bars of a download stay."""
    verbosity = logging.get_verbosity()
    hook = logging.set_tqdm_hook(lambda bar, args, options: bar(*args, **{**options, "disable": True}))
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_tqdm_hook(hook)
        logging.set_verbosity(verbosity)
