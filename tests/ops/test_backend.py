"""The choice between plain torch and Triton kernels."""

import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from sana_lab.ops.backend import check_launchable, choose, is_direct, missing_for, on_device


def test_backends() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose("auto", cpu) == "torch"
    assert choose("torch", cuda) == "torch"
    assert choose("auto", cuda, "tea") == "torch"
    with pytest.raises(ValueError, match=r"backend 'tritn' is unknown; expected one of auto, torch, triton"):
        choose("tritn", cpu)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backend 'triton' needs tea"):
        choose("triton", cuda, "tea")


def test_backends_with_and_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    if sys.platform == "linux":
        assert choose("auto", cuda) == choose("triton", cuda) == "triton"
    monkeypatch.setitem(sys.modules, "triton", None)  # what makes `import triton` fail
    assert choose("auto", cuda) == "torch"
    with pytest.raises(ValueError, match="needs the package triton"):
        choose("triton", cuda)


def test_where_kernels_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert (missing_for(cuda), missing_for(cpu)) == (None, "a CUDA device, not cpu")
    monkeypatch.setitem(sys.modules, "triton", None)
    assert missing_for(cuda) == "the package triton (torch for CUDA brings it)"
    check_launchable(cuda, False), check_launchable(torch.device("meta"), False), check_launchable(cpu, True)
    with pytest.raises(ValueError, match=r"needs CUDA tensors, .* on mps, which backend 'torch' takes"):
        check_launchable(torch.device("mps"), True)


def test_triton_is_imported_only_when_used() -> None:
    code = """
import sys, torch
before = {name for name in sys.modules if name.startswith("triton")}
from sana_lab.ops.linear_attention import Norms, linear_attention, qkv_linear_attention
from sana_lab.ops.mix_ffn import mix_ffn
from sana_lab.ops.modulate import modulate
linear_attention(*torch.zeros(1, 2, 3, 1, 4).unbind(2))
mix_ffn(torch.zeros(1, 2, 2, 4), torch.zeros(4, 1, 3, 3), torch.zeros(4))
modulate(torch.zeros(1, 2, 2, 4), torch.zeros(1, 4), torch.zeros(1, 4))
assert {name for name in sys.modules if name.startswith("triton")} == before
assert not [name for name in sys.modules if name.startswith("sana_lab.ops") and name.endswith(("kernels", "launch"))]
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_kernel_is_launched_without_its_operator_where_nothing_watches() -> None:
    """Not under autograd, function transforms, compilers, counters or fake tensors, nor on the meta device."""
    x, answers = torch.zeros(2), list[bool]()
    assert not is_direct(x)
    with torch.no_grad():
        assert is_direct(x)
        assert not is_direct(x.to("meta"))
        assert not is_direct(torch.nn.Parameter(x))
        with FlopCounterMode(display=False):
            assert not is_direct(x)
        with FakeTensorMode() as mode:
            assert not is_direct(mode.from_tensor(x))
        torch.func.vmap(lambda row: answers.append(is_direct(row)) or row)(x)
    with torch.inference_mode():
        assert is_direct(x)
    assert answers == [False]


def test_a_compiled_function_holds_the_operator() -> None:
    with torch.no_grad():
        traced = torch.compile(lambda t: t + (1 if is_direct(t) else 2), backend="eager", fullgraph=True)
        assert traced(torch.zeros(2)).tolist() == [2, 2]


def test_the_device_of_a_tensor_of_the_host() -> None:
    with on_device(torch.zeros(1)) as nothing:
        assert nothing is None
