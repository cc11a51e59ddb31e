"""Best of N: which noise the candidates have, which of them is kept, and what may choose."""

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from sana_lab import api
from sana_lab.config import experiments, hashing, schema, specs
from sana_lab.config.specs import SpecError
from sana_lab.diffusion.sampling import NoiseStreams, Sampling
from sana_lab.evaluation import Measure, Report
from sana_lab.shapes import scenes
from sana_lab.systems import best_of
from sana_lab.training import checks

PROMPTS = ["a red circle", "three stars", "a ring"]


class Brightness(Measure):
    """The brighter the better."""

    def add(self, images: Tensor, rows: Any) -> None:
        raise AssertionError("a choice adds nothing to a measure")

    def extract(self, images: Tensor, rows: Any) -> list[float]:
        return images.float().flatten(1).mean(1).tolist()

    def report(self) -> Report:
        return Report({}, {})


BRIGHT = f"{__name__}:Brightness"


def sample(count: int, **options: Any) -> Tensor:
    system = tiny.text2image().eval()
    by = BRIGHT if count > 1 else None
    return system.sample(PROMPTS, size=16, sampling=Sampling("euler", 2, 3.0, best_of=count, best_by=by), **options)


def test_the_best_candidate_is_kept_and_more_of_them_are_no_worse():
    """By hand: all candidates of each prompt, and their maximum."""
    scores = [torch.tensor(Brightness().extract(sample(n), [])) for n in (1, 2, 4)]
    assert (scores[1] >= scores[0]).all()
    assert (scores[2] >= scores[1]).all()
    assert (scores[2] > scores[0]).any()
    system, how = tiny.text2image().eval(), Sampling("euler", 2, 3.0)
    streams = NoiseStreams(system.latent_shape(16), 0, best_of.candidates(range(3), 4))
    every = system._sample_batch(best_of.repeated(PROMPTS, 4), [""] * 12, streams, how, system.dit)
    highest = torch.tensor(Brightness().extract(every, [])).view(3, 4).max(1).values
    torch.testing.assert_close(scores[2], highest, rtol=0, atol=0.02)


def test_the_choice_does_not_depend_on_the_batch():
    assert (sample(4, batch=2).float() - sample(4).float()).abs().max() <= 1


def test_candidates_are_sampled_within_the_batch(monkeypatch: pytest.MonkeyPatch):
    """More of them than the batch, in parts; the choice is that of one batch."""
    system, sizes = tiny.text2image().eval(), list[int]()
    sample_batch = system._sample_batch

    def counted(prompts: Any, *rest: Any) -> Tensor:
        sizes.append(len(prompts))
        return sample_batch(prompts, *rest)

    monkeypatch.setattr(system, "_sample_batch", counted)
    how = Sampling("euler", 2, 3.0, best_of=5, best_by=BRIGHT)
    images = system.sample(PROMPTS, size=16, sampling=how, batch=2)
    assert sizes == [2, 2, 1] * 3
    assert (images.float() - sample(5).float()).abs().max() <= 1


def test_noise_of_candidates():
    """The first is the noise without a choice; all differ; those of one image depend on its index alone."""
    assert best_of.candidates([3, 7], 1) == [(3,), (7,)]
    assert best_of.candidates([3], 3) == [(3,), (3, 1), (3, 2)]
    assert best_of.candidates([3, 7], 2, 2) == [(3, 2), (3, 3), (7, 2), (7, 3)]
    shape = (1, 2, 2)
    noise = NoiseStreams(shape, 5, best_of.candidates([3, 7], 3))()
    assert torch.equal(noise[[0, 3]], NoiseStreams(shape, 5, [3, 7])())
    assert torch.equal(noise[3:], NoiseStreams(shape, 5, best_of.candidates([7], 3))())
    assert len({tuple(x.flatten().tolist()) for x in noise}) == 6


def test_the_first_of_equals_is_kept():
    images = torch.stack([torch.full((3, 2, 2), v, dtype=torch.uint8) for v in (9, 9, 3, 4, 8, 8)])
    images[1, 0, 0, 0], images[1, 1, 0, 0] = 8, 10  # as bright
    assert torch.equal(best_of.best(images, ["a", "b"], specs.resolve("measure", BRIGHT)), images[[0, 4]])


@pytest.mark.parametrize("name", ["exact_shapes", "geneval"])
def test_the_judge_of_shapes_scores_any_prompt_in_genevals_forms(name: str):
    """Drawn scenes of one object: 1 for its own prompt, 0 for another colour; outside of the measure's own rows too."""
    measure = specs.build("measure", {"name": name, "prompts_per_task": 1})
    rows = scenes.scenes(3, range(40))
    chosen = [i for i in range(40) if len(scenes.scene(rows, i).things) == 1][:4]
    images = torch.from_numpy(scenes.render(rows, 64))[chosen]
    images = images if images.shape[1] == 3 else images.permute(0, 3, 1, 2)
    things = [scenes.scene(rows, i).things[0] for i in chosen]
    names = [f"{t.color} {t.shape}" for t in things]
    right = [f"a photo of {'an' if n[0] in 'aeiou' else 'a'} {n}" for n in names]
    other = [f"a {'red' if t.color != 'red' else 'blue'} {t.shape}" for t in things]
    assert len(chosen) == 4
    assert measure.score_images(images, right) == [1.0] * 4
    assert measure.score_images(images, other) == [0.0] * 4
    assert measure.score_images(images, [right[0].removeprefix("a photo of "), *right[1:]]) == [1.0] * 4
    with pytest.raises(SpecError, match=r"'a big dog' is none of GenEval's prompts.* such as 'a red \w+'"):
        measure.score_images(images[:1], ["a big dog"])


