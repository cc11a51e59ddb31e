"""Two processes that measure together find what one finds, whoever has more to draw."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from sana_lab.evaluation import Measure, Report, distributed
from sana_lab.evaluation.distances.measure import Distances
from sana_lab.evaluation.run_measures import Source, run

ROWS = [{"prompt": f"picture {i}"} for i in range(11)]


def paint(prompts: list[str], indices: list[int]) -> Tensor:
    """Pictures that depend on their noise index alone."""
    made = [torch.randint(0, 256, (3, 8, 8), generator=torch.Generator().manual_seed(i)) for i in indices]
    return torch.stack(made).to(torch.uint8)


def real() -> list[Tensor]:
    return [paint([], list(range(100 + i, 105 + i))) for i in range(0, 30, 5)]


def measured(batch: int) -> Report:
    measure: Measure = Distances({"name": "function", "function": "features:means", "device": "cpu"}, ("fid", "kid"))
    return run({"a": measure}, Source(paint, ROWS, real), batch)["a"]


def _process(rank: int, place: str) -> None:
    """One of two: batches of 2 leave the second one image less."""
    dist.init_process_group("gloo", init_method=f"file://{place}/meet", rank=rank, world_size=2)
    found = measured(2)
    torch.save({"values": found.values, "per_image": dict(found.per_image)}, f"{place}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path: Path):
    mp.spawn(_process, (str(tmp_path),), nprocs=2)
    alone = measured(4)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert found["values"] == alone.values
        assert found["per_image"] == dict(alone.per_image)


def test_one_process_is_the_first_of_one():
    images = paint([], [0, 1])
    assert (distributed.rank(), distributed.size()) == (0, 1)
    assert distributed.gather(images) is images
    with distributed.process_group() as reports:
        assert reports
