"""A random Inception in the released file's format, written once for all tests that look through it."""

from pathlib import Path

import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from sana_lab.evaluation.extractors.inception import WEIGHTS


class Drawn(FeatureExtractorInceptionV3):
    """Random weights, drawn where a file's would be loaded; PyTorch's default leaves the features without spread."""

    def load_state_dict(self, *args):
        for module in self.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight)


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """95 MB, away when the tests have run."""
    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "empty.pth")
    torch.manual_seed(0)
    network = Drawn("drawn", ["2048"], feature_extractor_weights_path=str(folder / "empty.pth"))
    torch.save(network.state_dict(), folder / WEIGHTS)
    yield folder / WEIGHTS
    (folder / WEIGHTS).unlink()
