"""Experiments and ablations: merging, overriding, completing, and the messages of errors."""

from pathlib import Path
from typing import Any

import pytest
import tiny
from omegaconf import OmegaConf
from tiny import write

from sana_lab.ablation import plan
from sana_lab.config import experiments
from sana_lab.config.experiments import apply, complete, compose, load, merge, nest
from sana_lab.config.specs import SpecError


@pytest.fixture
def folder(here: Path) -> Path:
    """A working directory with one experiment, `tiny`."""
    tiny.write_experiment(here, text=tiny.SEEDED)
    return here


def error_of(call: Any, *arguments: Any) -> str:
    with pytest.raises(SpecError) as caught:
        call(*arguments)
    return str(caught.value)


# --- merging


@pytest.mark.parametrize(
    ("base", "over", "expected"),
    [
        ({"a": 1, "b": 2}, {"b": 3}, {"a": 1, "b": 3}),
        ({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}}, {"a": {"b": 1, "c": 3}}),
        ({"a": [1, 2]}, {"a": [3]}, {"a": [3]}),
        # a spec whose name changes starts afresh; one that keeps its name keeps its options
        ({"p": {"name": "x", "o": 1}}, {"p": {"name": "y", "q": 2}}, {"p": {"name": "y", "q": 2}}),
        ({"p": {"name": "x", "o": 1}}, {"p": {"name": "x", "q": 2}}, {"p": {"name": "x", "o": 1, "q": 2}}),
        ({"p": {"name": "x", "o": 1}}, {"p": {"q": 2}}, {"p": {"name": "x", "o": 1, "q": 2}}),
        ({"p": {"name": "x", "o": 1}}, {"p": "y"}, {"p": "y"}),
        ({"p": {"name": "x", "o": 1}}, {"p": "x"}, {"p": {"name": "x", "o": 1}}),
        ({"p": "x"}, {"p": {"q": 2}}, {"p": {"name": "x", "q": 2}}),
        ({"p": "x"}, {"p": {"name": "y"}}, {"p": {"name": "y"}}),
        ({"p": {"name": "x", "o": 1}}, {"p": None}, {"p": None}),
        ({"p": None}, {"p": {"name": "x"}}, {"p": {"name": "x"}}),
    ],
)
def test_merge(base: Any, over: Any, expected: Any):
    before = repr((base, over))
    assert merge(base, over) == expected
    assert repr((base, over)) == before


def test_nest_unfolds_dotted_keys():
    assert nest({"a.b": 1, "a.c.d": 2, "e": {"f": 3}}) == {"a": {"b": 1, "c": {"d": 2}}, "e": {"f": 3}}


def test_nest_applies_a_name_before_its_options():
    assert nest({"p": "x", "p.o": 1}) == {"p": {"name": "x", "o": 1}}


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ("a.b=1", {"a": {"b": 1}}),
        ("a=1e-3", {"a": 1e-3}),
        ("a=true", {"a": True}),
        ("a=null", {"a": None}),
        ("a=[1, 2]", {"a": [1, 2]}),
        ("a={name: x, o: 1}", {"a": {"name": "x", "o": 1}}),
        ("a=x=y", {"a": "x=y"}),
        ("a='1'", {"a": "1"}),
        ("a=", {"a": None}),
    ],
)
def test_apply_reads_values_as_yaml(item: str, expected: dict[str, Any]):
    assert apply({}, [item]) == expected


def test_overrides_apply_in_order():
    assert apply({"a": 1}, ["a=2", "a=3"]) == {"a": 3}


@pytest.mark.parametrize("item", ["trainer.max_steps", "=3", "max steps"])
def test_overrides_without_a_value(item: str):
    assert item in (text := error_of(apply, {}, [item]))
    assert "key=value" in text


def test_overrides_that_are_no_yaml(folder: Path):
    assert "prompts is '[1' (str), expected list[str]" in error_of(load, "tiny", ["prompts=[1"])
    assert "is no UTF-8 text" in error_of(apply, {}, ["a=\udcff"])


# --- text


TYPED = (
    *(
        "good #1",
        "#1",
        "a cat #cute",
        "0012",
        "10_1",
        "12:30",
        "no",
        "Yes",
        "1e3",
        "2024-01-01",
        "0x10",
        "3",
        "-7",
        ".5",
    ),
    *("true", "[a, b]", "{a: b}", "{a: 1, a: 2}", "a: b", "- a", "[1", "'tis", '"a" and "b"', "*a", "!x", "%x", "a=b"),
    *("a\nb", " a ", "| a", "--- a", "?", "1_0.5", ".inf"),
)
"""What people type for text, which YAML 1.1 cuts, reads as something else or refuses."""


