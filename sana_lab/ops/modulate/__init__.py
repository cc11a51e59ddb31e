"""Gated residual, LayerNorm and modulation (adaLN) between the layers of a transformer block."""

from sana_lab.ops.modulate.reference import add as add
from sana_lab.ops.modulate.reference import add_modulate as add_modulate
from sana_lab.ops.modulate.reference import modulate as modulate