def test_what_cannot_choose():
    for given in ({"best_of": 2}, {"best_by": "clip_shapes"}):
        with pytest.raises(ValueError, match=r"best_of is \d and best_by is .*; expected both"):
            Sampling(**given)
    distances = specs.resolve("measure", {"name": "distances", "extractor": "shapes"})
    with pytest.raises(
        SpecError, match=r"best_by is Distances, which scores no single images; expected .* clip_shapes"
    ):
        best_of.best(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), ["a"], distances)
    with pytest.raises(SpecError, match="no measure is called 'clip_shape'"):
        experiments.check_sampling({"best_of": 2, "best_by": "clip_shape"})


def test_what_cannot_choose_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch):
    """With the experiment, and at the start of sampling; GenEval's rule for prompts of other forms too."""
    system = tiny.text2image().eval()
    for by, message in (
        ({"name": "distances", "extractor": "shapes"}, "best_by is distances, which scores no single images"),
        ({"name": "geneval", "prompts_per_task": 1}, "'three stars of gold' is none of GenEval's prompts"),
    ):
        monkeypatch.setattr(system, "_sample_batch", lambda *_: pytest.fail("work before the error"))
        sampling = Sampling("euler", 2, best_of=2, best_by=specs.resolve("measure", by))
        with pytest.raises(SpecError, match=message):
            system.sample(["a red circle", "three stars of gold"], size=16, sampling=sampling)
    loaded = experiments.load(
        "shapes_sana", ["sampling.best_of=2", "sampling.best_by={name: distances, extractor: shapes}"]
    )
    with pytest.raises(SpecError, match="best_by is distances, which scores no single images"):
        checks.check(loaded)
    chosen = ["sampling.best_of=2", "sampling.best_by=geneval"]
    checks.check(experiments.load("shapes_sana", [*chosen, "prompts=[a photo of three circles]"]))
    with pytest.raises(SpecError, match="'three yellow circles' is none of GenEval's prompts"):
        checks.check(experiments.load("shapes_sana", chosen))


def test_the_chooser_enters_the_hash_by_what_it_is():
    plain = experiments.load("shapes_sana")
    keys = set()
    for by in (None, "exact_shapes", "clip_shapes"):
        overrides = [] if by is None else ["sampling.best_of=2", f"sampling.best_by={by}"]
        loaded = experiments.load("shapes_sana", overrides)
        assert hashing.experiment_hash(loaded) == hashing.experiment_hash(plain)
        keys.add(hashing.trial_hash(schema.Trial({}, 0, loaded)))
    assert len(keys) == 3


def options(*words: str) -> Any:
    from sana_lab.__main__ import parse

    return parse(["sample", "a ring", "--out", "x", *words])


def test_options_of_the_command_line():
    given = options(
        "--region", "0,0,0.5,1: a star", "--region", "0.5,0,1,1: a ring, red", "--best-of", "3", "--by", "geneval"
    )
    sampling = experiments.load("shapes_sana", api.sampling_overrides(given))["sampling"]
    assert sampling["regions"]["regions"] == ["0,0,0.5,1: a star", "0.5,0,1,1: a ring, red"]
    assert (sampling["best_of"], sampling["best_by"]["name"]) == (3, "geneval")
    assert api.sampling_overrides(options()) == []
    with pytest.raises(SpecError, match="--best-of and --by belong together; expected both"):
        api.sampling_overrides(options("--best-of", "3"))
    with pytest.raises(SpecError, match=r"region 0,0,2,1 is outside .* the nearest is 0,0,1,1"):
        api.sampling_overrides(options("--region", "0,0,2,1: a star"))


def test_a_network_chooses():
    """Of the drawn picture that a prompt describes and another one, whichever comes first."""
    rows = scenes.scenes(3, range(40))
    first, second = [i for i in range(40) if len(scenes.scene(rows, i).things) == 1][:2]
    images = torch.from_numpy(scenes.render(rows, 64))[[first, second]]
    images = images if images.shape[1] == 3 else images.permute(0, 3, 1, 2)
    things = [scenes.scene(rows, i).things[0] for i in (first, second)]
    by = specs.resolve("measure", "clip_shapes")
    for k, thing in enumerate(things):
        assert torch.equal(best_of.best(images, [f"a {thing.color} {thing.shape}"], by)[0], images[k])
