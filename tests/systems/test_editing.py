"""Inversion against a flow that is known, its order with steps, and edits of pictures of a tiny system."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from PIL import Image
from torch import Tensor

from sana_lab.__main__ import main
from sana_lab.commands.edit import read
from sana_lab.config import specs
from sana_lab.config.registry import TABLE
from sana_lab.config.specs import SpecError
from sana_lab.diffusion.flow import Flow
from sana_lab.diffusion.guidance import guided
from sana_lab.diffusion.inversion import Values, check, evaluations_of, invert, storable
from sana_lab.diffusion.sampling import Sampling
from sana_lab.models.attention import Attention
from sana_lab.systems.editing import edit

MIXERS = sorted(TABLE["attention"])


def known(x: Tensor, t: Tensor) -> Tensor:
    """dx/dt = 2 t x, solved by x(0) exp(t^2). The flow of Gaussian data is symmetric, and its leading errors cancel."""
    return 2 * t.to(x.dtype)[:, None, None, None] * x


def order(few: float, many: float) -> float:
    """From the errors with n and with 2 n steps."""
    return math.log2(few / many)


@pytest.mark.parametrize(("solver", "expected"), [("rf_solver", 2.0), ("heun", 2.0), ("euler", 1.0)])
def test_the_order_of_an_inversion(solver: str, expected: float):
    """From data to the noise that is known, and back to the data."""
    data = tiny.latents()
    errors, returns = [], []
    for steps in (64, 128):
        times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        noise = invert(known, data, times, solver)
        errors.append(tiny.error(noise, math.e * data))
        returns.append(tiny.error(specs.build("solver", solver)(known, noise, times), data))
    assert errors[1] < 0.02
    assert order(*errors) == pytest.approx(expected, abs=0.15)
    assert order(*returns) > expected - 0.15, "a symmetric error may cancel on the way back"


@torch.no_grad()
def test_the_latents_come_back_through_a_dit():
    """Inversion and sampling under one prompt; the error falls with the second order of the solver."""
    dit, data = tiny.dit(dtype=torch.float64, depth=2), tiny.latents()
    velocity = guided(dit, tiny.caption([5, 9]), tiny.caption([1], 3), 1.0)
    errors = []
    for steps in (32, 64):
        times = Flow(1.0).schedule(steps)
        back = specs.build("solver", "rf_solver")(velocity, invert(velocity, data, times), times)
        errors.append(tiny.error(back, data))
    assert 0 < errors[1] < 1e-2
    assert order(*errors) > 1.6


@pytest.mark.parametrize("name", ["softmax", "linear"])
@torch.no_grad()
def test_values_of_the_inversion_replace_those_of_the_edit(name: str):
    """At a stored time and input, nothing changes; at another input, q and k are its own and values are stored."""
    dit = tiny.dit(dtype=torch.float64, depth=4, attention={"name": name, "head_dim": 8})
    x, t, text = tiny.latents(), torch.full((2,), 0.5), tiny.caption([5, 9])
    values = Values([3])
    plain = dit.prepare(text)
    stored = values.timed(values.storing(plain))(x, t)
    assert torch.allclose(stored, plain(x, t))
    read = values.timed(values.reading(plain))
    torch.testing.assert_close(read(x, t), stored, rtol=0, atol=1e-12)
    other = tiny.latents(seed=8)
    changed = values.timed(values.reading(plain))(other, torch.full((2,), 0.6))  # the nearest time is 0.5
    assert tiny.error(changed, plain(other, torch.full((2,), 0.6))) > 1e-3
    assert torch.equal(values.timed(values.reading(plain), 0)(other, t), plain(other, t))
    attention, tokens = dit.blocks[3].attention, torch.randn(2, 4, 6, 32, dtype=torch.float64)
    q, k, _ = attention.projected(tokens).unbind(2)
    v = values.stored[0.5][3]
    values.time = 0.5
    by_hand = attention.output(attention.mix(q, k, v), tokens)
    torch.testing.assert_close(values._read(3, attention, tokens, 2), by_hand)
    pair = values._read(3, attention, torch.cat([tokens, tokens]), 2)  # with a null text's rows
    torch.testing.assert_close(pair, torch.cat([by_hand, by_hand]))


def test_blocks_whose_values_are_handed_over():
    assert storable(tiny.dit(depth=4)) == [2, 3]
    assert storable(tiny.dit(depth=4, attention=["linear", "conv"])) == [2]
    with pytest.raises(SpecError, match=r"this DiT has ConvMixer there, without values; expected 0, or a DiT with"):
        storable(tiny.dit(depth=4, attention=["linear", "linear", "conv", "conv"]))
    with pytest.raises(SpecError, match="this DiT has no blocks there"):
        storable(torch.nn.Identity())
    with pytest.raises(SpecError, match="this DiT has NoneType there"):
        storable(SimpleNamespace(blocks=[torch.nn.Identity()]))


class OwnOrder(Attention):
    """Of a user, with a forward pass of its own."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return v

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x.flip(1)).flip(1)


