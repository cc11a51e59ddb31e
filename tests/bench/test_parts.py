"""Times of an image from parts: rounds, sums and intervals, with a clock of made-up seconds."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from sana_lab.bench.parts import LONG_S, Part, check_memory, columns, read, time_parts
from sana_lab.bench.probes import ProbeSettings
from sana_lab.costs.timing import Call

CPU = torch.device("cpu")


class Machine:
    """Parts that take a number of seconds each, and the clock that says so; it notes what runs."""

    def __init__(self, seconds: dict[str, list[float]]) -> None:
        self.seconds, self.current, self.log = seconds, "", list[str]()

    def part(self, name: str, stage: str = "denoise", calls: float = 1, size: int = 0) -> Part:
        @contextmanager
        def allocate() -> Iterator[Call]:
            assert not self.current, "one part at a time"
            self.current = name
            yield lambda: None
            self.current = ""

        return Part(stage, name, name, calls, size, allocate)

    def clock(self, call: Call) -> tuple[float, None]:
        self.log.append(self.current)
        times = self.seconds[self.current]
        return times.pop(0) if len(times) > 1 else times[0], None


def settings(repeats: int) -> ProbeSettings:
    return ProbeSettings(CPU, repeats, 1)


def test_readings_are_multiplied_by_calls_and_added_by_stage():
    machine = Machine({"text": [3.0], "block": [5.0], "ends": [2.5], "decoder": [7.0]})
    parts = [
        machine.part("text", "text"),
        machine.part("block", calls=20 * 28),
        machine.part("ends", calls=20),
        machine.part("decoder", "decode"),
    ]
    rounds = time_parts(parts, settings(3), 1e9, machine.clock, {})
    assert [r.total for r in rounds] == [3 + 20 * (28 * 5 + 2.5) + 7] * 3
    assert (rounds[0].text, rounds[0].denoise, rounds[0].decode) == (3, 20 * (28 * 5 + 2.5), 7)
    assert machine.log == ["text", "block", "ends", "decoder"] * 3  # in turns


def test_equal_parts_are_timed_once_also_by_the_next_row():
    machine = Machine({"shared": [4.0], "own": [6.0], "other": [8.0]})
    readings: dict[str, list[float]] = {}
    shared = machine.part("shared", "decode")
    time_parts([machine.part("own"), shared, shared], settings(2), 1e9, machine.clock, readings)
    (first, second) = time_parts([machine.part("other"), shared], settings(2), 1e9, machine.clock, readings)
    assert machine.log.count("shared") == 2
    assert first == second == (0, 8.0, 4.0)


def test_parts_are_allocated_and_read_without_gradients():
    modes: list[bool] = []

    @contextmanager
    def allocate() -> Iterator[Call]:
        modes.append(torch.is_grad_enabled())
        yield lambda: modes.append(torch.is_grad_enabled())

    def clock(call: Call) -> tuple[float, None]:
        call()
        return 3.0, None

    with torch.enable_grad():
        time_parts([Part("denoise", "block", "block", 1, 0, allocate)], settings(2), 1e9, clock, {})
    assert modes == [False] * 4


def test_no_round_begins_beyond_the_time_but_the_first_two():
    machine = Machine({"slow": [60.0]})
    assert len(time_parts([machine.part("slow")], settings(7), 30, machine.clock, {})) == 2
    assert len(time_parts([machine.part("slow")], settings(7), 200, machine.clock, {})) == 4


def test_a_short_call_warms_up_and_repeats_and_a_long_one_does_not():
    machine = Machine({"": [0.5, 0.02, 9.0]})
    assert read(lambda: None, machine.clock) == 0.02  # 0.5 was the warm-up
    quick = Machine({"": [0.001, 0.1]})
    assert read(lambda: None, quick.clock) == pytest.approx(0.1 / 50)  # 50 calls in a reading
    slow = Machine({"": [LONG_S, 1.0]})
    assert read(lambda: None, slow.clock) == LONG_S
    assert slow.log == [""]


def test_a_part_that_does_not_fit_ends_the_row_before_any_reading():
    machine = Machine({"small": [1.0], "large": [1.0]})
    parts = [machine.part("small"), machine.part("large", size=2**60)]
    with pytest.raises(MemoryError, match=r"large takes 1342177280\.0 GiB, and .* GiB are free"):
        time_parts(parts, settings(2), 1e9, machine.clock, {})
    assert machine.log == []
    check_memory([machine.part("exact", size=80)], settings(1), available=100)
    with pytest.raises(MemoryError):
        check_memory([machine.part("more", size=81)], settings(1), available=100)


def test_the_check_against_the_whole_model_can_fail(monkeypatch: pytest.MonkeyPatch):
    """`benchmarks/blocks.py`: a block that is slower alone than in the model shows."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import blocks

    def result(block: float) -> dict[str, Any]:
        machine = Machine({"block": [block], "ends": [2.5], "whole": [112.0]})
        parts = [machine.part("block", calls=20), machine.part("ends", calls=4)]
        return blocks.compare(parts, [machine.part("whole")], 3, machine.clock)

    near, far = result(5.2), result(5.5)
    assert near["stages"]["denoise"]["ratio"] == pytest.approx(114 / 112)
    assert (near["within"], far["within"]) == (True, False)
    about = {"experiment": "e", "size": 512, "dtype": "float32", "device": "d", "day": "today", "commit": "c"}
    assert "NOT within 5% of the whole model" in blocks.markdown({**about, **far})


def test_columns_are_the_median_with_its_interval_and_the_range():
    machine = Machine({"block": [9.0, 11.0, 10.0]})
    measured = columns(time_parts([machine.part("block")], settings(3), 1e9, machine.clock, {}))
    assert measured["blocks_latency_s"] == 10
    assert measured["blocks_range"] == pytest.approx(20)
    assert (measured["blocks_latency_s_low"], measured["blocks_latency_s_high"]) == (9, 11)  # of three, the extremes
    assert measured["blocks_images_per_s"] == pytest.approx(0.1)
    assert measured["blocks_images_per_s_low"] == pytest.approx(1 / 11)
    one = columns(time_parts([machine.part("block")], settings(1), 1e9, machine.clock, {}))
    assert "blocks_latency_s_low" not in one
    assert one["blocks_range"] == 0
