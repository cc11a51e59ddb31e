"""A Lightning checkpoint says what it is of by the options that it holds."""

from pathlib import Path

import lightning as L
import pytest

from sana_lab.config import specs
from sana_lab.config.specs import SpecError
from sana_lab.pretrained import restore

SYSTEMS = {
    "autoencoder": {"autoencoder": {"name": "vae", "widths": [8, 8, 8, 8], "depth": 1, "groups": 2}},
    "attributes": {"widths": [8, 8, 8]},
    "clip": {"width": 16, "layers": 1, "text_layers": 1, "heads": 2},
    "dit": {
        "text_encoder": {"name": "llm", "width": 16, "layers": 1},
        "dit": {"name": "sana", "dim": 32, "depth": 1, "cross_heads": 2},
    },
    "text2image": {
        "text_encoder": {"name": "llm", "width": 16, "layers": 1},
        "dit": {"name": "sana", "dim": 32, "depth": 1, "cross_heads": 2},
    },
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_is_known_by_its_options(name: str):
    system: L.LightningModule = specs.build("system", {"name": name, **SYSTEMS[name]})
    assert restore.system_with(dict(system.hparams), Path("a.ckpt")) == name


def test_options_of_no_system_are_refused():
    with pytest.raises(SpecError, match=r"a.ckpt is of no system of the lab: none has the options color"):
        restore.system_with({"color": 1}, Path("a.ckpt"))
