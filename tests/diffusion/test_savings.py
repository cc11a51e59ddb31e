"""Sampling with all its savings against a plain loop that computes everything again at every step, from padded text."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from sana_lab.config import registry
from sana_lab.diffusion import Process
from sana_lab.diffusion.ddpm import Ddpm
from sana_lab.diffusion.flow import Flow
from sana_lab.diffusion.guidance import guided, prepare, within
from sana_lab.diffusion.sampling import Sampling
from sana_lab.models.dit import Dit, TextDit, sana
from sana_lab.models.dit.sana_sampling import MAX_TIMES, Schedule
from sana_lab.profiler.host_syncs import SyncCounter
from sana_lab.types import Text, Velocity

MODELS: dict[str, dict[str, Any]] = {
    "1.0": {},
    "1.5": {"cross_norm": True, "attention": {"name": "linear", "head_dim": 8, "qk_norm": True}},
    "2K": {"position": "sincos", "base": 4},
    "patches": {"patch": 2, "ffn": "mlp"},
    "intervals": {"mean_velocity": True},
}
LENGTH, ROWS = 12, 3
SCALE = 3.0


def make(name: str, dtype: torch.dtype = torch.float64) -> Dit:
    dit = tiny.dit(dtype=dtype, **MODELS[name])
    if dit.interval_embed is not None:
        torch.nn.init.normal_(dit.interval_embed.mlp[-1].weight)  # zero in a new model
    return dit


def text(counts: list[int], seed: int, dtype: torch.dtype = torch.float64, length: int = LENGTH) -> Text:
    """Right-padded to `length`, as encoders do that pad to their longest; the padding's features are large."""
    tokens, mask = tiny.caption(counts, seed, length)
    return Text((tokens * (1 + 9 * ~mask[..., None])).to(dtype), mask)


def noise(dtype: torch.dtype = torch.float64) -> Tensor:
    return tiny.latents(ROWS, dtype=dtype)


def plain(dit: Dit, prompts: Text, null: Text, how: Sampling) -> Velocity:
    """Two forwards with the text itself at every step; nothing is known beforehand, nothing is kept."""
    null = Text(null.tokens.expand(ROWS, -1, -1), null.mask.expand(ROWS, -1))

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        with_text = dit(x, t, prompts)
        if how.guidance == 1 or not (
            how.guidance_interval is None or within(how.guidance_interval, t.flatten()[0].item())
        ):
            return with_text
        without = dit(x, t, null)
        return without + how.guidance * (with_text - without)

    return velocity


def saved(dit: Dit, prompts: Text, null: Text, how: Sampling, flow: Process, dtype: torch.dtype) -> Velocity:
    return guided(dit, prompts, null, how.guidance, how.guidance_interval, how.network_times(flow, dtype))


@torch.no_grad()
def compare(
    dit: Dit, prompts: Text, null: Text, how: Sampling, flow: Process, dtype: torch.dtype = torch.float64
) -> float:
    runs = plain(dit, prompts, null, how), saved(dit, prompts, null, how, flow, dtype)
    expected, latents = (how.run(velocity, noise(dtype), flow, partial(noise, dtype)) for velocity in runs)
    assert latents.dtype == dtype
    assert tiny.error(noise(dtype), expected) > 0.1
    return tiny.error(latents, expected)


NULLS = {
    "one token": text([1], 2),
    "a negative prompt": text([4], 2),
    "a longer negative prompt for each": text([5, 12, 2], 2),
    "nvlabs": text([3, 7, 5], 2),
}
PROMPTS = text([3, 7, 5], 1)


@pytest.mark.parametrize("solver", sorted(registry.TABLE["solver"]))
@pytest.mark.parametrize(
    "change",
    [{}, {"guidance": 1.0}, {"guidance_interval": (0.3, 0.8)}, {"grid": "flow_match"}],
    ids=["guided", "alone", "interval", "grid"],
)
def test_every_solver(solver: str, change: dict[str, Any]):
    """float64: 1e-12 of the latents."""
    if solver == "scm" and "grid" in change:
        pytest.skip("its times are its own")
    dit, how = make("intervals" if solver == "meanflow" else "1.0"), replace(Sampling(solver, 5, SCALE), **change)
    flow = Flow(3.0, 0.999, model_time="released")
    assert compare(dit, PROMPTS, NULLS["one token"], how, flow) <= 1e-12


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("null", NULLS)
def test_every_model_and_null(model: str, null: str):
    assert compare(make(model), PROMPTS, NULLS[null], Sampling("dpmpp", 4, SCALE), Flow()) <= 1e-12


@pytest.mark.parametrize("model", MODELS)
def test_in_single_precision(model: str):
    """float32: 2e-6 of the latents."""
    dit, how = make(model, torch.float32), Sampling("dpmpp", 5, SCALE)
    prompts, null = text([3, 7, 5], 1, torch.float32), text([1], 2, torch.float32)
    assert compare(dit, prompts, null, how, Flow(start=0.999, model_time="released"), torch.float32) <= 2e-6


