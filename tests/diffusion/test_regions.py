"""Regions: where they lie, how they bind and blend, against the same by hand on a tiny DiT."""

from functools import partial
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from sana_lab.config import experiments, hashing, schema, specs
from sana_lab.config.specs import SpecError
from sana_lab.diffusion.guidance import guided
from sana_lab.diffusion.perturbed_attention import Perturbation
from sana_lab.diffusion.regional import Encoded, plan, regional
from sana_lab.diffusion.regions import Fixed, Region, Regions, check, on_grid, parse
from sana_lab.diffusion.sampling import Sampling
from sana_lab.models.dit import Dit, TextDit
from sana_lab.training import checks
from sana_lab.types import Text, Velocity

GRID, PATCH = (4, 4), 1
PROMPTS, NULL, PARTS = tiny.caption([5, 9, 2]), tiny.caption([1], 3), tiny.caption([3, 6], 4)
LEFT, RIGHT, CORNER = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0), (0.0, 0.0, 0.5, 0.25)
TIMES = torch.linspace(1, 0.1, 10, dtype=torch.float64)


class OfMiddle(Regions):
    """Regions of the picture of prompt "1" alone."""

    def __init__(self, regions: list[Region], **how: Any) -> None:
        super().__init__(**{"hard": 0.5, "blend": 0.25, "binding": "cropped", **how})
        self.regions = regions

    def plan(self, prompt: str) -> list[Region]:
        return self.regions if prompt == "1" else []


@pytest.fixture(scope="module")
def dit() -> Dit:
    return tiny.dit(dtype=torch.float64, depth=2)


def latents() -> Tensor:
    return tiny.latents(3, GRID)


def times(t: float, rows: int = 3) -> Tensor:
    return torch.full((rows,), t, dtype=torch.float64)


def velocity(dit: Dit, boxes: list[Any], scale: float = 3.0, pag: Perturbation | None = None, **how: Any) -> Velocity:
    rule = OfMiddle([Region(box, str(i)) for i, box in enumerate(boxes)], **how)
    chosen = plan(rule, ["0", "1", "2"], GRID)
    assert chosen is not None
    parts = Text(PARTS.tokens[: len(boxes)], PARTS.mask[: len(boxes)])
    guide = partial(guided, dit, scale=scale, pag=pag)
    return regional(guide, PROMPTS, NULL, Encoded(chosen, parts), rule, TIMES, PATCH)


