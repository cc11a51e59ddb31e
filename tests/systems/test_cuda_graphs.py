"""Recorded steps: what is recorded when, what is copied where, and what is said when it cannot be.

CUDA graphs need a GPU; here a call is recorded by keeping it, and replayed by calling it on the memory that it reads.
"""

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from sana_lab.bench.bench import bench
from sana_lab.diffusion.flow import Flow
from sana_lab.diffusion.guidance import guided
from sana_lab.diffusion.perturbed_attention import Perturbation
from sana_lab.diffusion.sampling import Sampling
from sana_lab.models.dit import Dit
from sana_lab.systems.cuda_graphs import BUCKETS, MAX_GRAPHS, GraphFailed, Graphs, bucket
from sana_lab.systems.text2image import TextToImage
from sana_lab.types import Text, Velocity

FLOW = Flow(start=0.999, model_time="released")


class Kept:
    """A call that is made again; like a graph it writes its result over the last."""

    def __init__(self, call: Callable[[], Tensor]) -> None:
        self.call, self.out = call, call()
        self.runs = 0

    def run(self) -> Tensor:
        self.runs += 1
        return self.out.copy_(self.call())


class Recorder:
    """Records on the CPU."""

    device = "cpu"

    def __init__(self) -> None:
        self.made: list[Kept] = []

    def record(self, call: Callable[[], Tensor]) -> Kept:
        self.made.append(Kept(call))
        return self.made[-1]


class Broken(Recorder):
    def record(self, call: Callable[[], Tensor]) -> Kept:
        raise RuntimeError("operation not permitted when stream is capturing\nand more lines")


class Wrong(Recorder):
    def record(self, call: Callable[[], Tensor]) -> Kept:
        return super().record(lambda: call() * 1.5)


@pytest.fixture
def dit() -> Dit:
    return tiny.dit(dtype=torch.float64)


def at(t: float, rows: int = 2) -> Tensor:
    return torch.full((rows,), t, dtype=torch.float64)


NULL = tiny.caption([1], 3)


def velocity(
    dit: Dit, graphs: Graphs | None, prompts: Text, how: Sampling, null: Text = NULL, mode: Any = "auto"
) -> Velocity:
    bind = {} if graphs is None else {"bind": partial(graphs.velocity, mode)}
    return guided(
        dit, prompts, null, how.guidance, how.guidance_interval, how.network_times(FLOW, torch.float64), **bind
    )


def drawn(dit: Dit, graphs: Graphs | None, prompts: Text, how: Sampling, null: Text = NULL) -> Tensor:
    return how.run(velocity(dit, graphs, prompts, how, null), tiny.latents(len(prompts.tokens)), FLOW)


def assert_same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


# --- the same latents


@pytest.mark.parametrize(("solver", "interval"), [("heun", (0.3, 0.8)), ("rf_solver", None), ("unipc", None)])
@torch.no_grad()
def test_replayed_steps_are_the_steps(dit: Dit, solver: str, interval: tuple[float, float] | None):
    """A solver that asks twice before it uses the first answer still has it."""
    graphs, how = Graphs(Recorder()), Sampling(solver, 3, 3.0, guidance_interval=interval)
    for prompts, null in (
        (tiny.caption([5, 9]), NULL),
        (tiny.caption([32, 32], 4), NULL),
        (tiny.caption([5, 9]), tiny.caption([2, 40], 3)),
        (tiny.caption([5, 9]), tiny.caption([5, 9], 3)),
    ):
        assert_same(drawn(dit, graphs, prompts, how, null), drawn(dit, None, prompts, how, null))


@torch.no_grad()
def test_without_guidance(dit: Dit):
    graphs, how = Graphs(Recorder()), Sampling("euler", 3, 1.0)
    assert_same(drawn(dit, graphs, tiny.caption([5, 9]), how), drawn(dit, None, tiny.caption([5, 9]), how))
    assert len(graphs.recorder.made) == 1


