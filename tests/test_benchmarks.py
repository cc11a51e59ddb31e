"""The benchmarks run, hold peers to the same outputs, and refuse what they should; no time is judged here."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import INTERPRETED

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


@pytest.mark.filterwarnings("ignore")
def test_the_data_path_is_measured_on_files_of_its_own(common: Any, tmp_path: Path):
    import data

    for name, rows, captions in (("sana", 80, 2), ("large", 3000, 1)):
        (tmp_path / name).mkdir()
        data.write_index(tmp_path / name, rows, captions)
        data.write_parts(tmp_path / name)
    data.write_cache(tmp_path / "sana", tokens=6, width=32)
    read = data.read_speed(tmp_path / "sana", seconds=0.05)
    assert read["samples"] % data.BATCH == 0
    assert read["samples"] > 0
    data.write_hollow_cache(tmp_path / "large")
    assert data.opening(tmp_path / "large")["rows"] == 3000


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
def test_without_cuda_the_gpu_benchmark_says_so(common: Any, capsys: pytest.CaptureFixture[str]):
    import gpu

    assert gpu.main([]) == 0
    assert "no CUDA device" in capsys.readouterr().out


def test_the_gpu_cases_agree_with_their_definitions(common: Any):
    import gpu

    extent = gpu.Extent(torch.device("cpu"), quick=True, compiled=False)
    with torch.no_grad():
        between = (build() for build in gpu.between(extent))
        for case in (gpu.forward_case(extent, 24, 2), gpu.backward_case(extent, 24, 2), *between):
            assert max(common.error(s.run(case.inputs[0]), s.truth) for s in case.sides.values()) < 1e-5


def test_the_cases_of_fewer_bits_upsampling_and_tiles_agree(common: Any):
    import gpu

    extent = gpu.Extent(torch.device("cpu"), quick=True, compiled=False)
    with torch.no_grad():
        (products,) = (build() for build in gpu.products(extent))
        errors = {name: common.error(s.check(products.inputs[0]), s.truth) for name, s in products.sides.items()}
        assert errors["float32"] < 1e-5
        assert 0.01 < errors["fp8_simulated"] < 0.05 < products.tolerance
        upsample = gpu.upsample_case(extent, 6, 8, 4, "channels_last")
        assert set(upsample.sides) == {"separate", "folded"}
        tiles = gpu.tiles_case(extent, 128, 1, 2, 4)
        assert set(tiles.sides) == {"tiles of 2 x 2 latents", "whole"}
        for case in (upsample, tiles):
            assert max(common.error(s.run(case.inputs[0]), s.truth) for s in case.sides.values()) < 1e-5


@pytest.mark.slow
def test_forms_of_linear_attention_agree(common: Any):
    """In Triton's interpreter, so in a process of their own."""
    pytest.importorskip("triton")
    code = """
import common, gpu, torch
extent = gpu.Extent(torch.device("cpu"), quick=True, compiled=False)
for gradients, count in ((False, 2), (True, 4)):
    case = gpu.forms_case(extent, 40, gradients, heads=2)
    errors = {name: common.error(side.run(case.inputs[0]), side.truth) for name, side in case.sides.items()}
    assert len(errors) == count and max(errors.values()) < 1e-5, errors
"""
    environment = os.environ | INTERPRETED | {"PYTHONPATH": os.pathsep.join([str(FOLDER), str(FOLDER.parent)])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["step", "denoise", "decode", "whole"])
def test_the_gpu_benchmarks_models_are_diffusers(common: Any, name: str):
    import gpu

    with torch.no_grad():
        for build in gpu.SECTIONS[name](gpu.Extent(torch.device("cpu"), quick=True, compiled=False)):
            case = build()
            checks = {n: (s.check or s.run, s.truth) for n, s in case.sides.items()}
            errors = {n: common.error(check(case.inputs[0]), truth) for n, (check, truth) in checks.items()}
            assert max(errors.values()) <= (1e-2 if name == "whole" else 1e-5), errors
            assert case.tolerance <= common.LOOSEST


@pytest.mark.slow
def test_every_block_of_the_compiled_peer_is_compiled_and_equal(common: Any):
    import models

    peer = models.transformer(models.SIZES["0.6B"], 2)
    text = models.captions(5, 8)
    x = torch.randn(2, 32, 4, 4)
    with torch.no_grad():
        compiled = models.compiled_peer(peer, None, backend="eager")
        assert all(block._compiled_call_impl is not None for block in compiled.transformer_blocks)
        torch.testing.assert_close(models.peer_step(compiled, x, *text), models.peer_step(peer, x, *text))


