"""Training of an experiment: trainer, callbacks, checks before the first step."""