@torch.no_grad()
def test_a_time_that_was_not_foretold(dit: Dit):
    graphs, how, x = Graphs(Recorder()), Sampling("euler", 2, 3.0), tiny.latents()
    replayed, plain = velocity(dit, graphs, tiny.caption([5, 9]), how), velocity(dit, None, tiny.caption([5, 9]), how)
    for t in (0.123, 0.456, how.network_times(FLOW, torch.float64)[0].item(), 0.123):
        assert_same(replayed(x, at(t)), plain(x, at(t)))
    mixed = torch.tensor([0.2, 0.7], dtype=torch.float64)
    assert_same(replayed(x, mixed), plain(x, mixed))
    assert len(graphs.recorder.made) == 2, "one for the vectors of one time, one for those of each row"


# --- what is recorded, and what is copied


@torch.no_grad()
def test_one_recording_for_each_bucket_and_shape(dit: Dit):
    graphs, how = Graphs(Recorder()), Sampling("euler", 4, 3.0)
    made = graphs.recorder.made
    for prompts in (tiny.caption([5, 9]), tiny.caption([7, 3], 4), tiny.caption([31, 30], 5)):
        drawn(dit, graphs, prompts, how)
        assert len(made) == 1
    assert made[0].runs == 3 * 4 + 1, "and one to look whether it is right"
    drawn(dit, graphs, tiny.caption([32, 32]), how)
    assert len(made) == 2, "nothing is masked"
    drawn(dit, graphs, tiny.caption([33, 3]), how)
    assert len(made) == 3
    drawn(dit, graphs, tiny.caption([5, 9, 4]), how)
    assert len(made) == 4
    drawn(dit, graphs, tiny.caption([5, 9]), Sampling("euler", 4, 2.0))
    assert len(made) == 4, "guidance is applied to what is recorded"


@torch.no_grad()
def test_a_text_is_copied_once_and_again_where_another_was_in_between(dit: Dit):
    graphs, how, x = Graphs(Recorder()), Sampling("euler", 4, 3.0), tiny.latents()
    first, second = tiny.caption([5, 9]), tiny.caption([8, 8], 4)
    a, b = (velocity(dit, graphs, prompts, how) for prompts in (first, second))
    expected = [velocity(dit, None, prompts, how)(x, at(0.9)) for prompts in (first, second)]
    a(x, at(0.9))
    (recorded,) = graphs.recorded.values()
    key = recorded.model.tensors[0]
    before = key._version
    for _ in range(3):
        assert_same(a(x, at(0.9)), expected[0])
    assert key._version == before
    for made, wanted in ((b, expected[1]), (a, expected[0]), (b, expected[1])):
        assert_same(made(x, at(0.9)), wanted)
    assert key._version == before + 3
    assert len(graphs.recorded) == 1


@torch.no_grad()
def test_an_answer_stays_when_the_next_is_given(dit: Dit):
    graphs, how = Graphs(Recorder()), Sampling("euler", 4, 3.0)
    made = velocity(dit, graphs, tiny.caption([5, 9]), how)
    first = made(tiny.latents(), at(0.9))
    held = first.clone()
    made(tiny.latents(seed=8), at(0.5))
    assert torch.equal(first, held)


@torch.no_grad()
def test_the_least_used_is_dropped(dit: Dit):
    graphs, how = Graphs(Recorder()), Sampling("euler", 1, 3.0)
    sizes = [[5, 9], [40, 2], [70, 2], [200, 2], [305, 2]]
    for counts in sizes[:MAX_GRAPHS]:
        drawn(dit, graphs, tiny.caption(counts), how)
    drawn(dit, graphs, tiny.caption(sizes[0]), how)
    drawn(dit, graphs, tiny.caption(sizes[MAX_GRAPHS]), how)
    assert (len(graphs.recorded), len(graphs.recorder.made)) == (MAX_GRAPHS, MAX_GRAPHS + 1)
    drawn(dit, graphs, tiny.caption(sizes[0]), how)
    assert len(graphs.recorder.made) == MAX_GRAPHS + 1
    drawn(dit, graphs, tiny.caption(sizes[1]), how)
    assert len(graphs.recorder.made) == MAX_GRAPHS + 2


