"""Jobs shared by threads: each done once, errors raised, and torch's own threads as they were."""

import threading
from collections.abc import Iterator

import pytest
import torch

from sana_lab.ops.threads import share


@pytest.fixture(params=[1, 2, 4])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def in_a_new_thread() -> int:
    """How many threads torch would compute with there."""
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def test_each_job_is_done_once_with_one_thread_of_torch(threads: int):
    done: list[int] = []
    inside: list[tuple[int, bool]] = []

    def work(jobs: Iterator[int]) -> None:
        inside.append((torch.get_num_threads(), torch.is_grad_enabled()))
        done.extend(jobs)

    share(range(20), work)
    assert sorted(done) == list(range(20))
    assert set(inside) == {(1, False)}
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()


def test_threads_started_later_get_their_number_too(threads: int):
    expected = in_a_new_thread()
    share(range(4), list)
    assert in_a_new_thread() == expected


def test_tensors_can_be_written_in_inference_mode(threads: int):
    with torch.inference_mode():
        out = torch.zeros(8)
        share(range(8), lambda jobs: [out[i].add_(i) for i in jobs] and None)
    assert out.tolist() == list(range(8))


def test_an_error_is_raised_here_and_threads_are_as_before(threads: int):
    def work(jobs: Iterator[int]) -> None:
        for job in jobs:
            if job == 3:
                raise RuntimeError("job three")

    with pytest.raises(RuntimeError, match="job three"):
        share(range(8), work)
    assert torch.get_num_threads() == threads
