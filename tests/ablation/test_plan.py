"""Ablations as files: the product of their axes, scales, overrides, and what is said of mistakes."""

from pathlib import Path
from typing import Any

import pytest
import tiny
from tiny import write

from sana_lab.ablation import plan
from sana_lab.config import hashing, schema
from sana_lab.config.specs import SpecError


@pytest.fixture(autouse=True)
def recipes(here: Path) -> None:
    """An experiment, `tiny`, in an empty working directory."""
    tiny.write_experiment(here, text=tiny.SEEDED)


def message_of(*arguments: Any, **options: Any) -> str:
    """What the SpecError says that loading raises."""
    with pytest.raises(SpecError) as raised:
        plan.load(*arguments, **options)
    return str(raised.value)


ABLATION = """
title: Two by two
base: tiny
common: {trainer.max_steps: 1, system.dit.depth: 2}
axes:
  attention:
    softmax: {system.dit.attention: softmax}
    linear: {}
  steps:
    few: {sampling.steps: 2}
    many: {sampling.steps: 5}
seeds: [0, 1]
prompts: [a red circle]
"""


def test_an_ablation_is_the_product_of_its_axes_and_seeds(here: Path):
    write(here, "ablations/two.yaml", ABLATION)
    _, ablation, trials = plan.load("two")[:3]
    assert ablation.title == "Two by two"
    assert [t.label for t in trials[:4]] == ["softmax · few", "softmax · many", "linear · few", "linear · many"]
    assert [t.seed for t in trials] == [0] * 4 + [1] * 4
    assert {t.config["system"]["dit"]["depth"] for t in trials} == {2}
    assert [t.config["system"]["seed"] for t in trials] == [0] * 4 + [1] * 4  # by ${seed}
    assert trials[2].config["system"]["dit"]["attention"]["eps"] == 1e-6
    assert trials[0].config["prompts"] == ["a red circle"]


def test_equal_settings_are_one_model_and_one_trial(here: Path):
    write(here, "ablations/two.yaml", ABLATION)
    trials = plan.load("two").trials
    models = [hashing.experiment_hash(t.config) for t in trials]
    assert models[0] == models[1]
    assert len(set(models)) == 4
    assert len({hashing.trial_hash(t) for t in trials}) == 8
    again = plan.load("two").trials
    assert [hashing.trial_hash(t) for t in again] == [hashing.trial_hash(t) for t in trials]


def test_best_of_has_a_line_over_the_candidates_for_each_chooser():
    """One candidate is the image without a choice: one trial for all choosers."""
    loaded = plan.load("best_of")
    assert loaded.table.x == "candidates"
    lines = {chooser: [] for chooser in loaded.table.axes["chooser"]}
    for trial in loaded.trials:
        lines[trial.labels["chooser"]].append(trial)
        assert trial.config["sampling"]["best_of"] == int(trial.labels["candidates"])
    assert len(lines) == 2
    assert all([t.config["sampling"]["best_of"] for t in line] == [1, 2, 4, 8] for line in lines.values())
    assert len({hashing.trial_hash(t) for line in lines.values() for t in line}) == 7


def test_methods_have_both_answers_to_the_holes_of_token_routing():
    tread = [m for t in plan.load("methods").trials if (m := t.config["system"].get("method")) and m["name"] == "tread"]
    assert [m["holes"] for m in tread] == ["fill", "skip"] * 3


