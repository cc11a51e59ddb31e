"""Two processes that measure together find what one finds, whoever has more to draw."""

from typing import Any

import pytest
import shared_evaluation
import torch
import torch.multiprocessing as mp

from sana_lab.evaluation import distributed


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    place = tmp_path_factory.mktemp("meet")
    mp.spawn(shared_evaluation.process, (str(place),), nprocs=2)
    return [torch.load(place / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.slow
def test_two_processes_find_what_one_finds(together: list[dict[str, Any]]):
    alone, extracted = shared_evaluation.measured(4)
    assert extracted == len(shared_evaluation.ROWS) + 30
    for process in together:
        assert process["reports"] == {name: (r.values, dict(r.per_image)) for name, r in alone.items()}


@pytest.mark.slow
def test_each_process_extracts_its_share(together: list[dict[str, Any]]):
    """Of 11 images by batches of 2: 6 and 5; of 6 batches of 5 real ones: half of them."""
    assert [process["extracted"] for process in together] == [6 + 15, 5 + 15]


@pytest.mark.slow
def test_features_are_sent_and_no_pictures(together: list[dict[str, Any]]):
    """A picture has 3 x 32 x 32 bytes."""
    assert all(0 < process["sent"] < 2 * 3 * shared_evaluation.SIDE**2 for process in together)


def test_one_process_is_the_first_of_one():
    assert (distributed.rank(), distributed.size()) == (0, 1)
    assert distributed.gather([1]) == [[1]]
    assert distributed.gather(None) == []
    with distributed.process_group() as reports:
        assert reports
