"""What lies between the layers of a transformer block: gated residual, LayerNorm, modulation."""

from sana_lab.ops.modulate.reference import add as add
from sana_lab.ops.modulate.reference import add_modulate as add_modulate
from sana_lab.ops.modulate.reference import modulate as modulate