def test_a_label_overrides_what_is_common_and_the_command_line_overrides_all(here: Path):
    write(here, "ablations/one.yaml",
          "title: t\nbase: tiny\ncommon: {trainer.max_steps: 1}\n"
          "axes: {a: {x: {trainer.max_steps: 5}, y: }}\n")  # fmt: skip
    assert [t.config["trainer"]["max_steps"] for t in plan.load("one").trials] == [5, 1]
    assert [t.config["trainer"]["max_steps"] for t in plan.load("one", ["trainer.max_steps=9"]).trials] == [9, 9]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("title: t\nbase: tiny\n", ("needs 'axes'",)),
        ("title: t\nbase: tiny\naxes: {}\n", ("has no axes with labels",)),
        ("title: t\nbase: tiny\naxes: {a: {}}\n", ("has no axes with labels",)),
        ("title: t\nbase: tiny\naxes: {a: [1]}\n", ("odd.axes.a is [1] (list)", "expected dict")),
        ("title: t\nbase: tiny\naxes: {a: {x: 3}}\n", ("odd.axes.a.x is 3 (int)", "expected dict")),
        ("title: t\nbase: tinny\naxes: {a: {x: {}}}\n", ("there is no experiment 'tinny'", "did you mean 'tiny'?")),
        ("title: t\nbase: tiny\naxis: {a: {x: {}}}\n", ("has no option 'axis'", "did you mean 'axes'?")),
        ("title: t\nbase: tiny\nseeds: [a]\naxes: {a: {x: {}}}\n", ("odd.seeds[0] is 'a'", "expected int")),
        ("title: t\nbase: tiny\naxes: {a: {x: {sampling.step: 5}}}\n",
         ("t: x.sampling has no option 'step'", "did you mean 'steps'?")),
        ("title: t\nbase: tiny\naxes: {a: {x: {1: 2}}}\n", ("has no option '1'",)),
        ("title: t\nbase: tiny\naxes: {a: {x: {a..b: 2}}}\n", ("has an override 'a..b', expected a path",)),
        ("title: t\nbase: tiny\ncommon: {1: 2}\naxes: {a: {x: {}}}\n", ("has no option '1'",)),
        ("title: t\nbase: tiny\naxes: {a: {x: {}, x: {}}}\n", ("found duplicate key x",)),
        ("title: t\nbase: tiny\naxes: {a: {1: {}, '1': {}}}\n", ("duplicate key 1",)),
        ("title: t\nbase: tiny\naxes: {a: {p · q: , p: }, b: {r: , q · r: }}\n", ("the label 'p · q · r'",)),
    ],
)  # fmt: skip
def test_wrong_ablations(here: Path, text: str, words: tuple[str, ...]):
    write(here, "ablations/odd.yaml", text)
    message = message_of("odd")
    assert not [w for w in words if w not in message], message


ROWS = """
title: t
base: tiny
axes:
  steps: {2: {sampling.steps: 2}, 5: {sampling.steps: 5}}
  guide: {none: {sampling.guidance: 1}, some: {}}
seeds: [0, 1]
columns: [fid, geneval, latency_s]
x: steps
published: sana_table8
expect: [{metric: fid, order: ["5 · some", "2 · none"]}]
stand_in: {fid: geneval}
baseline: 2 · none
scales: {toy: {columns: [geneval]}, 2: {seeds: [3]}}
"""


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("baseline: 2 · none", "baseline: 2 · non", "has the baseline '2 · non', which is no row; did you"),
        ("sana_table8", "sana_tabel8", "there is no eval/published 'sana_tabel8'; did you mean 'sana_table8'?"),
        ("[fid, ", "[fidd, ", "names 'fidd', which is no metric; did you mean 'fid'?"),
        ("{toy: {columns: [", "{toy: {columns: [genval, ", "'odd, scale toy' names 'genval', which is no metric"),
        ("x: steps", "x: step", "plots over 'step', which is no axis; did you mean 'steps'?"),
        ("x: steps", "x: guide", "plots over the axis 'guide', whose label 'none' is no number"),
        ("metric: fid", "metric: fud", "names 'fud', which is no metric; did you mean 'fid'?"),
        ("{fid: geneval}", "{fid: params_m}", "expects an order in 'params_m', of which neither more"),
        ("{fid: geneval}", "{fid: genval}", "names 'genval', which is no metric; did you mean 'geneval'?"),
        ("{fid: geneval}", "{clip: geneval}", "a stand-in for 'clip', in which nothing is expected"),
        ('["5 · some", "2 · none"]', '["5 · some"]', "expected two different rows or more"),
        ("[0, 1]", "[]", "has no seeds, expected at least one, such as seeds: [0]"),
        ("[0, 1]", "[1, 0, 1]", "one of them twice, which is no replicate; expected seeds: [1, 0]"),
        ("[0, 1]", "[-1]", "is -1 (int), expected int in [0, 4294967295]; the nearest is 0"),
        ("[0, 1]", "[1180591620717411303424]", "the nearest is 4294967295"),
        ("[0, 1]", "[true]", "odd.seeds[0] is True (bool), expected int"),
        ("seeds: [3]", "seeds: []", "'odd, scale 2' has no seeds"),
        ("{toy: {", "{toy: {colums: [], ", "has no option 'colums'; did you mean 'columns'?"),
        ("{toy: {columns: [geneval]}", "{toy: 3", "odd.scales.toy is 3 (int), expected dict"),
        ("some: {}", "some: {seed: 7}", "sets seed 7, but every row is trained with each of the ablation's seeds"),
        ("base: tiny", "base: tiny\ncommon: {seed: 7}", "common: of ablation 'odd' sets seed 7"),
    ],
)  # fmt: skip
def test_a_name_or_seed_that_is_wrong_is_told_while_the_plan_loads(here: Path, old: str, new: str, words: str):
    write(here, "ablations/odd.yaml", ROWS.replace(old, new, 1))
    assert words in message_of("odd")