@pytest.mark.parametrize("solver", ["euler", "dpmpp"])
def test_noise_prediction(solver: str):
    assert compare(make("1.0"), PROMPTS, NULLS["one token"], Sampling(solver, 6, SCALE), Ddpm()) <= 1e-12


@torch.no_grad()
def test_prompts_of_one_length_are_not_masked():
    dit = make("1.0")
    alone = prepare(dit, text([7, 7, 7], 1))
    assert alone.mask is None
    assert alone.length == 7
    assert alone.beside(prepare(dit, NULLS["one token"])).mask is None
    assert alone.beside(prepare(dit, text([7, 7, 7], 2))).mask is None
    mixed = alone.beside(prepare(dit, text([2], 2)))
    assert mixed.mask is not None
    assert mixed.mask.sum(1).tolist() == [7, 7, 7, 2, 2, 2]
    how = Sampling("euler", 3, SCALE)
    for null in (text([1], 2), text([7, 7, 7], 2), text([2], 2), text([12], 2)):
        assert compare(dit, text([7, 7, 7], 1), null, how, Flow()) <= 1e-12


@torch.no_grad()
def test_a_prompt_without_padding_is_bitwise_the_text_itself():
    dit, x, t = make("1.0"), noise(), torch.full((ROWS,), 0.4)
    whole = text([12, 12, 12], 1)
    assert torch.equal(guided(dit, whole, whole, 1.0)(x, t), dit(x, t, whole))


def test_trim_cuts_what_no_row_uses():
    whole = text([3, 7, 5], 1)
    cut = whole.trimmed()
    assert torch.equal(cut.tokens, whole.tokens[:, :7])
    assert torch.equal(cut.mask, whole.mask[:, :7])
    assert cut.trimmed() is cut
    gap = Text(whole.tokens, torch.arange(LENGTH).expand(3, -1) % 5 == 0)
    assert torch.equal(gap.trimmed().tokens, whole.tokens[:, ::5])


# --- nothing is computed twice


@pytest.mark.parametrize("solver", sorted(registry.TABLE["solver"]))
@pytest.mark.parametrize("interval", [None, (0.3, 0.8)])
@torch.no_grad()
def test_what_the_steps_share_is_computed_once(solver: str, interval: tuple[float, float] | None):
    """Each caption's projection, keys and values once; all times' vectors in one call; none of them in a step."""
    dit, flow = make("intervals" if solver == "meanflow" else "1.0"), Flow(model_time="released")
    how = Sampling(solver, 6, SCALE, guidance_interval=interval)
    calls: list[tuple[str, int]] = []
    watched = {"caption": dit.caption_embed, "time": dit.time_embed, "six": dit.time_block}
    watched |= {f"kv {i}": block.cross.kv for i, block in enumerate(dit.blocks)}
    for name, module in watched.items():
        module.register_forward_hook(lambda _, given, out, name=name: calls.append((name, len(given[0]))))
    velocity = saved(dit, PROMPTS, NULLS["one token"], how, flow, torch.float64)
    times = len(how.network_times(flow, torch.float64).unique(dim=0))
    once = [("caption", ROWS), ("kv 0", ROWS), ("kv 1", ROWS), ("time", times), ("six", times)]
    assert sorted(calls) == sorted([*once, ("caption", 1), ("kv 0", 1), ("kv 1", 1)])
    calls.clear()
    queries: list[int] = []
    dit.blocks[0].cross.q.register_forward_hook(lambda _, given, out: queries.append(len(given[0])))
    how.run(velocity, noise(), flow, noise)
    assert calls == []
    assert set(queries) == {ROWS}, "the empty prompt's half has nothing to ask"


@torch.no_grad()
def test_positions_are_computed_once_for_a_grid(monkeypatch: pytest.MonkeyPatch):
    """And again for another grid; the same tokens to the last bit."""
    dit, calls = make("2K"), []
    other = make("2K")
    computed = sana.sincos_positions
    monkeypatch.setattr(sana, "sincos_positions", lambda *args: calls.append(args) or computed(*args))
    for x in (noise(), noise(), noise().mT, noise()):
        assert torch.equal(dit.embed(x), dit.embed(x))
        other.positions = {}
        assert torch.equal(dit.embed(x), other.embed(x))
    assert len(calls) == 3 + 4


@torch.no_grad()
def test_a_time_that_was_not_foretold_is_computed():
    dit, x = make("1.0"), noise()
    velocity = guided(dit, PROMPTS, NULLS["nvlabs"], SCALE, times=torch.tensor([0.5, 0.25], dtype=torch.float64))
    bare = guided(dit, PROMPTS, NULLS["nvlabs"], SCALE)
    calls: list[int] = []
    dit.time_block.register_forward_hook(lambda _, given, out: calls.append(len(given[0])))
    for t in (0.5, 0.3, 0.25):
        times = torch.full((ROWS,), t, dtype=torch.float64)
        assert tiny.error(velocity(x, times), bare(x, times)) <= 1e-12
    mixed = torch.tensor([0.5, 0.25, 0.5], dtype=torch.float64)
    assert tiny.error(velocity(x, mixed), bare(x, mixed)) <= 1e-12
    assert calls == [6] * 6, "three known to none of `bare`, one unknown, one mixed by both"