@pytest.mark.parametrize("text", TYPED)
def test_text_options_take_what_is_typed(folder: Path, text: str):
    """At every depth, in an optional one, and where the override before it was another."""
    changes = [f"system.text_encoder.instruction={text}", "data=folder", "data.root=first", f"data.root={text}"]
    experiment = load("tiny", changes)
    assert experiment["system"]["text_encoder"]["instruction"] == text
    assert experiment["data"]["root"] == text


@pytest.mark.parametrize(("text", "value"), [("null", None), ("", None), ("'0012'", "0012"), ('"null"', "null")])
def test_null_and_quotes(folder: Path, text: str, value: str | None):
    assert load("tiny", [f"system.text_encoder.instruction={text}"])["system"]["text_encoder"]["instruction"] == value


def test_an_option_of_text_or_numbers_takes_both(folder: Path):
    assert load("tiny", ["trainer.devices=2"])["trainer"]["devices"] == 2
    assert load("tiny", ["trainer.devices=0,1"])["trainer"]["devices"] == "0,1"


def test_items_of_a_list_of_text_are_text(folder: Path):
    assert load("tiny", ["prompts=[0012, no, 1e3, a cat]"])["prompts"] == ["0012", "no", "1e3", "a cat"]


@pytest.mark.parametrize("text", ["2 # two", "0012", "12:30", "[2"])
def test_numbers_are_refused_where_yaml_reads_another(folder: Path, text: str):
    assert f"trainer.max_steps is {text!r} (str), expected int" in error_of(load, "tiny", [f"trainer.max_steps={text}"])


def test_text_in_files_is_text(folder: Path):
    """In an experiment, and in the labels and overrides of an ablation."""
    write(folder, "experiments/own.yaml",
          "base: tiny\ndata: {name: folder, root: 0012, caption: no}\n"
          "system: {text_encoder: {instruction: '${data.root}'}}\n"
          "prompts: [12:30, 1e3, on]\n")  # fmt: skip
    experiment = load("own")
    assert (experiment["data"]["root"], experiment["data"]["caption"]) == ("0012", "no")
    assert experiment["system"]["text_encoder"]["instruction"] == "0012"
    assert experiment["prompts"] == ["12:30", "1e3", "on"]
    write(folder, "ablations/own.yaml",
          "title: t\nbase: own\naxes: {a: {0012: {data.root: 10_1}, no: {data.root: off}}}\n")  # fmt: skip
    assert [(t.label, t.config["data"]["root"]) for t in plan.load("own").trials] == [("0012", "10_1"), ("no", "off")]


def test_a_resolved_experiment_reads_back(folder: Path):
    texts = ["0012", "no", "12:30", "1e3", "10_1", "2024-01-01", "good #1", "null", "~", "0x1"]
    experiment = {**load("tiny"), "prompts": texts}
    path = write(folder, "experiments/again.yaml", OmegaConf.to_yaml(OmegaConf.create(experiment)))
    assert load(str(path)) == experiment


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a: &a [*a]\n", "holds itself"),
        ("a: 1\na: 2\n", "duplicate key"),
        ("a: !!binary aGk=\n", "no plain value"),
        ("a: " + "[" * 5000, "cannot be read as YAML"),
        ("? [1]\n: 2\n", "expected text"),
        ("a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
         + "".join(f"{y}: &{y} [{', '.join([f'*{x}'] * 10)}]\n" for x, y in zip("abcdef", "bcdefg", strict=True)),
         "more than"),
        ("base: [tiny]\n", "expected the name of an experiment"),
        ("base: 12\n", "there is no experiment '12'"),
    ],
)  # fmt: skip
def test_yaml_that_is_no_experiment(folder: Path, content: str, words: str):
    path = write(folder, "odd.yaml", content)
    assert words in error_of(load, str(path))


# --- experiments