def test_a_graphed_peer_is_the_peer_where_there_are_no_graphs(common: Any):
    import models

    def peer(x: torch.Tensor, tokens: torch.Tensor, *, timestep: torch.Tensor) -> tuple[torch.Tensor]:
        return (x * timestep[:, None] + tokens,)

    x, tokens, t = torch.randn(2, 3), torch.randn(2, 3), torch.rand(2)
    graphed = models.Graphed(peer, capture=lambda call: pytest.fail("captured on the CPU"))
    assert torch.equal(graphed(x, tokens, timestep=t)[0], x * t[:, None] + tokens)


def test_a_tolerance_that_zeros_would_pass_is_refused(common: Any):
    case = two_sided(common, torch.sin, torch.sin)._replace(tolerance=1.0)
    with pytest.raises(ValueError, match=r"expected at most 0\.1"):
        common.run_case(case, hurried(common))


def test_a_long_run_is_compared_by_its_short_check(common: Any):
    x = torch.randn(2, 8)
    sides = {
        "peer": common.Side(torch.cos, torch.sin(x), check=torch.sin),
        "ours": common.Side(torch.tan, torch.sin(x), check=torch.sin),
    }
    case = common.Case("case", sides, [common.Pair(common.SAME, "peer", "ours")], [x])
    (record,) = common.run_case(case, hurried(common))
    assert record["peer_error"] == record["ours_error"] == 0
    assert "times" in record


# --- the driver: sections in processes of their own


STAND_INS = """
import os, signal, time
import torch
from common import SAME, Case, Pair, Protocol, Side, run_case

COMMANDS = {"tests": ["python", "-c", "print('3 passed')"], "failing": ["python", "-c", "raise SystemExit(1)"]}

def two_sided(name, ours):
    x = torch.linspace(-1, 1, 64)[None]
    sides = {"peer": Side(torch.sin, torch.sin(x)), "ours": Side(ours, torch.sin(x))}
    return Case(name, sides, [Pair(SAME, "peer", "ours")], [x])

def good(): return two_sided("good", torch.sin)
def zeros(): return two_sided("zeros", torch.zeros_like)
def raising(): raise RuntimeError("CUDA error: an illegal memory access")
def crash(): os.kill(os.getpid(), signal.SIGSEGV)
def leaving(): os._exit(7)
def hanging(): time.sleep(600)
def sticky(): raise RuntimeError("device lost")
def last(): return two_sided("last", torch.sin)

SECTIONS = {"mixed": [good, raising, zeros, crash, leaving, hanging, last], "broken": [sticky, good], "more": [good]}

def context(rest): return None
def builders(section, context): return SECTIONS[section]
def label(build): return build.__name__
def run(build, context): return run_case(build(), Protocol(torch.device("cpu"), 0, 3, stretch_s=0.001))
def is_usable(context): return not os.environ.get("LOST")
"""


@pytest.fixture
def stand_ins(common: Any, tmp_path: Path) -> Any:
    """A place whose cases hang, crash, raise and return zeros."""
    import sections

    (tmp_path / "stand_ins.py").write_text(STAND_INS)
    paths = os.pathsep.join([str(tmp_path), str(FOLDER), str(FOLDER.parent)])
    return sections.Place("stand_ins", tmp_path / "out.jsonl", (), {"PYTHONPATH": paths})


@pytest.mark.slow
def test_what_hangs_crashes_or_returns_zeros_is_reported_and_the_rest_comes_back(stand_ins: Any):
    import sections

    plan = [sections.Section("mixed", 600, 30), sections.Section("tests", 60), sections.Section("failing", 60)]
    lines = sections.drive(plan, stand_ins)
    errors = {line["case"]: line["error"] for line in lines if "error" in line}
    assert errors["raising"] == "RuntimeError: CUDA error: an illegal memory access"
    assert errors["crash"] == "killed by signal 11"
    assert errors["leaving"] == "ended with status 7"
    assert errors["hanging"].startswith("stopped after 3")
    assert len(errors) == 4
    records = {line["case"]: line for line in lines if "peer" in line}
    assert {"good", "zeros", "last"} == set(records)
    assert records["zeros"]["why"] == "outputs differ"
    assert records["zeros"]["ratio"] is None
    assert "times" in records["good"]
    assert "times" in records["last"]
    commands = {line["section"]: line["status"] for line in lines if "status" in line}
    assert commands == {"tests": 0, "failing": 1}


