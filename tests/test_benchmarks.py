"""The benchmarks run, hold peers to the same outputs, and refuse what they should; no time is judged here."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks"
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers on numpy 2


@pytest.fixture
def common(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("diffusers")
    monkeypatch.syspath_prepend(str(FOLDER))
    import common

    return common


def hurried(common: Any, repeats: int = 1) -> Any:
    return common.Protocol(torch.device("cpu"), warmup=0, repeats=repeats, stretch_s=0.0)


def two_sided(common: Any, peer: Any, ours: Any, truth: Any = torch.sin) -> Any:
    x = torch.randn(2, 8)
    sides = {"peer": common.Side(peer, truth(x)), "ours": common.Side(ours, truth(x))}
    return common.Case("case", sides, [common.Pair(common.SAME, "peer", "ours")], [x])


def test_attention_cases_agree_with_their_definitions(common: Any, capsys: pytest.CaptureFixture[str]):
    import cpu

    records = common.run_case(cpu.attention_case(24), hurried(common))
    assert [r["tier"] for r in records] == [common.OTHER, common.SAME]
    assert all(max(r["peer_error"], r["ours_error"]) < 1e-5 for r in records)
    assert all(r["times"]["ours"]["n"] == 1 for r in records)
    printed = capsys.readouterr().out
    assert printed.index("error:") < printed.index(" ms ")


def test_outputs_that_differ_are_not_timed(common: Any):
    (record,) = common.run_case(two_sided(common, torch.sin, torch.cos), hurried(common))
    assert record["why"] == "outputs differ"
    assert record["ratio"] is None
    assert "times" not in record


def test_outputs_that_are_no_numbers_are_not_timed(common: Any):
    (record,) = common.run_case(two_sided(common, torch.sin, lambda x: x * float("nan")), hurried(common))
    assert record["ratio"] is None
    assert record["why"] == "outputs differ"


def test_one_pair_gives_no_ratio(common: Any):
    (record,) = common.run_case(two_sided(common, torch.sin, torch.sin), hurried(common))
    assert record["ratio"] is None
    assert record["why"] == "1 rounds, and 3 are needed"


def test_a_peer_that_differs_from_itself_gives_no_ratio(common: Any, monkeypatch: pytest.MonkeyPatch):
    ticks = iter([1.0, 1.0] + [1.0, 1.0, 1.2] * 3)  # how long the readings take: stretching, then rounds of three
    clock = lambda call: (call(), (next(ticks, 1.0), None))[1]  # noqa: E731
    case = two_sided(common, torch.sin, torch.sin)
    (record,) = common.run_case(case, hurried(common, 3)._replace(clock=clock))
    assert record["ratio"] is None
    assert record["why"].startswith("peer differs from itself by 16.7%")


def test_short_calls_are_repeated_within_one_reading(common: Any):
    case = two_sided(common, torch.sin, torch.sin)
    (record,) = common.run_case(case, hurried(common)._replace(stretch_s=0.01))
    assert min(record["inner"].values()) > 5
    assert record["times"]["peer"]["median_s"] < 0.01


def test_thread_clock_counts_work_and_not_waiting(common: Any):
    slept, _ = common.thread_clock(lambda: time.sleep(0.2))
    worked, _ = common.thread_clock(lambda: sum(range(10**6)))
    assert 0 <= slept < 0.05
    assert worked > 0


def test_inputs_rotate(common: Any):
    seen: list[int] = []
    call = common.rotating(seen.append, [1, 2, 3], inner=2)
    call(), call()
    assert seen == [1, 2, 3, 1]


def test_what_is_printed_last_has_a_line_for_each_ratio(common: Any):
    records = common.run_case(two_sided(common, torch.sin, torch.sin), hurried(common, 3))
    head, line = common.table(records).splitlines()
    assert head.split()[:2] == ["case", "tier"]
    assert line.endswith("peer / ours")


def test_an_image_is_the_sum_of_its_pieces(common: Any):
    import cpu

    def record(case: str, ours: str, peer_s: float, ours_s: float) -> dict[str, Any]:
        times = {"peer": {"median_s": peer_s}, "ours": {"median_s": ours_s}}
        return {"case": case, "peer": cpu.PEER, "ours": ours, "ratio": peer_s / ours_s, "times": times}

    pieces = [
        record("text encoding, 26 layers", "ours", 20.0, 2.0),
        record("0.6B step, 28 blocks, 512 px", cpu.SAMPLING, 5.0, 4.0),
        record("DC-AE f32c32 decode, 512 px", "ours", 18.0, 12.0),
    ]
    found = cpu.image(pieces)
    assert (found["peer_s"], found["ours_s"]) == (20 + 20 * 5 + 18, 2 + 20 * 4 + 12)
    assert cpu.image(pieces[:2])["ratio"] is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["step", "decode", "text", "whole"])
def test_our_parts_are_diffusers(common: Any, name: str):
    import cpu

    with torch.no_grad():
        for case in cpu.CASES[name](cpu.Extent(quick=True, full=False)):
            errors = {n: common.error(s.run(case.inputs[0]), s.truth) for n, s in case.sides.items()}
            assert max(errors.values()) <= (1e-2 if name == "whole" else 1e-5), errors


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_cuda_the_gpu_benchmark_says_so(common: Any, capsys: pytest.CaptureFixture[str], monkeypatch: Any):
    import gpu

    monkeypatch.setattr("sys.argv", ["gpu.py"])
    assert gpu.main() == 0
    assert "no CUDA device" in capsys.readouterr().out


def test_the_gpu_cases_agree_with_their_definitions(common: Any):
    import gpu

    extent = gpu.Extent(torch.device("cpu"), quick=True, compiled=False)
    with torch.no_grad():
        for case in (gpu.forward_case(extent, 24, 2), gpu.backward_case(extent, 24, 2), *gpu.between(extent)):
            assert max(common.error(s.run(case.inputs[0]), s.truth) for s in case.sides.values()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["step", "denoise", "decode", "whole"])
def test_the_gpu_benchmarks_models_are_diffusers(common: Any, name: str):
    import gpu

    with torch.no_grad():
        for case in gpu.SECTIONS[name](gpu.Extent(torch.device("cpu"), quick=True, compiled=False)):
            errors = {n: common.error(s.run(case.inputs[0]), s.truth) for n, s in case.sides.items()}
            assert max(errors.values()) <= (1e-2 if name == "whole" else 1e-5), errors
