"""Training in two processes by each strategy: the model of one process, and after any interruption the same bits."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
import two_processes
from torch import Tensor
from two_processes import Case, checkpoint, final, largest_difference

STRATEGIES = ("ddp", "fsdp2")
SUMMED = ("trainer.accumulate=2", "trainer.gradient_clip=0.02", "trainer.max_steps=3")
"""Gradients of two batches, clipped: Adam's moments tell their sizes, the weights their directions."""

PRECISION = {"ddp": ("64-true", 1e-10), "fsdp2": ("32-true", 2e-5)}
"""Precision and tolerance, relative to the largest value: rounding of sums in another order. Lightning shards no
float64."""


def precision(strategy: str) -> tuple[str, ...]:
    return (f"trainer.precision={PRECISION[strategy][0]}",)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """All trainings of this file."""
    root = tmp_path_factory.mktemp("strategies")
    two_processes.write(root)
    two = {
        **{f"{s} summed": Case("cached", (*SUMMED, *precision(s), f"trainer.strategy={s}")) for s in STRATEGIES},
        **{f"{s} whole": Case("cached", (f"trainer.strategy={s}",)) for s in STRATEGIES},
        **{f"{s} stopped": Case("cached", (f"trainer.strategy={s}",), (1, 2, 3, 4, 5, 6)) for s in STRATEGIES},
    }
    two_processes.train_in_two(root, two)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        one = {
            **{f"one summed as {s}": Case("cached", (*SUMMED, *precision(s))) for s in STRATEGIES},
            "one whole": Case("cached"),
            "one stopped": Case("cached", (), (1, 2, 3, 4, 5, 6)),
        }
        two_processes.train_all(str(root), one)
        yield root


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_train_the_model_of_one(trained: Path, strategy: str):
    """Weights, and the moments of gradients that are summed over batches and clipped."""
    several, one = checkpoint(trained, f"{strategy} summed"), checkpoint(trained, f"one summed as {strategy}")
    tolerance = PRECISION[strategy][1]
    assert relative_difference(several["state_dict"], one["state_dict"]) < tolerance
    moments, expected = several["optimizer_states"][0]["state"], one["optimizer_states"][0]["state"]
    assert moments.keys() == expected.keys()
    for number in expected:
        assert relative_difference(moments[number], expected[number]) < tolerance
    assert several["measures"] == pytest.approx(one["measures"], rel=tolerance)
    assert several["average"]["updates"] == one["average"]["updates"] == 3


def relative_difference(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """The largest over all tensors, relative to the largest value of each."""
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k]).abs().max() / b[k].double().abs().max().clamp(min=1e-12)) for k in a)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["one", *STRATEGIES])
def test_a_training_that_was_stopped_at_every_step_ends_with_the_same_bits(trained: Path, strategy: str):
    """In mid-epoch and between epochs: weights, average, optimiser and measures."""
    stopped, whole = checkpoint(trained, f"{strategy} stopped"), checkpoint(trained, f"{strategy} whole")
    assert largest_difference(final(trained, f"{strategy} stopped"), final(trained, f"{strategy} whole")) == 0
    assert largest_difference(stopped["state_dict"], whole["state_dict"]) == 0
    assert largest_difference(stopped["average"]["values"], whole["average"]["values"]) == 0
    for number, state in whole["optimizer_states"][0]["state"].items():
        assert largest_difference(stopped["optimizer_states"][0]["state"][number], state) == 0
    assert stopped["measures"] == whole["measures"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_in_float32_they_agree_up_to_rounding(trained: Path, strategy: str):
    assert largest_difference(final(trained, f"{strategy} whole"), final(trained, "one whole")) < 1e-4


@pytest.mark.slow
def test_one_file_per_checkpoint_holds_whole_tensors(trained: Path):
    sharded, copies = checkpoint(trained, "fsdp2 whole"), checkpoint(trained, "ddp whole")
    assert sharded.keys() == copies.keys()
    shapes = {k: v.shape for k, v in copies["state_dict"].items()}
    assert {k: v.shape for k, v in sharded["state_dict"].items()} == shapes
    assert all(type(v) is torch.Tensor for v in sharded["average"]["values"].values())