def test_an_experiment_is_complete(folder: Path):
    experiment = load("tiny")
    assert experiment["system"]["dit"]["attention"] == {
        "name": "linear", "head_dim": 32, "qk_norm": False, "eps": 1e-6, "backend": "auto",
    }  # fmt: skip
    assert experiment["sampling"]["solver"] == {"name": "dpmpp", "order": 2}
    assert experiment["trainer"]["precision"] == "32-true"
    assert experiment["prompts"] == []
    assert complete(experiment) == experiment


def test_interpolations_are_replaced(folder: Path):
    assert load("tiny")["system"]["seed"] == 3
    assert load("tiny", ["seed=9"])["system"]["seed"] == 9
    assert "nowhere" in error_of(load, "tiny", ["system.seed=${nowhere}"])


def test_overrides_reach_every_depth_and_change_of_name_starts_afresh(folder: Path):
    assert load("tiny", ["system.dit.attention.eps=1"])["system"]["dit"]["attention"]["eps"] == 1.0
    assert load("tiny", ["system.dit.attention=softmax"])["system"]["dit"]["attention"] == {
        "name": "softmax",
        "head_dim": 32,
        "qk_norm": False,
    }
    assert load("tiny", ["system.dit.attention=linear"])["system"]["dit"]["attention"]["eps"] == 1e-6


def test_a_base_is_merged_below(folder: Path):
    write(folder, "experiments/child.yaml", "base: tiny\nseed: 5\nsystem: {dit: {depth: 2}}\n")
    write(folder, "experiments/grandchild.yaml", "base: child\nsystem: {dit: {ffn: mlp}}\n")
    experiment = load("grandchild")
    dit = experiment["system"]["dit"]
    assert (experiment["seed"], dit["depth"], dit["dim"], dit["ffn"]["name"]) == (5, 2, 32, "mlp")


def test_a_ring_of_bases_is_named(folder: Path):
    write(folder, "experiments/a.yaml", "base: b\n")
    write(folder, "experiments/b.yaml", "base: a\n")
    assert "a -> b -> a" in error_of(compose, "a")


def test_a_path_is_taken_as_it_is(folder: Path):
    path = write(folder, "elsewhere/own.yaml", tiny.SEEDED)
    assert load(str(path)) == load("tiny")
    assert experiments.locate("experiments", str(path)) == path


def test_the_working_directory_comes_before_what_ships(folder: Path):
    write(folder, "experiments/shapes.yaml", "base: tiny\nseed: 77\n")
    assert load("shapes")["seed"] == 77


def test_recipes_are_found_from_anywhere(here: Path):
    assert experiments.locate("experiments", "shapes").is_file()
    assert experiments.locate("ablations", "quickstart").is_file()
    assert {"shapes", "shapes_vae_f8"} <= set(experiments.available("experiments"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["systm.dit=sana"], ("tiny has no option 'systm'", "did you mean 'system'?")),
        (["trainer.max_step=3"], ("tiny.trainer has no option 'max_step'", "did you mean 'max_steps'?")),
        (["trainer.max_steps=many"], ("tiny.trainer.max_steps is 'many' (str)", "expected int")),
        (["trainer.precision=bf16"], ("tiny.trainer.precision is 'bf16'", "did you mean 'bf16-true'?")),
        (["trainer=fast"], ("tiny.trainer is 'fast'", "expected a mapping of max_steps")),
        (["system.dit.atention=softmax"], ("dit 'sana' has no option 'atention'", "did you mean 'attention'?")),
        (["system.dit.attention=softmx"], ("no attention is called 'softmx'", "did you mean 'softmax'?")),
        (["system=text2imag"], ("no system is called 'text2imag'", "did you mean 'text2image'?")),
        (["sampling.solver=eular"], ("no solver is called 'eular'", "did you mean 'euler'?")),
        (["data.siz=8"], ("data 'shapes' has no option 'siz'", "did you mean 'size'?")),
        (["data=null"], ("tiny.data is None",)),
        (["prompts=a red circle"], ("tiny.prompts is 'a red circle' (str)", "expected list[str]")),
        (["eval.batch=1.5"], ("tiny.eval.batch is 1.5 (float)", "expected int")),
        (["eval=shapse"], ("there is no eval 'shapse'", "did you mean 'shapes'?")),
        (["seed=x"], ("tiny.system.seed is 'x'", "expected int")),
    ],
)
def test_typos(folder: Path, overrides: list[str], words: tuple[str, ...]):
    text = error_of(load, "tiny", overrides)
    assert not [w for w in words if w not in text], text


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
def test_a_recipe_in_another_encoding(folder: Path, encoding: str):
    (folder / "experiments/wide.yaml").write_bytes("base: tiny\r\nprompts: [a röd circle]\r\n".encode(encoding))
    assert load("wide")["prompts"] == ["a röd circle"]


