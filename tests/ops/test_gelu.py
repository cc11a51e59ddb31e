"""GELU by the logistic function: equal to PyTorch's tanh form, taken in inference alone."""

import pytest
import torch
import torch.nn.functional as F

from sana_lab.ops import gelu as module


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_it_is_pytorchs_tanh_form(dtype: torch.dtype, tolerance: float):
    x = torch.cat([torch.linspace(-30, 30, 40001, dtype=dtype), torch.tensor([0.0, -0.0, 1e30, -1e4], dtype=dtype)])
    found, truth = module.by_logistic(x), F.gelu(x.double(), approximate="tanh")
    torch.testing.assert_close(found.double(), truth, rtol=tolerance, atol=tolerance)
    assert found.dtype == dtype


def test_it_is_taken_for_many_elements_in_inference(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "by_logistic", lambda _: None)
    x = torch.randn(module.MIN_ELEMENTS)
    assert module.gelu(x) is not None  # autograd is on
    with torch.inference_mode():
        assert module.gelu(x) is None
        assert module.gelu(x[1:]) is not None
        assert module.gelu(x.bfloat16()) is not None
