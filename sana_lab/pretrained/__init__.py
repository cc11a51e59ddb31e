"""Loading of released, imported and trained models (`load(PATH)`), and export to diffusers folders."""

from sana_lab.pretrained.loading import load

__all__ = ["load"]
