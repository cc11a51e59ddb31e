"""Released weights, of one part or of a pipeline, as our modules."""

from pathlib import Path
from typing import Any

from sana_lab.checkpoints import formats
from sana_lab.checkpoints.build import build
from sana_lab.pretrained import parts


def load_released(path: Path, kind: str | None, text: bool = True, **options: Any) -> tuple[Any, tuple[str, ...]]:
    """The part or text2image system of a released file or folder, and notes on what was chosen or left out.

    Without `text` a pipeline's text encoder stays on the meta device. SpecError.
    """
    from sana_lab.pretrained import pipeline

    if kind == "text_encoder":
        return build("text_encoder", pipeline.text_encoder_spec(path, options.get("variant"))), ()
    if kind is None and (path / "model_index.json").is_file():
        return pipeline.load_pipeline(path, text=text, **options), ()
    weights = formats.recognise(path, kind, **options)
    return parts.from_released(weights, kind), weights.notes
