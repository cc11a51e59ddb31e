"""Trainings that begin from another model: whole, in part, grown, or on from its last checkpoint."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor

from sana_lab import __main__, api
from sana_lab.checkpoints import partial, weights
from sana_lab.config import experiments, hashing
from sana_lab.config.specs import SpecError
from sana_lab.tracking.store import Store
from sana_lab.training import checks, parent, train

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader")  # mlflow 3.17 with sqlalchemy 2.1


@pytest.fixture
def folder(here: Path) -> Path:
    every = {"trainer.max_steps": 6, "trainer.checkpoint_every": 4, "trainer.validate_every": 4, "prompts": []}
    tiny.write_experiment(here, changes={"data.size": 16, **every})
    return here


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def grown(*overrides: str, steps: int = 0) -> tuple[dict[str, Tensor], dict]:
    """Weights and card of `tiny` from the trained `tiny`, partly, with other options."""
    path = train.train(
        experiments.load(
            "tiny",
            ["parent.weights=experiment:tiny", "parent.fit=partial", f"trainer.max_steps={steps}", *overrides],
        )
    )
    return weights.read(path), weights.card(path)["parent"]


class TestMore:
    def test_it_equals_a_longer_training_to_the_last_bit_and_names_its_parent(self, folder, runs, capsys):
        assert __main__.main(["train", "tiny"]) == 0
        first = weights.find_trained(experiments.load("tiny"), "tiny")
        assert __main__.main(["train", "tiny", "--more", "5"]) == 0
        said = capsys.readouterr().out
        assert f"parent: goes on from step 6 of {first}" in said
        tuned = Path(said.splitlines()[-1].removeprefix("trained: "))
        card, ancestor = weights.card(tuned), weights.card(first)
        assert (card["steps"], card["parent"]["steps"], card["parent"]["hash"]) == (11, 6, ancestor["hash"])
        assert card["hash"] != ancestor["hash"]
        store = Store("runs")
        tags = {run.tags["sana.model"]: run.tags.get("sana.parent") for run in store.find("training")}
        assert tags == {ancestor["hash"]: None, card["hash"]: ancestor["hash"]}
        whole = train.train(experiments.load("tiny", ["trainer.max_steps=11"]))
        assert same(weights.read(tuned), weights.read(whole))
        assert __main__.main(["train", "tiny", "--more", "5"]) == 0
        assert "is trained already" in capsys.readouterr().out

    def test_of_a_model_that_is_not_trained(self, folder, capsys):
        assert __main__.main(["train", "tiny", "--more", "5"]) == 1
        assert "experiment 'tiny' is not trained yet" in capsys.readouterr().err

    def test_no_steps_are_refused(self, folder, capsys):
        assert __main__.main(["train", "tiny", "--more", "0"]) == 1
        assert "--more is 0; expected a number of steps from 1" in capsys.readouterr().err

    def test_without_a_checkpoint_resuming_is_refused_before_training(self, folder):
        path = train.train(experiments.load("tiny"))
        for checkpoint in path.parent.glob("*.ckpt"):
            checkpoint.unlink()
        with pytest.raises(SpecError, match=r"there is none; expected parent\.resume=false"):
            checks.check(experiments.load("tiny", [f"parent.weights={path}", "parent.resume=true"]))

    @pytest.mark.parametrize(
        ("override", "words"),
        [
            ("system.optimizer.lr=0.5", r"system\.optimizer differs: .*0\.5.*expected parent\.resume=false"),
            ("system.groups={'*bias': {weight_decay: 0}}", r"system\.groups differs: .*bias.*, the parent's is \{\}"),
        ],
    )
    def test_other_options_of_the_optimizer_are_refused(self, folder, override, words):
        path = train.train(experiments.load("tiny"))
        resumed = [f"parent.weights={path}", "parent.resume=true", "trainer.max_steps=8"]
        checks.check(experiments.load("tiny", [*resumed, "system.optimizer.fused=null"]))
        with pytest.raises(SpecError, match=words):
            checks.check(experiments.load("tiny", [*resumed, override]))
        checks.check(experiments.load("tiny", [resumed[0], override]))

    def test_the_clock_of_points_is_not_that_of_the_parent(self, folder):
        path = train.train(experiments.load("tiny"))
        (file,) = path.parent.glob("*.ckpt")
        checkpoint = torch.load(file, weights_only=True)
        checkpoint["callbacks"]["Points"] = {"seconds": 1e6}
        torch.save(checkpoint, file)
        (folder / "child").mkdir()
        step = parent._copy_checkpoint(str(path), folder / "child")
        copied = torch.load(folder / "child" / f"step={step}.ckpt", weights_only=True)["callbacks"]
        assert not {"Clock", "DivergenceGuard", "Points"} & copied.keys()


def test_no_parent_keeps_the_hash_and_one_enters_it_by_content(folder):
    path = train.train(experiments.load("tiny"))
    config = experiments.load("tiny")
    before = {key: value for key, value in config.items() if key != "parent"}
    assert hashing.experiment_hash(before) == hashing.experiment_hash(config)
    named = hashing.experiment_hash(experiments.load("tiny", [f"parent.weights={path}"]))
    copy = folder / "copy.safetensors"
    copy.write_bytes(path.read_bytes())
    assert hashing.experiment_hash(experiments.load("tiny", [f"parent.weights={copy}"])) == named
    assert named != hashing.experiment_hash(config)


def test_it_begins_with_the_averaged_weights_and_a_new_average(folder):
    first = weights.read(train.train(experiments.load("tiny")))
    begun, about = grown("parent.fit=exact")
    assert same(begun, first)
    assert (about["experiment"], about["steps"], about["new"], about["left"]) == ("experiment", 6, [], [])
    trained, _ = grown("parent.fit=exact", "system.optimizer={name: sgd, lr: 0}", steps=3)
    assert same(trained, first)  # nothing of the initialisation is in the average


def test_a_training_that_resumes_needs_its_parent_no_more(folder):
    path = train.train(experiments.load("tiny"))
    experiment = experiments.load("tiny", [f"parent.weights={path}", "trainer.max_steps=5"])
    home = train.folder(experiment)
    with pytest.raises(Stop):
        train.train(experiment, progress=stop)
    entries = json.loads((home / parent.FILE).read_text())
    system = checks.check(experiment)
    path.write_bytes(b"gone")
    assert parent.begin(system, experiment, home, lambda decide: decide()) == entries


class Stop(Exception):
    """Ends a training in a test."""


def stop(step: int, *_: object) -> None:
    raise Stop


class TestGrowth:
    def test_new_blocks_change_nothing_at_first(self, folder):
        """Depth growth as in SANA-1.5: the images of the grown model are those of its parent."""
        train.train(experiments.load("tiny"))
        state, about = grown("system.dit.depth=3")
        assert [name.split(".")[2] for name in about["new"]].count("1") == about["new"].__len__() // 2
        assert not state["dit.blocks.2.attention.proj.weight"].any()
        assert state["dit.blocks.2.attention.qkv.weight"].any()
        options = {"size": 16, "steps": 2}
        deep = ["system.dit.depth=3", "parent.weights=experiment:tiny", "parent.fit=partial", "trainer.max_steps=0"]
        ours = api.sample(api.load("tiny", deep), ["a red circle"], **options)
        assert torch.equal(ours, api.sample("tiny", ["a red circle"], **options))

    def test_blocks_may_be_dropped_first(self, folder):
        train.train(experiments.load("tiny", ["system.dit.depth=3"]))
        path = weights.find_trained(experiments.load("tiny", ["system.dit.depth=3"]), "tiny")
        state, about = grown("system.dit.depth=4", f"parent.weights={path}", "parent.blocks=2")
        source = weights.read(path)
        name = "dit.blocks.{}.attention.qkv.weight"
        assert torch.equal(state[name.format(1)], source[name.format(1)])
        assert not torch.equal(state[name.format(2)], source[name.format(2)])
        assert not state["dit.blocks.2.cross.proj.weight"].any()
        assert name.format(2) in about["left"]

    def test_a_wider_gated_feed_forward_computes_the_same_at_first(self, folder):
        """Values and gates of a Mix-FFN grow each by themselves, and new hidden units reach no output."""
        one, wide = (tiny.dit(tiny.DIT, ffn={"name": "mix", "ratio": ratio}).state_dict() for ratio in (2, 3))
        one, wide = ({f"dit.{name}": tensor for name, tensor in state.items()} for state in (one, wide))
        values, outcome = partial.fitted(wide, one)
        assert {name.split(".")[4] for name in outcome.grown} == {"expand", "depthwise", "project"}
        model = tiny.dit(tiny.DIT, ffn={"name": "mix", "ratio": 3})
        model.load_state_dict({name.removeprefix("dit."): tensor for name, tensor in values.items()})
        before = tiny.dit(tiny.DIT, ffn={"name": "mix", "ratio": 2})
        inputs = tiny.latents(dtype=torch.float32), torch.tensor([0.25, 0.5]), tiny.caption([2, 3], dtype=torch.float32)
        torch.testing.assert_close(model(*inputs), before(*inputs), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("patch", [1, 2])
    def test_channels_of_another_latent(self, folder, patch):
        """New channels of the input have no weight, and old channels of the output keep theirs in every cell."""
        here = [f"system.dit.patch={patch}", "system.autoencoder.latent=4"]
        path = train.train(experiments.load("tiny", [*here, "data.size=32"]))
        wide = [f"system.dit.patch={patch}", "system.autoencoder.latent=6", f"parent.weights={path}", "data.size=32"]
        state, about = grown(*wide)
        source = weights.read(path)
        assert about["grown"].keys() == {
            "dit.patch_embed.proj.weight",
            "dit.head.linear.weight",
            "dit.head.linear.bias",
        }
        embed = state["dit.patch_embed.proj.weight"]
        assert torch.equal(embed[:, :4], source["dit.patch_embed.proj.weight"])
        assert not embed[:, 4:].any()
        head, old = (s["dit.head.linear.weight"].unflatten(0, (patch**2, -1)) for s in (state, source))
        assert torch.equal(head[:, :4], old)
        assert head[:, 4:].abs().min() > 0

    def test_what_fits_nowhere_is_said_and_what_fits_nothing_is_refused(self, folder, capsys):
        train.train(experiments.load("tiny"))
        _, about = grown("system.dit.ffn=mlp")
        assert "dit.blocks.0.ffn.depthwise.weight" in about["left"]
        assert "dit.blocks.0.ffn.expand.weight" in about["new"]
        assert "parent: kept " in capsys.readouterr().out
        tiny.write_experiment(folder, "squeeze", tiny.SQUEEZE)
        with pytest.raises(SpecError, match="has no tensor that fits AutoencoderSystem; it holds dit"):
            checks.check(experiments.load("squeeze", ["parent.weights=experiment:tiny", "parent.fit=partial"]))


def test_other_shapes_are_refused_before_training_unless_partial(folder):
    path = train.train(experiments.load("tiny"))
    with pytest.raises(SpecError, match=r"does not fit TextToImage: dit\.blocks\.1\.table is missing"):
        checks.check(experiments.load("tiny", [f"parent.weights={path}", "system.dit.depth=2"]))
    with pytest.raises(SpecError, match=r"parent\.blocks is 1, and parent\.fit 'exact' keeps all"):
        checks.check(experiments.load("tiny", [f"parent.weights={path}", "parent.blocks=1"]))
    with pytest.raises(SpecError, match="there is no weights file"):
        checks.check(experiments.load("tiny", ["parent.weights=nowhere.safetensors"]))


def test_a_dry_run_says_what_would_be_kept(folder, capsys):
    train.train(experiments.load("tiny"))
    words = ["parent.weights=experiment:tiny", "parent.fit=partial", "system.dit.depth=2"]
    assert __main__.main(["train", "tiny", "--dry-run", *words]) == 0
    said = capsys.readouterr().out
    assert "# parent: kept " in said
    assert "# parent: new 1" in said


def test_an_experiment_trains_its_parent_first(folder, runs):
    tiny.write(folder, "experiments/child.yaml", "base: tiny\nparent: {weights: 'experiment:tiny'}\nseed: 1\n")
    assert __main__.main(["train", "child"]) == 0
    assert weights.trained(experiments.load("tiny")) is not None
    tiny.write(
        folder,
        "experiments/tiny.yaml",
        (folder / "experiments/tiny.yaml").read_text() + "parent: {weights: 'experiment:child'}\n",
    )
    with pytest.raises(SpecError, match="take weights from each other"):
        experiments.load("child", ["seed=2"])
