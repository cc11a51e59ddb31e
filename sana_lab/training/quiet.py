"""Silence about what a user cannot act on: Lightning's advertising and devices, warnings of intended settings."""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

WARNINGS = (
    ".*does not have many workers.*",
    ".*IterableDataset.*__len__.*",
    ".*Checkpoint directory.*exists.*",
    ".*GPU available but not used.*",
    ".*LeafSpec.*",
    ".*max_epochs.*",
    ".*litlogger.*",
    ".*isinstance.treespec.*",
    ".*in eval mode at the start of training.*",
    ".*have no `validation_step`.*",
    ".*callbacks used to create the checkpoint.*",
    ".*Grad strides do not match.*",
    ".*all_gather is deprecated.*",
    ".*`srun` command is available.*",
)

MESSAGES = re.compile(r"litlogger|litmodels|PU available: |`Trainer.fit` stopped|Restor(ing|ed) .*checkpoint")

LOGGERS = ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero")


def _is_for_users(record: logging.LogRecord) -> bool:
    return record.levelno > logging.INFO or not MESSAGES.search(record.getMessage())


@contextmanager
def quiet() -> Iterator[None]:
    """Context without these warnings and messages. Messages above the level INFO stay."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    with warnings.catch_warnings():
        for message in WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        for logger in loggers:
            logger.addFilter(_is_for_users)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeFilter(_is_for_users)
