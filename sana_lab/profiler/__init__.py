"""Time of a training step and of sampling, by phase and operator."""