def test_buckets():
    assert [bucket(n) for n in (1, 32, 33, 64, 65, 128, 129, 300)] == [32, 32, 64, 64, 128, 128, 304, 304]
    assert [bucket(n) for n in (305, 600, 609)] == [608, 608, 912]
    assert list(BUCKETS) == sorted(BUCKETS)


# --- weights


@torch.no_grad()
def test_weights_that_change_where_they_are_are_read_and_those_that_move_are_recorded_anew(dit: Dit):
    graphs, how, prompts = Graphs(Recorder()), Sampling("euler", 2, 3.0), tiny.caption([5, 9])
    before = drawn(dit, graphs, prompts, how)
    for p in dit.parameters():
        p.mul_(1.1)
    after = drawn(dit, graphs, prompts, how)
    assert not torch.allclose(after, before)
    assert_same(after, drawn(dit, None, prompts, how))
    assert len(graphs.recorder.made) == 1
    for p in dit.parameters():
        p.data = p.data * 1.1
    assert_same(drawn(dit, graphs, prompts, how), drawn(dit, None, prompts, how))
    assert len(graphs.recorder.made) == 2


def test_gradients_and_autocast_are_launched(dit: Dit):
    graphs, how, x = Graphs(Recorder()), Sampling("euler", 2, 3.0), tiny.latents().requires_grad_()
    made = velocity(dit, graphs, tiny.caption([5, 9]), how)
    made(x, at(0.5)).sum().backward()
    assert x.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        made(x, at(0.5))
    assert graphs.recorder.made == []


# --- when it cannot be


@pytest.mark.parametrize(
    ("recorder", "why"),
    [(Broken, "RuntimeError: operation not permitted when stream is capturing$"), (Wrong, "gives another velocity")],
)
@torch.no_grad()
def test_what_cannot_be_recorded_is_launched_and_that_is_said_once(dit: Dit, recorder: type[Recorder], why: str):
    graphs, how = Graphs(recorder()), Sampling("euler", 3, 3.0)
    with pytest.warns(GraphFailed, match=rf"launched kernel by kernel, which is slower: .*{why}") as said:
        made = drawn(dit, graphs, tiny.caption([5, 9]), how)
    assert len(said) == 1
    assert torch.equal(made, drawn(dit, None, tiny.caption([5, 9]), how))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn(dit, graphs, tiny.caption([7, 8]), how)
        drawn(dit, graphs, tiny.caption([40, 8]), how)
    assert graphs.recorded == {}


@torch.no_grad()
def test_always_never_falls_back(dit: Dit):
    graphs, how = Graphs(Broken()), Sampling("euler", 3, 3.0)
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        velocity(dit, graphs, tiny.caption([5, 9]), how, mode="always")(tiny.latents(), at(0.5))


@torch.no_grad()
def test_never_and_another_device_record_nothing(dit: Dit):
    how, other = Sampling("euler", 3, 3.0), Recorder()
    other.device = "cuda"
    for graphs, mode in ((Graphs(Recorder()), "never"), (Graphs(other), "auto")):
        made = velocity(dit, graphs, tiny.caption([5, 9]), how, mode=mode)(tiny.latents(), at(0.5))
        assert torch.equal(made, velocity(dit, None, tiny.caption([5, 9]), how)(tiny.latents(), at(0.5)))
        assert graphs.recorder.made == []


# --- in a system


def system() -> TextToImage:
    return tiny.text2image(dit=tiny.TWO_BLOCKS).eval()


