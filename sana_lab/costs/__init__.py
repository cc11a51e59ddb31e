"""Measurement of time, memory, FLOPs and energy."""