def test_a_forward_pass_without_values_hands_none_over():
    block = torch.nn.Module()
    block.attention = OwnOrder(32, 8, False)
    with pytest.raises(SpecError, match="has OwnOrder there, without values"):
        storable(SimpleNamespace(blocks=[block]))


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("side", [8, 6])
@torch.no_grad()
def test_every_mixer_mixes_values_that_are_handed_over_by_its_own_forward(name: str, side: int):
    """At the stored input the edit is the plain model; of others it is refused."""
    dit = tiny.dit(dtype=torch.float64, attention=name)
    x, t = tiny.latents(size=(side, side)), torch.full((2,), 0.5)
    if not isinstance(dit.blocks[1].attention, Attention):
        with pytest.raises(SpecError, match="without values"):
            storable(dit)
        return
    plain, values = dit.prepare(tiny.caption([5, 9])), Values(storable(dit))
    expected = plain(x, t)
    torch.testing.assert_close(values.timed(values.storing(plain))(x, t), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(values.timed(values.reading(plain))(x, t), expected, rtol=0, atol=1e-10)
    other = tiny.latents(size=(side, side), seed=8)
    assert tiny.error(values.timed(values.reading(plain))(other, t), plain(other, t)) > 1e-4


@pytest.mark.parametrize(
    ("solver", "inject", "expected"),
    [
        *[("euler", 0.25, 1), ("euler", 0.5, 2), ("euler", 1.0, 4), ("euler", 0.01, 1), ("euler", 0.0, 0)],
        *[("heun", 0.25, 2), ("heun", 0.5, 4), ("heun", 1.0, 7)],
        *[("rf_solver", 0.25, 2), ("rf_solver", 0.75, 6), ("rf_solver", 1.0, 8)],
    ],
)
@torch.no_grad()
def test_evaluations_that_read_values(solver: str, inject: float, expected: int):
    """Of four steps, on the float32 times that a solver passes."""
    times, reads = Flow(3.0).schedule(4), list[bool]()
    values = Values([])

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        reads.append(values.time is not None)
        return x

    counted = values.timed(velocity, evaluations_of(inject, times, solver))
    specs.build("solver", solver)(counted, tiny.latents(dtype=torch.float32), times)
    assert reads == [True] * expected + [False] * (len(reads) - expected)
    assert len(reads) == {"euler": 4, "heun": 7, "rf_solver": 8}[solver]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pag": 1.0}, r"sampling.pag is 1.0, which an edit does not apply; expected 0.0"),
        ({"regions": "relations"}, r"sampling.regions is 'relations', which an edit does not apply; expected None"),
        ({"cache": "first_block"}, r"sampling.cache is 'first_block', which an edit does not apply"),
        ({"best_of": 2, "best_by": "clip_shapes"}, r"sampling.best_of is 2, which an edit does not apply; expected 1"),
        ({"offload": True}, r"sampling.offload is True, which an edit does not apply; expected False"),
        ({"graph": "always"}, r"sampling.graph is 'always', and an edit captures no graphs"),
    ],
)
def test_options_that_an_edit_does_not_apply(options: dict[str, Any], message: str):
    with pytest.raises(SpecError, match=message):
        edit(tiny.text2image().eval(), pictures(), ["a"] * 2, ["b"] * 2, sampling=how(**options))


def test_an_edit_refuses_predicted_data():
    system = tiny.text2image(prediction="data").eval()
    with pytest.raises(SpecError, match=r"divided by t; expected system.prediction: velocity"):
        edit(system, pictures(), ["a"] * 2, ["b"] * 2, sampling=how())


@torch.no_grad()
def test_an_edit_quantises():
    """As sampling does, a copy for the call; the result is that of the system quantised in place."""
    prompts, changes = ["a ring", "a star"], ["a red star", "a cross"]
    system = tiny.text2image(dit={**tiny.DIT, "depth": 2}).eval()
    exact = edit(system, pictures(), prompts, changes, sampling=how(2))
    rounded = edit(system, pictures(), prompts, changes, sampling=how(2, quantize="int4_simulated"))
    assert not torch.equal(exact, rounded)
    system.prepare_for_sampling(how(quantize="int4_simulated"), "cpu")
    assert torch.equal(rounded, edit(system, pictures(), prompts, changes, sampling=how(2, quantize="int4_simulated")))