@pytest.mark.slow
def test_a_device_that_is_lost_gets_a_new_process(stand_ins: Any):
    import sections

    place = stand_ins._replace(environment={**stand_ins.environment, "LOST": "1"})
    lines = sections.drive([sections.Section("broken", 120, 60)], place)
    assert [line["case"] for line in lines if "peer" in line] == ["good"]
    assert "RuntimeError: device lost" in [line.get("error") for line in lines]


def test_a_budget_cuts_from_the_end_and_says_so(stand_ins: Any, monkeypatch: pytest.MonkeyPatch):
    import sections

    spent = iter([0.0, 0.0, 0.0, 100.0, 200.0])
    monkeypatch.setattr(sections.time, "monotonic", lambda: next(spent))
    ran: list[str] = []
    monkeypatch.setattr(sections, "_run_section", lambda section, place, end: ran.append(section.name))
    plan = [sections.Section(name, 60) for name in ("mixed", "tests", "more")]
    lines = sections.drive(plan, stand_ins, 102)
    assert ran == ["mixed"]
    assert [(line["section"], line["why"]) for line in lines] == [
        ("tests", "not run: the budget of 102 s is used up"),
        ("more", "not run: the budget of 102 s is used up"),
    ]


def test_a_line_cut_off_by_a_kill_is_left_out(common: Any, tmp_path: Path):
    import sections

    out = tmp_path / "out.jsonl"
    sections.append(out, {"case": 1})
    with out.open("a") as file:
        file.write('{"case": 2, "rat')
    assert sections.read(out) == [{"case": 1}]


def test_the_two_calls_fit_their_limits_and_name_sections(common: Any):
    import gpu

    for plan, limit in (("first", 240), ("second", 480)):
        assert sum(section.limit_s for section in gpu.PLANS[plan]) <= limit
        assert {section.name for section in gpu.PLANS[plan]} <= gpu.SECTIONS.keys() | gpu.COMMANDS.keys()
    assert {s.name for s in gpu.PLANS["all"]} == gpu.SECTIONS.keys() | gpu.COMMANDS.keys()
    assert len(gpu.KERNELS) >= 4


def test_the_last_output_is_a_table(common: Any, capsys: pytest.CaptureFixture[str]):
    import gpu

    records = common.run_case(two_sided(common, torch.sin, torch.sin), hurried(common, 3))
    gpu.report([*records, {"section": "step", "case": "1.6B", "error": "stopped after 60 s"}])
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].endswith("peer / ours")
    assert "step: 1.6B stopped after 60 s" in printed


def test_wallpapers_are_split_by_name_and_cut_unscaled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import numpy as np
    from PIL import Image

    monkeypatch.syspath_prepend(str(FOLDER))
    import wallpapers

    monkeypatch.setattr(wallpapers, "SIZE", (96, 54))
    monkeypatch.setattr(wallpapers, "TILE", 16)
    for i, (width, height) in enumerate([(128, 72), (64, 40), (96, 54), (128, 72), (128, 72)]):
        for scale in (1, 2):
            path = tmp_path / f"in/{'ABCDE'[i]}/contents/images/{scale}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(i).integers(0, 256, (height // scale, width // scale, 3), np.uint8)
            Image.fromarray(pixels).save(path)
    train, test = wallpapers.write(tmp_path / "in", tmp_path / "out")
    assert (train, test) == (["B", "C", "D"], ["A", "E"])
    assert {np.asarray(Image.open(p)).shape for p in (tmp_path / "out/test").glob("*")} == {(54, 96, 3)}
    assert len(list((tmp_path / "out/train").glob("*"))) == 3 * wallpapers.TILES
    whole = np.asarray(Image.open(tmp_path / "in/B/contents/images/1.png"))
    windows = np.lib.stride_tricks.sliding_window_view(whole, (16, 16, 3)).reshape(-1, 16, 16, 3)
    square = np.asarray(Image.open(tmp_path / "out/train/B_00.png"))
    assert (windows == square).all((1, 2, 3)).any()
    with pytest.raises(ValueError, match="holds no wallpaper of 96x54 pixels"):
        wallpapers.write(tmp_path / "out", tmp_path / "none")
