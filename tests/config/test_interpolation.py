"""What a recipe reads from the environment is used, and stored as it was written; nothing of a file is resolved."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from omegaconf import OmegaConf
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from sana_lab import __main__, api
from sana_lab.checkpoints import files, weights
from sana_lab.config import experiments, hashing, interpolation
from sana_lab.config.validation import SpecError
from sana_lab.training import resume, train

VALUE = "a-value-of-the-environment"


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", VALUE)
    monkeypatch.setenv("WIDTH", "32")


def load(here: Path, changes: dict[str, Any], *overrides: str) -> Any:
    tiny.write_experiment(here, changes=changes)
    return experiments.load("tiny", overrides)


PROMPTS = {"prompts": ["${oc.env:PLACE}", "in ${oc.env:PLACE}", "${prompts[0]}"], "system.dit.dim": "${oc.env:WIDTH}"}


def test_it_is_used_and_stored_as_written(here: Path):
    config = load(here, {**PROMPTS, "system.dit.dim": "${oc.decode:${oc.env:WIDTH}}"})
    assert config["prompts"] == [VALUE, f"in {VALUE}", VALUE]
    assert config["system"]["dit"]["dim"] == 32
    stored = interpolation.as_written(config)
    assert stored["prompts"] == PROMPTS["prompts"]
    assert stored["system"]["dit"]["dim"] == "${oc.decode:${oc.env:WIDTH}}"
    assert VALUE not in json.dumps(stored)
    assert stored.keys() == load(here, {}).keys()


def test_what_is_stored_loads_to_the_same(here: Path):
    config = load(here, {"prompts": ["${oc.env:PLACE}", "${prompts[0]}"]}, "seed=7")
    tiny.write(here, "experiments/again.yaml", json.dumps(interpolation.as_written(config)))
    assert experiments.load("again") == config
    assert hashing.experiment_hash(experiments.load("again")) == hashing.experiment_hash(config)


def test_other_interpolations_are_stored_resolved(here: Path):
    config = load(here, {"system.seed": "${seed}", "seed": 3, "prompts": ["${oc.env:PLACE}"]})
    assert interpolation.as_written(config)["system"]["seed"] == 3
    assert VALUE not in json.dumps(interpolation.as_written(config))


@pytest.mark.parametrize("value", ["{a: '${oc.env:PLACE}'}", "['${oc.env:PLACE}']", "${oc.env:PLACE}"])
def test_an_override_is_stored_as_written(here: Path, value: str):
    config = load(here, {}, "prompts=['${oc.env:PLACE}']", "eval.worst_picture=${oc.env:PLACE}")
    assert config["eval"]["worst_picture"] == VALUE
    assert VALUE not in json.dumps(interpolation.as_written(config))


def test_a_renamed_option_is_stored_as_written(here: Path):
    change = {"system.text_encoder": {"name": "t5", "width": 32, "drawn": "${oc.decode:${oc.env:WIDTH}}"}}
    with pytest.raises(SpecError, match="random_init"):  # the option's type is a mapping; here its place counts
        load(here, change)
    texts: interpolation.Texts = [(("system", "text_encoder", "drawn"), "${oc.env:WIDTH}")]
    config = {"system": {"text_encoder": {"name": "t5", "random_init": 32}}}
    stored = interpolation.as_written(interpolation.with_written(config, texts, "it"))
    assert stored == {"system": {"text_encoder": {"name": "t5", "random_init": "${oc.env:WIDTH}"}}}


def test_a_value_without_a_place_is_refused():
    with pytest.raises(SpecError, match=r"it: a\.b comes from the environment and could not be stored as written"):
        interpolation.with_written({"a": {"c": VALUE}}, [(("a", "b"), "${oc.env:PLACE}")], "it")


def test_a_part_of_another_experiment_keeps_its_texts(here: Path):
    tiny.write(here, "experiments/squeeze.yaml", tiny.SQUEEZE.replace("depth: 1", "depth: '${oc.decode:${oc.env:N}}'"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("N", "1")
        config = load(here, {"system.autoencoder": "experiment:squeeze"})
        other = load(here, {"system.autoencoder": {"name": "experiment:squeeze", "depth": 1}})
    assert config["system"]["autoencoder"]["depth"] == 1
    assert interpolation.as_written(config)["system"]["autoencoder"]["depth"] == "${oc.decode:${oc.env:N}}"
    assert interpolation.as_written(other)["system"]["autoencoder"]["depth"] == 1


@pytest.mark.filterwarnings("ignore:The ``noload`` loader")  # mlflow 3.17 with sqlalchemy 2.1
def test_training_stores_the_text_alone(here: Path, runs: Path, capfd: pytest.CaptureFixture[str]):
    tiny.write_experiment(here, changes={"prompts": ["${oc.env:PLACE}"]})
    assert __main__.main(["train", "tiny"]) == 0
    config = experiments.load("tiny")
    path = weights.trained(config)
    assert path is not None
    with safe_open(path, "np") as file:
        assert json.loads(file.metadata()["card"])["config"]["prompts"] == ["${oc.env:PLACE}"]
    texts = [p for p in runs.rglob("*") if p.is_file() and VALUE.encode() in p.read_bytes()]
    assert texts == []  # neither a checkpoint nor the database
    assert "${oc.env:PLACE}" in (train.folder(config) / "experiment.yaml").read_text()
    assert __main__.main(["train", "tiny", "--dry-run"]) == 0
    assert VALUE not in capfd.readouterr().out


def weights_file(here: Path, changes: dict[str, Any]) -> Path:
    """A weights file whose card holds the tiny experiment with changes."""
    tiny.write_experiment(here)
    config = experiments.load("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        state = weights.read(train.train(config))
    stored = experiments.merge(config, experiments.nest(changes))
    path = here / "elsewhere.safetensors"
    save_file(state, path, {"card": json.dumps({"experiment": "tiny", "config": stored})})
    return path


def test_nothing_of_a_card_is_resolved(here: Path):
    path = weights_file(here, {"prompts": ["${oc.env:PLACE}", "${seed}"], "eval.worst_picture": "${oc.env:PLACE}"})
    experiment = api.load(str(path)).experiment
    assert experiment["prompts"] == ["${oc.env:PLACE}", "${seed}"]
    assert experiment["eval"]["worst_picture"] == "${oc.env:PLACE}"
    assert VALUE not in json.dumps(experiment)


@pytest.mark.parametrize("key", ["system.text_encoder.weights", "system.dit.dim", "system.dit", "system.dit.name"])
def test_a_card_s_system_names_no_variable(here: Path, key: str):
    path = weights_file(here, {key: "${oc.env:PLACE}"})
    with pytest.raises(SpecError, match=rf"{key} '.*oc.env:PLACE.*', an environment variable") as caught:
        api.load(str(path))
    assert VALUE not in str(caught.value)


@pytest.fixture
def trained(here: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A trained experiment with options of system and sampling from the environment."""
    monkeypatch.chdir(here)
    monkeypatch.setenv("STEPS", "3")
    width, steps = "${oc.decode:${oc.env:WIDTH}}", "${oc.decode:${oc.env:STEPS}}"
    config = load(here, {"system.dit.dim": width, "sampling.steps": steps})
    train.train(config)
    return config


