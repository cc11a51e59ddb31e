"""Sweeps over batches whose times and memory are scripted."""

import weakref

import pytest
import torch

from sana_lab.costs.batch_sweep import BatchTrial, available_host_bytes, batch_sizes, host_shortfall, sweep
from sana_lab.costs.live_memory import Memory
from sana_lab.costs.out_of_memory import OutOfMemory, describe_out_of_memory, is_out_of_memory
from sana_lab.costs.timing import Energy

MIB = 2**20


def trial(batch: int, seconds: float = 1.0) -> BatchTrial:
    memory = Memory((100 + batch) * MIB, 100 * MIB, 200 * MIB, "scripted")
    return BatchTrial(batch, (seconds, 0.9 * seconds, 1.1 * seconds), memory, Energy(batch * 5.0, 2, 1.0))


def failing(full: int, error: Exception):
    """Batches below `full` take 1, 1.5, 2.5 ... seconds; at `full` the error is raised."""

    def run(batch: int) -> BatchTrial:
        if batch >= full:
            raise error
        return trial(batch, 0.5 + batch / 2)

    return run


@pytest.mark.parametrize(("most", "expected"), [(1, [1]), (8, [1, 2, 4, 8]), (12, [1, 2, 4, 8, 12])])
def test_batches_double(most: int, expected: list[int]):
    assert batch_sizes(most) == expected


def test_no_batch_sizes():
    with pytest.raises(ValueError, match="is 0, expected at least 1"):
        batch_sizes(0)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 99 bytes."),
        MemoryError(),
    ],
)
def test_a_sweep_ends_where_memory_is_full(error: Exception):
    found = sweep(failing(8, error), 64)
    assert [r["batch"] for r in found["trials"]] == [1, 2, 4]
    assert found["ended_by"].startswith("out of memory at batch 8: ")
    assert "\n" not in found["ended_by"]
    assert found["batch"] == 4
    assert found["images_per_s"] == pytest.approx(4 / 2.5)
    assert found["images_per_s_interval"] == pytest.approx([4 / 2.75, 4 / 2.25])
    assert (found["peak_mib"], found["reserved_mib"], found["energy_j_image"]) == (104, 200, 5)


def test_any_other_error_is_an_error():
    with pytest.raises(RuntimeError, match="shapes do not match"):
        sweep(failing(4, RuntimeError("shapes do not match")), 64)
    assert not is_out_of_memory(ValueError("out of memory"))


def test_the_best_is_not_always_the_last():
    times = {1: 1.0, 2: 1.5, 4: 4.0}
    found = sweep(lambda batch: trial(batch, times[batch]), 4)
    assert found["batch"] == 2
    assert found["ended_by"] == "the limit, 4"


def test_not_even_one_image():
    with pytest.raises(MemoryError, match="not even a batch of one image fits: out of memory at batch 1"):
        sweep(failing(1, torch.OutOfMemoryError("full")), 4)


def test_what_failed_is_let_go():
    """The error's frames hold the batch's tensors; they are gone before anything else is tried."""
    held = []

    def run(batch: int) -> BatchTrial:
        big = torch.zeros(10)
        held.append(torch.utils.weak.WeakTensorKeyDictionary({big: batch}))
        if batch == 2:
            raise torch.OutOfMemoryError("full")
        return trial(batch)

    sweep(run, 4)
    assert len(held) == 2
    assert len(held[1]) == 0


def test_on_the_host_a_batch_is_not_tried_that_would_not_fit():
    found = sweep(trial, 64, lambda r: host_shortfall(r, lambda: 9 * MIB))
    assert [r["batch"] for r in found["trials"]] == [1, 2, 4, 8]
    assert found["ended_by"] == "batch 16 not tried: it would need about 16 MiB, and 9 MiB are free"
    assert host_shortfall(trial(1), lambda: None) is None


def test_available_memory_as_linux_says_it():
    assert available_host_bytes(["MemTotal:  100 kB", "MemAvailable:    64 kB"]) == 65536
    assert available_host_bytes([]) is None


# --- what was being done


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB\nand more"), "CUDA out of memory. Tried 2 GiB"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: 99 bytes."), "DefaultCPUAllocator: not enough memory"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_full_memory_is_told_in_one_line(error: Exception, said: str):
    with (
        pytest.raises(OutOfMemory, match=f"^out of memory while decoding: {said}") as caught,
        describe_out_of_memory("decoding"),
    ):
        raise error
    assert "\n" not in str(caught.value)
    assert is_out_of_memory(caught.value)


def test_what_filled_the_memory_is_let_go():
    held = []

    def work() -> None:
        tensor = torch.zeros(9)
        held.append(weakref.ref(tensor))
        raise MemoryError

    with pytest.raises(OutOfMemory) as caught, describe_out_of_memory("working"):
        work()
    assert caught.value is not None
    assert held[0]() is None


def test_other_errors_and_what_was_told_already_stay():
    for error in (RuntimeError("shapes do not match"), KeyError("x"), OutOfMemory("out of memory while reading: x")):
        with pytest.raises(type(error)) as caught, describe_out_of_memory("decoding"):
            raise error
        assert caught.value is error


def test_nothing_is_said_of_what_went_well():
    with describe_out_of_memory("decoding"):
        pass