def test_the_seed_is_no_override_and_its_message_says_what_to_write(here: Path):
    """`seed=5` over three seeds was one trial counted as three replicates."""
    write(here, "ablations/rows.yaml", ROWS)
    message = message_of("rows", ["sampling.shift=2", "seed=5"])
    assert "seed=5 of ablation 'rows' sets seed 5" in message
    assert "expected --seeds 5, or seeds: [5] in its file" in message


def test_a_scale_may_be_a_number(here: Path):
    write(here, "ablations/rows.yaml", ROWS)
    assert {t.seed for t in plan.load("rows", scale="2").trials} == {3}
    assert "has no scale '3'; there is: 2, toy" in message_of("rows", scale="3")


def test_a_guest_may_measure_anything(here: Path):
    """Its columns are not known before it has run."""
    write(here, "ablations/rows.yaml", ROWS.replace("[fid, ", "[beauty, fid, "))
    assert "'beauty', which is no metric" in message_of("rows")
    write(
        here,
        "ablations/rows.yaml",
        ROWS.replace("[fid, ", "[beauty, fid, ") + "common: {eval.measures: [guest:Beauty]}\n",
    )
    write(here, "guest.py", GUEST)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(here)
        assert len(plan.load("rows").trials) == 8


GUEST = """
from sana_lab.evaluation import Measure


class Beauty(Measure):
    def add(self, images, rows): ...

    def report(self): ...
"""


def test_too_many_trials_are_refused_at_once(here: Path):
    labels = ", ".join(f"l{i}: " for i in range(400))
    write(here, "ablations/many.yaml", f"title: t\nbase: tiny\naxes: {{a: {{{labels}}}, b: {{{labels}}}}}\n")
    assert message_of("many") == (
        "ablation 'many' has 160000 trials (the product of its axes and seeds), expected at most 1000; split it into "
        "several files"
    )


@pytest.mark.parametrize(
    ("recipe", "name"),
    [("./rows.yaml", "rows"), ("sub/rows.yaml", "sub-rows"), ("../there/sub/.rows.yaml", "sub-rows"), ("a/b", "a-b")],
)
def test_a_sweep_of_a_file_has_no_hidden_folder(here: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, name: str):
    for file in ("there/rows.yaml", "there/sub/rows.yaml", "there/sub/.rows.yaml"):
        write(here, file, ROWS)
    monkeypatch.chdir(here / "there")
    assert plan.sweep_name(recipe, None) == name


SCALED = """
title: Two scales
base: tiny
axes:
  attention:
    softmax: {system.dit.attention: softmax, system.dit.depth: 3}
    linear: {}
published: sana_table8
expect: [{metric: fid, order: [softmax, linear]}]
scales:
  toy:
    seeds: [0, 1]
    stand_in: {fid: geneval}
    axes: {attention: {softmax: {system.dit.attention: softmax, system.dit.depth: 1}, linear: {}}}
"""


