"""Released and exported weights. `load(PATH)` gives the module that a file or folder holds."""

from sana_lab.pretrained.loading import load

__all__ = ["load"]
