"""Training of an experiment: trainer, callbacks, checks before the first step."""

PICTURE = "training_samples.png"
"""Name of the picture that changes during a training within a time, in a model's folder and as a run's artifact."""

VALIDATION = "val_loss"
"""The metric of a training's validations; other metrics on its way are those of points."""


def tenths(seconds: float) -> int:
    """A time as units of progress."""
    return max(1, round(10 * seconds))
