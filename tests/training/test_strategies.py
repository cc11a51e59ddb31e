"""Training in two processes by each strategy: the model of one process, and after any interruption the same bits."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import two_processes
from torch import Tensor
from two_processes import Case, checkpoint, final, largest_difference

from sana_lab.checkpoints import weights
from sana_lab.config import experiments
from sana_lab.config.validation import SpecError
from sana_lab.training import checks, ranks, strategies

STRATEGIES = ("ddp", "fsdp2")
SHARDS = (".safetensors", ".jsonl")  # files of a cache

BFLOAT16 = ("bf16-mixed", "bf16-true")

SUMMED = ("trainer.accumulate=2", "trainer.gradient_clip=0.02", "trainer.max_steps=3")
"""Gradients of two batches, clipped: Adam's moments tell their sizes, the weights their directions."""

PRECISION = {"ddp": ("64-true", 1e-10), "fsdp2": ("32-true", 2e-5)}
"""Precision and tolerance, relative to the largest value: rounding of sums in another order. Lightning shards no
float64."""


def precision(strategy: str) -> tuple[str, ...]:
    return (f"trainer.precision={PRECISION[strategy][0]}",)


def filled(folder: str) -> tuple[str, ...]:
    """Caches of their own."""
    return (f"data.source.cache={folder}/latents", f"data.cache={folder}/features", "trainer.max_steps=1")


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
    two |= {f"{s} measured": Case("tiny", (f"trainer.strategy={s}",), logged=True) for s in STRATEGIES}
    two |= {f"fsdp2 {p}": Case("cached", (f"trainer.precision={p}", "trainer.strategy=fsdp2")) for p in BFLOAT16}
    two |= {"two filled": Case("cached", filled("two"))}
    two |= {"fsdp2 checkpointing": Case("cached", ("trainer.strategy=fsdp2", "system.dit.checkpointing=true"))}
    two_processes.train_in_two(root, two)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        one = {
            **{f"one summed as {s}": Case("cached", (*SUMMED, *precision(s))) for s in STRATEGIES},
            "one whole": Case("cached"),
            "one filled": Case("cached", filled("one")),
            "one measured": Case("tiny", logged=True),
            **{f"one {p}": Case("cached", (f"trainer.precision={p}",)) for p in BFLOAT16},
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
def test_two_processes_fill_the_caches_of_one(trained: Path):
    """Each shard encoded by one of the two: the same files and captions; values up to rounding, 1e-6 of the largest."""
    two, one = (
        {path.relative_to(root): path for path in root.rglob("*-*.*") if path.suffix in SHARDS}
        for root in (trained / "two", trained / "one")
    )
    assert len([path for path in one if path.match("train-*.safetensors")]) == 6  # two of 12 items in each
    assert [path for path in one if path.match("text-*.safetensors")]
    assert two.keys() == one.keys()
    for name, path in one.items():
        if path.suffix == ".jsonl":
            assert two[name].read_bytes() == path.read_bytes()
        else:
            assert relative_difference(weights.read(two[name]), weights.read(path)) < 1e-6


@pytest.mark.slow
def test_killed_processes_leave_none_behind_and_go_on_to_the_same_bits(trained: Path):
    """kill -9 of the process that started them, after the checkpoint of step 4, in mid-epoch."""
    script = (
        "import sys, two_processes as t; from pathlib import Path\n"
        "if __name__ == '__main__': t.train_in_two(Path(sys.argv[1]), {'killed': t.Case('cached', waits=5)})"
    )
    (trained / "start.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(two_processes.__file__).parent), *sys.path])}
    with subprocess.Popen([sys.executable, "start.py", str(trained)], env=environment) as process:
        waiting = wait_for(lambda: [*(trained / "killed").glob("waits.*")], 2)
        process.kill()
    for number in (int(path.suffix[1:]) for path in waiting):
        wait_for(lambda pid=number: [] if Path(f"/proc/{pid}").exists() else [pid], 1)  # type: ignore[misc]
    assert [path.name for path in (trained / "killed").glob("models/*/*.ckpt")] == ["step=4.ckpt"]
    two_processes.train_in_two(trained, {"killed": Case("cached")})
    assert largest_difference(final(trained, "killed"), final(trained, "ddp whole")) == 0
    assert checkpoint(trained, "killed")["measures"] == checkpoint(trained, "ddp whole")["measures"]


def wait_for(things: Callable[[], list[Any]], count: int) -> list[Any]:
    """The things, once there are so many; within four minutes."""
    end = time.monotonic() + 240
    while len(present := things()) < count:
        assert time.monotonic() < end
        time.sleep(0.1)
    return present


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


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_previews_and_points_are_those_of_one_process(trained: Path, strategy: str):
    """Of averaged weights, although ranks generate different numbers of images at a point."""
    several, one = (torch.load(trained / f"{s} measured" / "pictures.pt").int() for s in (strategy, "one"))
    assert several.shape == one.shape
    assert (several - one).abs().max() <= 1
    points, expected = (measured(trained, f"{s} measured") for s in (strategy, "one"))
    assert [p["step"] for p in points] == [p["step"] for p in expected] == [2, 4]
    for point, other in zip(points, expected, strict=True):
        assert point["values"].keys() == other["values"].keys()
        assert point["values"]["fd_shapes"]["value"] == pytest.approx(other["values"]["fd_shapes"]["value"], rel=1e-2)


def measured(root: Path, name: str) -> list[dict[str, Any]]:
    """The points of a case."""
    (path,) = (root / name).glob("models/*/points.json")
    points: list[dict[str, Any]] = json.loads(path.read_text())["points"]
    return points


@pytest.mark.slow
@pytest.mark.parametrize("precision", BFLOAT16)
def test_shards_train_in_bfloat16(trained: Path, precision: str):
    """Each rank rounds the sums over its own rows, so that single weights may go the other way; the losses agree."""
    several, one = checkpoint(trained, f"fsdp2 {precision}")["measures"], checkpoint(trained, f"one {precision}")
    assert several == pytest.approx(one["measures"], rel=1e-2)


@pytest.mark.slow
def test_shards_with_activation_checkpointing_have_the_same_gradients(trained: Path):
    difference = largest_difference(final(trained, "fsdp2 checkpointing"), final(trained, "fsdp2 whole"))
    assert difference < 1e-6


REFUSED = {
    "trainer.devices=1": "shards parameters over several devices, and there is 1; expected ddp, or 2",
    "system.draws=2": r"system\.draws is 2, .*; expected ddp or draws=1",
    "system.method=direction": r"and system\.method reads hidden states of whole blocks; expected ddp",
    "trainer.precision=64-true": "has no precision '64-true'; expected 32-true, bf16-mixed, bf16-true, or ddp",
    "system.optimizer=muon": "optimizer 'muon' needs whole matrices; expected adamw, adam, sgd, or ddp",
    "sampling.quantize=int8": r"and sampling\.quantize 'int8' copies the DiT for previews; expected none, or ddp",
    "trainer.compile=true": r"and trainer\.compile compiles whole blocks; expected ddp",
    "system.train_text=true": "shards the DiT alone, and text_encoder trains too; expected ddp",
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_cannot_be_sharded_is_refused_with_the_nearest_right_answer(here: Path, change: str):
    two_processes.write(here)
    experiment = experiments.load("tiny", ["trainer.devices=2", "trainer.strategy=fsdp2", change])
    system = checks.system_on_meta(experiment["system"])[0]
    with pytest.raises(SpecError, match=f"^trainer.strategy is 'fsdp2', .*{REFUSED[change]}"):
        strategies.check(experiment, system, ranks.count(experiment))


def test_an_autoencoder_is_not_sharded(here: Path):
    tiny.write(here, "experiments/squeeze.yaml", tiny.SQUEEZE)
    with pytest.raises(SpecError, match="which shards a DiT, and system 'autoencoder' has none; expected ddp"):
        checks.check(experiments.load("squeeze", ["trainer.devices=2", "trainer.strategy=fsdp2"]))