def of(text: Text, *rows: int) -> Text:
    return Text(text.tokens[[*rows]], text.mask[[*rows]])


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("boxes", [[LEFT, RIGHT], [CORNER, RIGHT], [LEFT]])
@pytest.mark.parametrize("binding", ["cropped", "whole"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
@torch.no_grad()
def test_a_bound_region_sees_its_own_prompt_alone(dit: Dit, boxes: list[Any], binding: str, scale: float):
    x, t = latents(), times(0.9)
    result = velocity(dit, boxes, scale, binding=binding)(x, t)
    plain = guided(dit, PROMPTS, NULL, scale)(x, t)
    expected = plain.clone()
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        rows, columns = slice(int(y0 * 4), int(y1 * 4)), slice(int(x0 * 4), int(x1 * 4))
        own = guided(dit, of(PARTS, i), NULL, scale)
        if binding == "cropped":
            expected[1, :, rows, columns] = own(x[1:2, :, rows, columns], t[:1])[0]
        else:
            expected[1, :, rows, columns] = own(x[1:2], t[:1])[0, :, rows, columns]
    close(result, expected)
    close(result[[0, 2]], plain[[0, 2]])
    assert tiny.error(result[1], plain[1]) > 1e-3


@torch.no_grad()
def test_the_first_share_of_evaluations_binds(dit: Dit):
    x = latents()
    for share, bound in ((0.0, []), (0.3, [1.0, 0.9, 0.8]), (1.0, TIMES.tolist())):
        whole, soft = velocity(dit, [LEFT], hard=share), velocity(dit, [LEFT], hard=0.0)
        differing = [t for t in TIMES.tolist() if not torch.allclose(whole(x, times(t)), soft(x, times(t)), atol=1e-9)]
        assert differing == pytest.approx(bound)


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("pag", [None, Perturbation(2.0)])
@torch.no_grad()
def test_blend_1_of_the_whole_picture_is_the_regions_prompt(dit: Dit, scale: float, pag: Perturbation | None):
    """And blend 0 is the picture's, in every row of guidance."""
    x, t = latents(), times(0.2)
    result = velocity(dit, [(0.0, 0.0, 1.0, 1.0)], scale, pag, blend=1.0)(x, t)
    plain = guided(dit, PROMPTS, NULL, scale, pag=pag)(x, t)
    close(result[1:2], guided(dit, of(PARTS, 0), NULL, scale, pag=pag)(x[1:2], t[:1]))
    close(result[[0, 2]], plain[[0, 2]])
    close(velocity(dit, [LEFT], scale, pag, blend=0.0)(x, t), plain)
    assert tiny.error(result[1], plain[1]) > 1e-3


@torch.no_grad()
def test_cross_attention_is_blended_token_by_token(dit: Dit):
    """Of one block, whose output is what both captions give, mixed at the tokens of the region."""
    weights = torch.zeros(1, *GRID, 1)
    weights[0, :, :2] = 0.25
    model = dit.prepare(PROMPTS)
    both = model.also_reading(dit.prepare(of(PARTS, 0)), [1], weights)
    cross, x = dit.blocks[0].cross, torch.randn(3, *GRID, 32, dtype=torch.float64)
    read = both.reading[0](cross, x, model.keys[0], model.values[0], model.mask)
    own, part = model, dit.prepare(of(PARTS, 0))
    expected = cross(x, own.keys[0], own.values[0], own.mask)
    other = cross(x[1:2], part.keys[0], part.values[0], part.mask)
    expected[1, :, :2] = 0.75 * expected[1, :, :2] + 0.25 * other[0, :, :2]
    close(read, expected)


@torch.no_grad()
def test_a_picture_does_not_depend_on_its_batch(dit: Dit):
    x = latents()
    rule = OfMiddle([Region(LEFT, "a"), Region(RIGHT, "b")])
    chosen = plan(rule, ["1"], GRID)
    assert chosen is not None
    guide = partial(guided, dit, scale=3.0)
    alone = regional(guide, of(PROMPTS, 1), NULL, Encoded(chosen, PARTS), rule, TIMES, PATCH)
    for t in (0.9, 0.2):
        close(velocity(dit, [LEFT, RIGHT])(x, times(t))[1:2], alone(x[1:2], times(t, 1)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0,0,0.5: a", r"has another form, expected 'x0,y0,x1,y1: prompt', such as '0,0,0.5,1: a red circle'"),
        ("0,0,32,64: a", r"region 0,0,32,64 is outside .* from 0 to 1 .*; the nearest is 0,0,1,1"),
        ("-0.2,0,0.5,1: a", r"region -0.2,0,0.5,1 is outside .*; the nearest is 0,0,0.5,1"),
        ("2,2,3,3: a", r"is outside .*; the nearest is 0,0,1,1"),
        ("0.5,0,0.2,1: a", r"region 0.5,0,0.2,1 is empty, expected x0 < x1 and y0 < y1; the nearest is 0.2,0,0.5,1"),
        ("0.5,0,0.5,1: a", r"is empty, .*; the nearest is 0,0,1,1"),
        ("0,0,0.5,1: ", r"region 0,0,0.5,1 has no prompt"),
    ],
)
def test_a_region_that_cannot_be(text: str, message: str):
    with pytest.raises(SpecError, match=message):
        Sampling(regions={"name": "fixed", "regions": [text]})


def test_regions_that_overlap():
    """The answer is legal itself."""
    cases = [("0,0,0.6,1", "0.5,0,1,1", "0.6,0,1,1"), ("0,0.5,1,1", "0,0,1,0.75", "0,0,1,0.5")]
    cases += [("0,0,0.75,1", "0.2,0.2,0.5,0.5", "0.75,0,1,1")]
    for first, second, near in cases:
        regions = [parse(f"{box}: a") for box in (first, second)]
        with pytest.raises(
            SpecError, match=f"regions {first} and {second} overlap, .*; the nearest is {near} in place"
        ):
            check(regions)
        check([regions[0], parse(f"{near}: a")])
    check([parse("0,0,0.5,1: a"), parse("0.5,0,1,1: b")])


def test_a_region_on_the_grid_of_tokens():
    """Edges move to the nearest edges of tokens; what would have none is an error with the nearest token."""
    assert on_grid(parse("0.1,0,0.6,1: a"), (4, 4)) == (0, 0, 2, 4)
    with pytest.raises(SpecError, match=r"smaller than a latent token, of which the picture has 2 x 4; .* 0.5,0,1,1"):
        on_grid(parse("0.6,0,0.7,1: a"), (4, 2))
    with pytest.raises(SpecError, match=r"the nearest is 0,0,0.5,1"):
        checks.check(experiments.load("shapes_sana", ['sampling.regions={name: fixed, regions: ["0,0,0.2,1: a"]}']))


def test_what_regions_do_not_go_with(dit: Dit):
    given = {"name": "fixed", "regions": ["0,0,0.5,1: a"]}
    with pytest.raises(ValueError, match=r"sampling.cache is set, and sampling.regions changes"):
        Sampling(regions=given, cache="tea")
    with pytest.raises(
        ValueError, match=r"sampling.graph is set, and sampling.regions .* expected graph auto or never"
    ):
        Sampling(regions=given, graph="always")
    with pytest.raises(SpecError, match="no regions is called 'halves'"):
        experiments.check_sampling({"regions": "halves"})
    text, rule = PROMPTS, Fixed(["0,0,0.5,1: a"])
    chosen = plan(rule, ["0", "1", "2"], GRID)
    assert chosen is not None

    def guide(text: Text, null: Text, refine: Any = lambda model: model) -> Velocity:
        return refine(TextDit(dit, text))

    with pytest.raises(
        SpecError, match="blends prompts in the blocks of a denoiser, and Sana has none; expected blend 0"
    ):
        regional(guide, text, NULL, Encoded(chosen, of(PARTS, 0, 0, 0)), rule, TIMES, PATCH)


def test_regions_are_a_trial_of_their_own_of_the_same_model():
    plain, changed = (experiments.load("shapes_sana", o) for o in ([], ["sampling.regions=relations"]))
    assert hashing.experiment_hash(plain) == hashing.experiment_hash(changed)
    assert len({hashing.trial_hash(schema.Trial({}, 0, e)) for e in (plain, changed)}) == 2


def test_a_system_samples_regions():
    """Without a region the images are as without the option; two fixed regions change them, in any batch."""
    system = tiny.text2image(dit={**tiny.DIT, "depth": 2}).eval()
    prompts = ["a ring", "a photo of a circle left of a star"]

    def sample(regions: Any, batch: int = 64) -> Tensor:
        how = Sampling("euler", 6, 3.0, regions=regions)
        return system.sample(prompts, size=32, sampling=how, batch=batch)

    plain, halves = sample(None), sample("relations")
    assert torch.equal(plain[0], halves[0])
    assert not torch.equal(plain[1], halves[1])
    fixed = sample({"name": "fixed", "regions": ["0,0,0.5,1: a photo of a circle", "0.5,0,1,1: a photo of a star"]})
    assert torch.equal(fixed[1], halves[1])
    assert (sample("relations", batch=1).float() - halves.float()).abs().max() <= 1
    with pytest.raises(SpecError, match="smaller than a latent token, of which the picture has 1 x 1"):
        system.sample(prompts, size=8, sampling=Sampling("euler", 2, regions="relations"))


def test_spec_of_fixed_regions_is_plain_data():
    spec = specs.resolve("regions", {"name": "fixed", "regions": ["0,0,0.5,1: a"]})
    assert spec == {"name": "fixed", "regions": ["0,0,0.5,1: a"], "hard": 0.3, "blend": 0.3, "binding": "cropped"}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"hard": -1.0}, r"hard of regions is -1, expected a share from 0 to 1; the nearest is 0"),
        ({"blend": 5.0}, r"blend of regions is 5, expected a share from 0 to 1; the nearest is 1"),
        ({"hard": 0.0, "blend": 0.0}, r"hard and blend of regions are 0, which does nothing"),
        ({"binding": "half"}, r"binding of regions is 'half', expected cropped or whole"),
    ],
)
def test_the_options_of_a_rule_of_ones_own_are_checked(how: dict[str, Any], message: str):
    with pytest.raises(SpecError, match=message):
        OfMiddle([], **how)


def test_a_plan_of_plain_tuples_is_refused():
    rule = OfMiddle([((0.0, 0.0, 0.5, 1.0), "a ring")])  # type: ignore[list-item]
    with pytest.raises(SpecError, match=r"plan of OfMiddle gives \(\(0.0, .*, expected a Region, such as Region"):
        rule.boxes("1", GRID)


@torch.no_grad()
def test_a_small_share_binds_one_evaluation(dit: Dit):
    x, tiny_share = latents(), velocity(dit, [LEFT], hard=0.01)
    bound, free = velocity(dit, [LEFT], hard=1.0), velocity(dit, [LEFT], hard=0.0)
    assert torch.equal(tiny_share(x, times(1.0)), bound(x, times(1.0)))
    assert torch.equal(tiny_share(x, times(0.9)), free(x, times(0.9)))
    assert not torch.equal(bound(x, times(1.0)), free(x, times(1.0)))