def test_a_checkpoint_holds_the_options_as_written_and_is_resumed(trained: Any):
    """Alone it is no model, as a card's system that names a variable."""
    path = Path(str(resume.latest(train.folder(trained))))
    assert files.read_torch(path)["hyper_parameters"]["dit"]["dim"] == "${oc.decode:${oc.env:WIDTH}}"
    with pytest.raises(SpecError, match=r"system.dit.dim '.*oc.env:WIDTH.*', an environment variable"):
        api.load(str(path))
    weights_path = weights.trained(trained)
    assert weights_path is not None
    before = weights.read(weights_path)
    weights_path.unlink()
    after = weights.read(train.train(trained))
    assert all(after[name].equal(tensor) for name, tensor in before.items())


def test_a_sampled_picture_holds_the_options_as_written(trained: Any):
    assert __main__.main(["sample", "a red circle", "--model", "tiny", "--out", "pictures"]) == 0
    (path,) = Path("pictures").glob("*.png")
    with Image.open(path) as image:
        stored = json.loads(image.text["sana_lab"])["sampling"]  # type: ignore[attr-defined]
    assert stored["steps"] == "${oc.decode:${oc.env:STEPS}}"
    assert stored["solver"] == {"name": "euler"}


@pytest.mark.parametrize(
    "config",
    [
        {
            "seed": 3,
            "a": {"b": "${seed}", "c": [1, "${a.b}", {"d": "${x.y}"}]},
            "x": {"y": {"z": "${seed}"}},
            "far": {},
        },
        {"a": "${b}", "b": {"c": 5}, "d": "${a.c}", "unused": {"k": [1, 2]}},
        {"a": {"b": "${.c}", "c": 2}, "far": {"q": 1}},
        {"a": "x${b.c}y${d}", "b": {"c": 1}, "d": 2.5, "far": None},
        {"a": "${l[1]}", "l": [4, 5], "far": 1},
        {"a": "${${b}}", "b": "c", "c": 7, "far": 1},
        {"a": r"\${b}", "b": 1, "c": "${b}"},
    ],
)
def test_the_needed_part_gives_what_the_whole_gives(config):
    whole = OmegaConf.to_container(OmegaConf.create(config), resolve=True)
    assert interpolation.interpolated(config, "t") == whole


def test_a_missing_key_is_named():
    with pytest.raises(SpecError, match="Interpolation key 'sed' not found"):
        interpolation.interpolated({"seed": 1, "a": "${sed}"}, "t")