def test_a_system_replays_what_it_can(monkeypatch: pytest.MonkeyPatch):
    still, how = system(), Sampling("dpmpp", 4, 3.0)
    expected = still.sample(["a red circle", "a star"], size=16, sampling=how)
    still.graphs = Graphs(Recorder())
    for _ in range(2):
        made = still.sample(["a red circle", "a star"], size=16, sampling=how)
        assert (made.int() - expected.int()).abs().max() <= 1
    assert len(still.graphs.recorder.made) == 1
    assert copy.deepcopy(still).graphs.recorded == {}


def test_what_a_replay_does_is_counted_too(monkeypatch: pytest.MonkeyPatch):
    """A counter sees no operator of a graph."""
    how, still = Sampling("dpmpp", 4, 3.0), system()
    expected = bench(still, how, 16, repeats=1)["stages"]["denoise"]["gmacs"]
    monkeypatch.setattr(Kept, "run", lambda self: self.out)
    still.graphs = Graphs(Recorder())
    assert bench(still, how, 16, repeats=1)["stages"]["denoise"]["gmacs"] == expected
    assert still.graphs.recorder.made


def test_a_system_on_the_cpu_says_what_always_needs():
    with pytest.raises(
        ValueError, match="graph is 'always', but the denoiser is on 'cpu' and CUDA graphs are for 'cuda'"
    ):
        system().sample(["a star"], size=16, sampling=Sampling(steps=2, graph="always"))
    how = Sampling(steps=2, graph="always", offload=True)
    with pytest.raises(ValueError, match="needs weights that stay where they are; expected offload: false"):
        system().prepare_for_sampling(how, "cpu").sample(["a star"], size=16, sampling=how)


# --- the real thing


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_cuda_graphs_give_the_steps_and_wait_for_nothing(dit: Dit, dtype: torch.dtype):
    dit, graphs, how = dit.to("cuda", dtype), Graphs(), Sampling("dpmpp", 6, 3.0, guidance_interval=(0.3, 0.9))
    x = tiny.latents().to("cuda", torch.float32)

    def run(prompts: Text, bind: dict[str, Any]) -> Tensor:
        given, null = (Text(t.tokens.to("cuda", dtype), t.mask.cuda()) for t in (prompts, NULL))
        made = guided(dit, given, null, 3.0, how.guidance_interval, how.network_times(FLOW), **bind)
        how.run(made, x, FLOW)  # records
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            return how.run(made, x, FLOW)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    for prompts in (
        tiny.caption([5, 9]),
        tiny.caption([32, 20], 4),
        tiny.caption([60, 20], 5),
        tiny.caption([5, 9], 6),
    ):
        made, expected = run(prompts, {"bind": partial(graphs.velocity, "always")}), run(prompts, {})
        assert tiny.error(made, expected) <= (1e-5 if dtype == torch.float32 else 2e-2)
    assert 0 < len(graphs.recorded) <= MAX_GRAPHS


@torch.no_grad()
def test_steps_of_perturbed_attention_are_recorded_apart():
    """The perturbed rows and the captions have the layout of captions and a negative prompt, and other values."""
    dit, text, null = (
        tiny.dit(depth=2),
        tiny.caption([4, 4], dtype=torch.float32),
        tiny.caption([4, 4], 3, dtype=torch.float32),
    )
    graphs, x, t = Graphs(Recorder()), tiny.latents(dtype=torch.float32), torch.full((2,), 0.5)
    bind = partial(graphs.velocity, "always")
    for options in (
        {"scale": 3.0},
        {"scale": 1.0, "pag": Perturbation(2.0)},
        {"scale": 1.0, "pag": Perturbation(2.0, [0])},
    ):
        eager, replayed = guided(dit, text, null, **options), guided(dit, text, null, **options, bind=bind)
        assert tiny.error(replayed(x, t), eager(x, t)) < 1e-6
    assert len(graphs.recorded) == 3