def test_a_scale_replaces_keys_of_the_ablation(here: Path):
    write(here, "ablations/paper/scaled.yaml", SCALED)
    _, full, trials = plan.load("paper/scaled")[:3]
    _, toy, fewer = plan.load("paper/scaled", scale="toy")[:3]
    assert (full.seeds, toy.seeds) == ([0], [0, 1])
    assert (full.stand_in, toy.stand_in) == ({}, {"fid": "geneval"})
    assert full.expect == toy.expect == [schema.Expectation("fid", ["softmax", "linear"])]
    assert [t.config["system"]["dit"]["depth"] for t in (trials[0], fewer[0])] == [3, 1]
    assert {t.config["system"]["dit"]["attention"]["name"] for t in (trials[0], fewer[0])} == {"softmax"}
    assert "has no scale 'toi'; did you mean 'toy'?" in message_of("paper/scaled", [], "toi")
    assert "did you mean 'paper/scaled'?" in message_of("paper/scald")
    write(here, "ablations/odd.yaml", SCALED.replace("[softmax, linear]", "[softmax, linaer]"))
    assert "expects something of 'linaer', which is no row; did you mean 'linear'?" in message_of("odd")


def test_absent_ablations(here: Path):
    assert "did you mean 'quickstart'?" in message_of("quickstrt")


# --- efficiency tables

TWO = """
title: Two backends
probe: {name: image, experiment: tiny, size: 32}
axes:
  attention:
    softmax: {system.dit.attention: softmax}
    linear: {system.dit.attention: linear}
columns: [tmacs_image, speedup]
over: softmax
"""


def test_a_probe_makes_an_efficiency_table(here: Path):
    write(here, "ablations/two.yaml", TWO)
    _, table, trials = plan.load("two", ["size=64"])[:3]
    assert isinstance(table, schema.EfficiencyTable)
    assert [(t.label, t.kind, t.config["probe"]["size"], t.config["repeats"]) for t in trials] == [
        ("softmax", "efficiency", 64, 5),
        ("linear", "efficiency", 64, 5),
    ]
    assert plan.compares_efficiency("two")
    assert not plan.compares_efficiency("quickstart")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("name: image", "name: imag", "'imag'; did you mean 'image'?"),
        ("experiment: tiny", "experiment: tyny", "'tyny'; did you mean 'tiny'?"),
        ("attention: softmax}", "attention: sofmax}", "'sofmax'; did you mean 'softmax'?"),
        ("size: 32", "sizes: 32", "'sizes'; did you mean 'size'?"),
        ("over: softmax", "over: sofmax", "compares with 'sofmax', which is no row; did you mean 'softmax'?"),
        ("columns:", "colums:", "'colums'; did you mean 'columns'?"),
        ("tmacs_image", "tmacs_imag", "names 'tmacs_imag', which is no metric; did you mean 'tmacs_image'?"),
        ("columns:", "repeats: 0\ncolumns:", "odd.repeats is 0 (int), expected int in [1, "),
        ("columns:", "plot: crossing\ncolumns:", "its row 'softmax' has no number"),
        ("axes:\n  attention:", "axes: {}\nscales:\n  attention:", "no axes with labels"),
    ],
)
def test_wrong_efficiency_tables(here: Path, old: str, new: str, words: str):
    write(here, "ablations/odd.yaml", TWO.replace(old, new))
    assert words in message_of("odd")


def test_a_sweep_with_overrides_is_another_one():
    plain = plan.sweep_name("paper/grid", None)
    changed = {plan.sweep_name("paper/grid", None, [f"seed={i}"]) for i in (0, 1)}
    assert plain == "paper-grid"
    assert len(changed | {plain, plan.sweep_name("paper/grid", "toy", ["seed=0"])}) == 4
    assert all(name.startswith("paper-grid-") for name in changed)


@pytest.mark.parametrize(("text", "seeds"), [("0-4", [0, 1, 2, 3, 4]), ("0,2,7-9", [0, 2, 7, 8, 9]), ("3", [3])])
def test_seeds_of_the_command_line(text: str, seeds: list[int]):
    assert plan.parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "4-0", "1-", "-1", "0-9999999"])
def test_seeds_that_are_none(text: str):
    with pytest.raises(SpecError, match="--seeds"):
        plan.parse_seeds(text)


def test_seeds_of_the_command_line_are_in_place_of_those_of_the_file(here: Path):
    assert {trial.seed for trial in plan.load("quickstart", seeds=[5, 6]).trials} == {5, 6}
    with pytest.raises(SpecError, match="one of them twice"):
        plan.load("quickstart", seeds=[5, 5])
    with pytest.raises(SpecError, match="has a probe"):
        plan.load("attention_speed", seeds=[1])
