"""Residual, gate, LayerNorm and modulation as one operator."""
