"""The Triton kernel: its cases under the interpreter and on a GPU, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sana_lab.ops.linear_attention import linear_attention

CASES = Path(__file__).with_name("cases_linear_attention_triton.py")
pytest.importorskip("triton")


def run_cases(select: str, **environment: str) -> None:
    """Run the cases that match a marker expression in a new process; its failures are this test's."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", select, str(CASES)]
    done = subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=False, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout, done.stdout


def test_interpreted() -> None:
    run_cases("not gpu and not slow", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")


@pytest.mark.slow
def test_interpreted_through_inductor() -> None:
    run_cases("slow and not gpu", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    run_cases("gpu or not gpu", CUBLAS_WORKSPACE_CONFIG=":4096:8")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes CPU tensors")
def test_explicit_triton_on_the_cpu_says_what_it_needs() -> None:
    q, k, v = torch.zeros(1, 2, 3, 1, 4).unbind(2)
    with pytest.raises(ValueError, match=r"needs CUDA tensors, or TRITON_INTERPRET=1 .* these tensors are on cpu"):
        linear_attention(q, k, v, backend="triton")
