"""Networks without memory: shapes as they are with it, and no compiler is imported."""

import subprocess
import sys

import tiny
import torch
from torch import nn

from sana_lab.checkpoints.meta import on_meta
from sana_lab.config import specs


def test_shapes_are_those_of_a_real_one():
    with on_meta():
        empty = specs.build("dit", tiny.TWO_BLOCKS, channels=4, text_dim=12)
    real = tiny.dit()
    assert {k: v.shape for k, v in empty.state_dict().items()} == {k: v.shape for k, v in real.state_dict().items()}
    assert all(p.is_meta for p in empty.parameters())


def test_real_tensors_are_initialised():
    with on_meta():
        tensor = nn.init.normal_(torch.zeros(100, device="cpu"))
    assert tensor.std() > 0.5


def test_the_compiler_is_not_imported():
    code = (
        "import sys; from torch import nn; from sana_lab.checkpoints.meta import on_meta\n"
        "with on_meta(): nn.Embedding(4, 4); nn.Linear(4, 4)\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
