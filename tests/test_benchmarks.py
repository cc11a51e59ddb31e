"""The benchmarks run, hold peers to the same outputs, and refuse what they should; no time is judged here."""

from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def common(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("diffusers")
    monkeypatch.syspath_prepend(str(FOLDER))
    import common

    return common


def hurried(common: Any) -> Any:
    return common.Protocol(torch.device("cpu"), warmup=0, repeats=1, stretch_s=0.0)


def test_attention_cases_agree_with_their_definitions(common: Any, capsys: pytest.CaptureFixture[str]):
    import cpu

    records = [common.run_case(case, hurried(common)) for case in cpu.attention_cases(24)]
    assert [r["tier"] for r in records] == [common.OTHER, common.SAME]
    assert all(max(r["peer_error"], r["ours_error"]) < 1e-5 for r in records)
    assert all(r["times"]["ours"]["n"] == 1 for r in records)
    printed = capsys.readouterr().out
    assert printed.index("error:") < printed.index(" ms ")


def test_outputs_that_differ_are_not_timed(common: Any):
    x = torch.randn(2, 8)
    case = common.Case("case", common.SAME, "peer", "ours", torch.sin, torch.cos, [x], x.sin(), x.sin())
    record = common.run_case(case, hurried(common))
    assert record["why"] == "outputs differ"
    assert record["ratio"] is None
    assert "times" not in record


def test_short_calls_are_repeated_within_one_reading(common: Any):
    x = torch.randn(2, 8)
    case = common.Case("case", common.SAME, "peer", "ours", torch.sin, torch.sin, [x], x.sin(), x.sin())
    record = common.run_case(case, hurried(common)._replace(stretch_s=0.01))
    assert record["inner"] > 5
    assert record["times"]["peer"]["median_s"] < 0.01


def test_inputs_rotate(common: Any):
    seen: list[int] = []
    call = common.rotating(seen.append, [1, 2, 3], inner=2)
    call(), call()
    assert seen == [1, 2, 3, 1]


@pytest.mark.slow
def test_a_dit_step_is_diffusers_step(common: Any):
    step = common.Step(1, 4, torch.float32, torch.device("cpu"), tolerance=1e-4)
    x = torch.randn(2, 32, 4, 4)
    with torch.no_grad():
        tiers = [(case.tier, common.error(case.ours(x), case.peer(x))) for case in step.cases()]
    assert [tier for tier, _ in tiers] == [common.SAME, common.EXACT, common.EXACT]
    assert max(e for _, e in tiers) < 1e-5


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_cuda_the_gpu_benchmark_says_so(common: Any, capsys: pytest.CaptureFixture[str], monkeypatch: Any):
    import gpu

    monkeypatch.setattr("sys.argv", ["gpu.py"])
    assert gpu.main() == 0
    assert "no CUDA device" in capsys.readouterr().out
