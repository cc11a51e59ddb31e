"""A store with runs in it, for the server and its view."""

import shutil

import pytest
import torch

from sana_lab.tracking.store import Store


@pytest.fixture(scope="module")
def store(tmp_path_factory, empty_database):
    """A sweep of two trials with images."""
    store = Store(tmp_path_factory.mktemp("home"))
    shutil.copy(empty_database, store.database)
    parent = store.start_run("sweep", "sweep")
    for i in range(2):
        child = store.start_run("sweep", f"child {i}", parent=parent)
        store.log_params(child, {"attention": str(i), "depth": 2})
        store.log_metrics(child, {"geneval": 0.5 + i, "train/loss": 0.1})
        for step in range(2 + 2 * i):
            store.log_image(child, "samples/held out", torch.zeros(3, 8, 8, dtype=torch.uint8), step=step)
        store.finish(child)
    store.finish(parent)
    return store