def pictures() -> Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, 16, 32), generator=random, dtype=torch.uint8)


def how(steps: int = 12, **options: Any) -> Sampling:
    return Sampling(**{"solver": "rf_solver", "steps": steps, "guidance": 1.0, **options})


@torch.no_grad()
def test_the_same_prompt_gives_the_reconstruction():
    """And another prompt gives another picture, with guidance, values of the inversion and prompts of two lengths."""
    system = tiny.text2image(dit={**tiny.DIT, "depth": 2}).eval()
    images, prompts = pictures(), ["a ring", "a photo of three stars"]
    decoded = system.pixels(system.autoencoder.encode(images.float() / 127.5 - 1))
    same = edit(system, images, prompts, prompts, sampling=how(48))
    assert (same.float() - decoded.float()).abs().mean() < 1
    changed = edit(system, images, prompts, ["a red star", "a cross"], sampling=how(guidance=4.0))
    kept = edit(system, images, prompts, ["a red star", "a cross"], sampling=how(guidance=4.0), inject=1.0)
    assert changed.shape == kept.shape == images.shape
    assert not torch.equal(changed, kept)
    assert not torch.equal(changed, edit(system, images, prompts, prompts, sampling=how()))
    alone = edit(system, images[1:], prompts[1:], ["a cross"], sampling=how(guidance=4.0), inject=1.0)
    assert (alone.float() - kept[1:].float()).abs().max() <= 1


def test_what_an_edit_does_not_do():
    with pytest.raises(SpecError, match=r"solver is 'dpmpp', which runs from noise to data alone; .* rf_solver, heun"):
        check("dpmpp", 0.0)
    with pytest.raises(SpecError, match=r"inject is 1.5, expected a share .* from 0 to 1; the nearest is 1"):
        check("euler", 1.5)
    system = tiny.text2image().eval()
    with pytest.raises(ValueError, match=r"image size 20 x 16 is not a multiple of 8 .* the nearest is 16 x 16"):
        edit(system, torch.zeros(1, 3, 20, 16, dtype=torch.uint8), ["a"], ["b"], sampling=how())
    with pytest.raises(ValueError, match="2 images, 1 prompts of them and 2 of the edits were given"):
        edit(system, pictures(), ["a"], ["b", "c"], sampling=how())
    with pytest.raises(ValueError, match="this model predicts noise"):
        edit(tiny.text2image(objective="ddpm").eval(), pictures(), ["a"] * 2, ["b"] * 2, sampling=how())


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Of the model that ships; bad input is one line before anything is loaded."""
    picture, out = tmp_path / "circle.png", tmp_path / "edited.png"
    Image.new("RGB", (64, 64), "gray").save(picture)
    words = ["edit", str(picture), "--from", "a red circle", "--to", "a blue circle"]
    assert main([*words, "--out", str(out), "--set", "sampling.steps=2"]) == 0
    with Image.open(out) as result:
        assert result.size == (64, 64)
        about = json.loads(result.text["sana_lab"])
        assert (result.text["prompt"], about["source"], about["inject"]) == ("a blue circle", "a red circle", 0.0)
        assert (about["model"], about["sampling"]["steps"]) == ("shapes_sana", 2)
    (tmp_path / "text.png").write_text("no picture")
    wrong = {
        "--inject is NaN": ([*words, "--out", str(out), "--inject", "nan"], "inject is nan, expected a share"),
        "--inject is no share": ([*words, "--out", str(out), "--inject", "2"], "the nearest is 1"),
        "no png": ([*words, "--out", str(tmp_path / "a.jpg")], "expected a .png; the nearest is"),
        "no prompt": (["edit", str(picture), "--from", " ", "--to", "b", "--out", str(out)], "--from is empty"),
        "no picture": (["edit", str(tmp_path / "text.png"), *words[2:], "--out", str(out)], "is no picture"),
    }
    for given, message in wrong.values():
        assert main(given) == 1
        assert message in capsys.readouterr().err


def test_a_picture_is_turned_as_its_exif_says(tmp_path: Path):
    picture, exif = Image.new("RGB", (16, 8), "red"), Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert read(tmp_path / "turned.jpg").shape == (3, 16, 8)
