"""Released, imported and trained models in, folders for diffusers out. `load(PATH)` gives the module."""

from sana_lab.pretrained.loading import load

__all__ = ["load"]