@torch.no_grad()
def test_so_many_steps_that_their_vectors_are_not_all_kept():
    dit = make("1.0")
    schedule = dit.prepare(PROMPTS, torch.linspace(1, 0, 2 * MAX_TIMES, dtype=torch.float64)).schedule
    assert schedule is not None
    assert len(schedule.rows) == len(schedule.blocks) == MAX_TIMES
    assert schedule.at(torch.ones(2)) is not None
    assert schedule.at(torch.zeros(2)) is None


def test_a_schedule_answers_for_the_host_alone():
    schedule = Schedule({0.5: 0}, torch.zeros(1, 2, 1, 6, 4), torch.zeros(1, 1, 4))
    assert schedule.at(torch.full((3,), 0.5)) is not None
    assert schedule.at(torch.full((3,), 0.5, device="meta")) is None
    assert schedule.at(torch.tensor([0.5, 0.25])) is None


@pytest.mark.parametrize("foretold", [True, False])
@torch.no_grad()
def test_a_model_distilled_with_guidance_reads_it(foretold: bool):
    """One forward of the prompts, at known times and at others, as the network itself."""
    dit, x, t = tiny.dit(dtype=torch.float64, guidance=0.1), noise(), torch.full((ROWS,), 0.4, dtype=torch.float64)
    velocity = guided(dit, PROMPTS, NULLS["one token"], SCALE, times=t if foretold else None)
    for scale, same in ((SCALE, True), (1.0, False)):
        expected = dit(x, t, PROMPTS, torch.full((ROWS,), scale))
        assert (tiny.error(velocity(x, t), expected) <= 1e-6) is same
    assert tiny.error(TextDit(dit, PROMPTS, SCALE)(x, t), velocity(x, t)) <= 1e-6
    with pytest.raises(ValueError, match=r"guidance_interval is \[0.3, 0.8\], but this DiT is distilled"):
        guided(dit, PROMPTS, NULLS["one token"], SCALE, (0.3, 0.8))


class Guest(Dit):
    """A denoiser that is `forward` and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.sana = make("1.0")

    def forward(self, x: Tensor, t: Tensor, text: Text, guidance: Tensor | None = None) -> Tensor:
        return self.sana(x, t, text)


@pytest.mark.parametrize("null", NULLS)
def test_a_denoiser_without_savings_is_guided_too(null: str):
    """What `Dit` gives those that keep nothing: its text with each step."""
    assert isinstance(Guest().prepare(PROMPTS), TextDit)
    how = Sampling("heun", 3, SCALE, guidance_interval=(0.3, 0.8))
    assert compare(Guest(), PROMPTS, NULLS[null], how, Flow()) <= 1e-12


@torch.no_grad()
def test_copies_of_a_prepared_denoiser():
    """Repeated, padded and cloned, it is the network with its text."""
    dit, x, t = make("1.0"), noise(), torch.tensor([0.9, 0.4, 0.1], dtype=torch.float64)
    expected = dit(x, t, PROMPTS)
    for model in (dit.prepare(PROMPTS), Guest().prepare(PROMPTS)):
        assert tiny.error(model.padded(LENGTH + 4)(x, t), expected) <= 1e-12
        assert torch.equal(model.map(torch.clone)(x, t), expected)
        twice = model.repeat(2)(x.repeat_interleave(2, 0), t.repeat_interleave(2, 0))
        assert tiny.error(twice, expected.repeat_interleave(2, 0)) <= 1e-12


def test_told_is_what_each_solver_asks_for():
    flow = Flow(model_time="released")
    for solver, count in (("euler", 4), ("heun", 7), ("rf_solver", 8), ("dpmpp", 4), ("unipc", 4), ("scm", 4)):
        visited: list[float] = []
        how = Sampling(solver, 4)
        how.run(
            lambda x, t, visited=visited: visited.append(t[0].item()) or x.tanh(), noise(torch.float32), flow, noise
        )
        assert how.network_times(flow).tolist() == visited
        assert len(visited) == count


@pytest.mark.parametrize(
    ("solver", "flow", "foretold"),
    [
        ("dpmpp", Flow(model_time="released"), True),
        ("heun", Flow(), True),
        ("unipc", Flow(model_time="released"), False),
        ("euler", Ddpm(), True),
        ("dpmpp", Ddpm(), False),
    ],
)
@torch.no_grad()
def test_no_step_waits_for_the_device(solver: str, flow: Process, foretold: bool):
    """Counted on the meta device, which has no values to give."""
    how = Sampling(solver, 4, SCALE, guidance_interval=(0.3, 0.8))
    with SyncCounter() as waits:
        dit = make("1.0", torch.float32).to("meta")
        prompts, null = (Text(t.tokens.to("meta"), t.mask.to("meta")) for t in (PROMPTS, NULLS["one token"]))
        velocity = guided(dit, prompts, null, SCALE, (0.3, 0.8), how.network_times(flow) if foretold else None)
        before = waits.total
        how.run(velocity, torch.empty(ROWS, 4, 4, 6, device="meta"), flow)
    assert before > 0, "texts are looked at once"
    assert waits.total == before, waits.counts