def test_files_that_are_not_there_or_no_yaml(folder: Path):
    assert "there is no experiment 'tini'; did you mean 'tiny'?" in error_of(load, "tini")
    assert "there is no experiment 'no/such.yaml'" in error_of(load, "no/such.yaml")
    write(folder, "experiments/broken.yaml", "system: [1, 2\n")
    assert "broken.yaml cannot be read as YAML" in error_of(load, "broken")
    write(folder, "experiments/list.yaml", "- 1\n- 2\n")
    assert "list.yaml holds list, expected a mapping" in error_of(load, "list")
    write(folder, "experiments/empty.yaml", "")
    assert "empty" in error_of(load, "empty")
    write(folder, "experiments/binary.yaml", "")
    (folder / "experiments/binary.yaml").write_bytes(b"a: \x81")
    assert "binary.yaml cannot be read as YAML" in error_of(load, "binary")
    write(folder, "experiments/twice.yaml", "seed: 1\nseed: 2\n")
    assert "twice.yaml" in error_of(load, "twice")


def test_what_is_missing_is_asked_for(folder: Path):
    write(folder, "experiments/half.yaml", "system: text2image\n")
    assert "half needs 'data' (a spec of kind 'data')" in error_of(load, "half")


# --- other experiments inside


def test_a_part_is_taken_from_an_experiment_with_its_weights(folder: Path):
    changes = {"system.autoencoder": "experiment:tiny"}
    tiny.write_experiment(folder, "user", tiny.SEEDED, changes)
    encoder = load("user")["system"]["autoencoder"]
    assert (encoder["name"], encoder["widths"], encoder["weights"]) == ("vae", [8, 8], "experiment:tiny")
    assert experiments.referenced(load("user")["system"]) == ["tiny"]
    assert experiments.referenced(load("tiny")) == []


def test_a_part_that_the_experiment_does_not_hold(folder: Path):
    write(folder, "experiments/judge.yaml", "system: {name: autoencoder, autoencoder: vae}\ndata: shapes\n")
    assert "which holds no text_encoder" in error_of(load, "tiny", ["system.text_encoder=experiment:judge"])
    assert "there is no experiment 'tiney'" in error_of(load, "tiny", ["system.autoencoder=experiment:tiney"])


def test_a_ring_of_experiments_is_told(folder: Path):
    write(folder, "experiments/ring.yaml", "base: tiny\nsystem: {autoencoder: 'experiment:ring'}\n")
    assert "experiments take weights from each other: ring -> ring" in error_of(load, "ring")


# --- suites


def test_a_suite_is_named_wherever_evaluation_is_set(folder: Path):
    """In an experiment, on the command line, and in an ablation's common part and labels."""
    write(folder, "eval/own.yaml", "prompts_per_task: 7\nbatch: 3\n")
    write(folder, "experiments/judged.yaml", tiny.SEEDED + "eval: own\n")
    assert load("judged")["eval"]["prompts_per_task"] == 7
    assert load("judged", ["eval.batch=5"])["eval"]["prompts_per_task"] == 7
    assert load("tiny", ["eval=own", "eval.batch=5"])["eval"]["batch"] == 5
    write(folder, "ablations/suites.yaml",
          "title: t\nbase: tiny\ncommon: {eval: own}\n"
          "axes: {a: {x: {eval.batch: 4}, y: {eval: shapes}}}\n")  # fmt: skip
    x, y = (trial.config["eval"] for trial in plan.load("suites").trials)
    assert (x["prompts_per_task"], x["batch"]) == (7, 4)
    assert y["prompts_per_task"] == experiments.read(experiments.locate("eval", "shapes"))["prompts_per_task"]


# --- what others ask


def test_image_size_looks_through_a_cache():
    assert experiments.image_size({"name": "shapes", "size": 64}) == 64
    assert experiments.image_size({"name": "latents", "source": {"name": "shapes", "size": 32}}) == 32


def test_sampling_is_checked_alone():
    assert experiments.check_sampling({"steps": 3})["solver"] == {"name": "dpmpp", "order": 2}
    assert "did you mean 'steps'?" in error_of(experiments.check_sampling, {"stps": 3})
