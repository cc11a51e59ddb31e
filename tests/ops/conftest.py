"""Fixtures for the case files of kernels."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def poison() -> Iterator[None]:
    """NaN in whatever `empty` returns, so that an output left unwritten shows."""
    from kernel_comparison import DEVICE

    torch.use_deterministic_algorithms(True)
    assert torch.zeros(1, device=DEVICE).new_empty(99).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
