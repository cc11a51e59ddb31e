"""Released weights, of one part or of a pipeline, as our modules."""

from pathlib import Path
from typing import Any

from sana_lab.checkpoints import formats
from sana_lab.checkpoints.build import build
from sana_lab.pretrained import parts


def load_released(path: Path, kind: str | None, text: bool = True, **options: Any) -> tuple[Any, tuple[str, ...]]:
    """The part or text2image system of a released file or folder, and notes on choices and omissions.

    Without `text` a pipeline's text encoder stays on the meta device. SpecError.
    """
    if kind == "text_encoder" or (kind is None and (path / "model_index.json").is_file()):
        return _load_text_or_pipeline(path, kind, text, **options), ()
    weights = formats.recognise(path, kind, **options)
    return parts.from_released(weights, kind), weights.notes


def _load_text_or_pipeline(path: Path, kind: str | None, text: bool, **options: Any) -> Any:
    from sana_lab.pretrained import pipeline

    if kind is None:
        return pipeline.load_pipeline(path, text=text, **options)
    return build("text_encoder", pipeline.text_encoder_spec(path, options.get("variant")))
