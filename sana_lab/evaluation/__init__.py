"""Measures: what a model draws, and what drawing costs."""
