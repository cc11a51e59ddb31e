"""Ablations as files: the product of their axes, scales, overrides, and what is said of mistakes."""

from pathlib import Path
from typing import Any

import pytest

from sana_lab.ablation import plan
from sana_lab.config import hashing, schema
from sana_lab.config.specs import SpecError

TINY = """
system:
  name: text2image
  dit: {name: sana, dim: 32, depth: 1, cross_heads: 2, attention: {name: linear, eps: 1.0e-6}}
  autoencoder: {name: vae, widths: [8, 8], depth: 1, latent: 4, groups: 2}
  text_encoder: {name: llm, width: 16, layers: 1}
  seed: ${seed}
data: {name: shapes, size: 16, batch: 4}
trainer: {max_steps: 2}
seed: 3
"""


@pytest.fixture(autouse=True)
def recipes(here: Path) -> None:
    """An experiment, `tiny`, in an empty working directory."""
    write(here, "experiments/tiny.yaml", TINY)


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


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
    _, ablation, trials = plan.load("two")
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
    ],
)  # fmt: skip
def test_wrong_ablations(here: Path, text: str, words: tuple[str, ...]):
    write(here, "ablations/odd.yaml", text)
    message = message_of("odd")
    assert not [w for w in words if w not in message], message


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
    _, full, trials = plan.load("paper/scaled")
    _, toy, fewer = plan.load("paper/scaled", scale="toy")
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
    _, table, trials = plan.load("two", ["size=64"])
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
