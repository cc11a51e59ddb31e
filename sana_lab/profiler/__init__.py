"""Where the time of a training step or of sampling goes."""
