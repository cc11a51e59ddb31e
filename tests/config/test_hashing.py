"""Hashes of models and trials: what enters them, by content, and what does not."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from PIL import Image
from tiny import write

from sana_lab.ablation import plan
from sana_lab.ablation.trials import records, state
from sana_lab.checkpoints import weights
from sana_lab.config import experiments, hashing
from sana_lab.config.experiments import load
from sana_lab.config.hashing import experiment_hash
from sana_lab.config.schema import Trial
from sana_lab.tracking.store import Run


@pytest.fixture
def folder(here: Path) -> Path:
    """A working directory with one experiment, `tiny`."""
    tiny.write_experiment(here, text=tiny.SEEDED)
    return here


def trial_hash(*overrides: str, name: str = "tiny") -> str:
    return hashing.trial_hash(Trial({}, 0, load(name, overrides)))


# --- what trains


def test_retraining_what_is_inside_changes_the_hash(folder: Path):
    overrides = ["system.autoencoder=experiment:judge"]
    write(folder, "experiments/judge.yaml", "system: {name: autoencoder, autoencoder: vae}\ndata: shapes\n")
    before = experiment_hash(load("tiny", overrides))
    write(folder, "experiments/judge.yaml", "system: {name: autoencoder, autoencoder: vae}\ndata: shapes\nseed: 1\n")
    assert experiment_hash(load("tiny", overrides)) != before


@pytest.mark.parametrize(
    ("key", "reference", "file"),
    [
        ("system.autoencoder.weights", "vae.safetensors", "vae.safetensors"),
        ("system.dit.weights", "dit.pth", "dit.pth"),
        ("system.autoencoder.weights", "folder", "folder/vae/model.safetensors"),
        ("system.text_encoder.model", "gemma", "gemma/tokenizer.json"),
        ("system.text_encoder.instruction", "file:say.txt", "say.txt"),
    ],
)
def test_files_enter_the_hash_by_what_they_hold(folder: Path, key: str, reference: str, file: str):
    def hashed() -> str:
        return experiment_hash(load("tiny", [f"{key}={reference}"]))

    write(folder, file, "some numbers")
    before = hashed()
    write(folder, f"{Path(file).parent}/README.md", "a note")
    assert hashed() == before
    write(folder, file, "same numbers")  # of the same length, in the same instant
    after = hashed()
    assert after != before
    (folder / reference.removeprefix("file:")).rename(folder / "elsewhere")
    where = "file:elsewhere" if reference.startswith("file:") else "elsewhere"
    assert experiment_hash(load("tiny", [f"{key}={where}"])) == after


def test_a_hub_id_enters_the_hash_as_it_is(folder: Path):
    one, other = (load("tiny", [f"system.autoencoder.weights=owner/{name}"]) for name in ("a", "b"))
    assert hashing._trained_by(one)["system"]["autoencoder"]["weights"] == "owner/a"
    assert experiment_hash(one) != experiment_hash(other)


def test_data_made_from_other_data_is_known_before_it_is_made(folder: Path):
    """By the first source's content, and by the weights that make it."""
    squeeze = "{name: vae, widths: [8, 8], depth: 1, latent: 4, groups: 2, weights: vae.safetensors}"
    photos = "{name: folder, root: photos, caption: a colour, size: 16}"
    latents = f"{{name: latents, items: 4, source: {photos}, autoencoder: {squeeze}}}"
    overrides = [f"data={{name: features, source: {latents}, text_encoder: {{name: t5, model: owner/name}}}}"]
    write(folder, "vae.safetensors", "no tensors")
    (folder / "photos").mkdir()
    hashes = []
    for colour in ("red", "blue"):
        Image.new("RGB", (16, 16), colour).save(folder / "photos/a.png")
        hashes.append(experiment_hash(load("tiny", overrides)))
    write(folder, "vae.safetensors", "other tensors")
    assert len({*hashes, experiment_hash(load("tiny", overrides))}) == 3
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    "override",
    [
        "trainer.devices=2", "trainer.log_every=7", "trainer.threads=2", "sampling.steps=50", "sampling.solver=euler",
        "eval.seed=4", "prompts=[a cat]", "system.dit.checkpointing=true", "system.dit.attention.backend=torch",
        "system.dit.attention.eps=1.0e-6", "system.dit.attention=linear", "trainer.max_steps=2",
    ],
)  # fmt: skip
def test_what_trains_nothing_leaves_the_hash(folder: Path, override: str):
    assert experiment_hash(load("tiny", [override])) == experiment_hash(load("tiny"))


@pytest.mark.parametrize(
    "override",
    [
        "trainer.max_steps=3", "trainer.precision=bf16-mixed", "trainer.gradient_clip=0.5", "seed=4", "data.size=32",
        "system.dit.attention=softmax", "system.dit.attention.eps=1", "system.dit.ffn.ratio=2", "system.shift=2",
        "system.autoencoder.latent=8", "system.optimizer.lr=0.5",
    ],
)  # fmt: skip
def test_what_trains_changes_the_hash(folder: Path, override: str):
    assert experiment_hash(load("tiny", [override])) != experiment_hash(load("tiny"))


def test_the_order_of_keys_does_not_matter(folder: Path):
    write(folder, "experiments/turned.yaml", "seed: 3\ntrainer: {max_steps: 2}\nbase: tiny\n")
    assert experiment_hash(load("turned")) == experiment_hash(load("tiny"))


# --- what evaluates

GUEST = """
from sana_lab.evaluation import Measure


class Own(Measure):
    def __init__(self, table: str = "", kind: str = "plain") -> None:
        ...

    def add(self, images, rows): ...
    def report(self): ...
"""


@pytest.mark.parametrize(
    ("override", "file"),
    [
        ("eval.fid_weights=inception.pth", "inception.pth"),
        ("eval.lpips_weights=vgg.pth", "vgg.pth"),
        ("eval.captions=photos", "photos/a.jpg"),
        ("eval.reconstruction_folder=photos", "photos/deeper/b.png"),
        ("eval.rfid={name: inception, weights: inception.pth}", "inception.pth"),
        ("eval.measures=[{name: distances, extractor: {name: dinov2, model: dino}}]", "dino/model.safetensors"),
        ("eval.measures=[{name: distances, extractor: shapes, reference: real.st}]", "real.st"),
        ("eval.measures=[{name: clip_score, model: clip}]", "clip/tokenizer.json"),
        ("eval.measures=[{name: geneval, detector: {name: owlv2, model: owl}, clip: clip}]", "clip/merges.txt"),
        ("eval.measures=[{name: geneval, detector: {name: owlv2, model: owl}}]", "owl/config.json"),
        ("eval.measures=[{name: geneval, detector: shapes, prompts: mine.jsonl}]", "eval/prompts/mine.jsonl"),
        ("eval.measures=[{name: dpg, questions: dpg.csv, vqa: {name: blip, model: blip}}]", "dpg.csv"),
        ("eval.measures=[{name: dpg, questions: dpg.csv, vqa: {name: blip, model: blip}}]", "blip/model.safetensors"),
        ("eval.measures=[{name: clip_shapes, weights: own.safetensors}]", "own.safetensors"),
        ("eval.measures=[{name: hps, model: hps.pt}]", "hps.pt"),
    ],
)
def test_a_changed_byte_at_the_same_path_changes_the_trial(folder: Path, override: str, file: str):
    write(folder, file, "some numbers")
    before, model = trial_hash(override), experiment_hash(load("tiny", [override]))
    assert trial_hash(override) == before
    write(folder, file, "same numbers")  # of the same length, in the same instant
    assert trial_hash(override) != before
    assert experiment_hash(load("tiny", [override])) == model


def test_a_file_that_a_trial_writes_enters_by_its_name(folder: Path):
    before = trial_hash("eval.worst_picture=worst.png")
    write(folder, "worst.png", "a picture")
    assert trial_hash("eval.worst_picture=worst.png") == before


def test_words_are_no_files(folder: Path):
    """Names of parts, choices and empty options stay, whatever lies in the working directory."""
    suite = "eval.measures=[{name: distances, extractor: shapes, metrics: [fid], interval: none}, {name: clip_shapes}]"
    before = trial_hash(suite)
    for name in ("distances", "shapes", "fid", "none", "alex", "clip_shapes"):
        write(folder, name, "a file")
    assert trial_hash(suite) == before


def test_an_experiment_that_measures_enters_by_its_hash_unless_it_is_the_one_that_ships(folder: Path):
    suite = "eval.measures=[{name: clip_shapes}]"
    before = trial_hash(suite)
    write(folder, "experiments/shapes_clip.yaml", experiments.locate("experiments", "shapes_clip").read_text())
    assert trial_hash(suite) == before
    write(folder, "experiments/shapes_clip.yaml", "system: clip\ndata: shapes\nseed: 99\n")
    assert trial_hash(suite) != before


def test_a_guest_that_measures_enters_with_its_source(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(folder)
    suite = "eval.measures=[{name: 'own_measure_here:Own', table: table.csv}]"
    write(folder, "own_measure_here.py", GUEST)
    hashes = [trial_hash(suite)]
    write(folder, "table.csv", "1")
    hashes.append(trial_hash(suite))
    write(folder, "own_measure_here.py", GUEST + "# another rule\n")
    hashes.append(trial_hash(suite))
    assert len(set(hashes)) == 3


def test_a_plan_says_that_a_trial_is_to_run_again(folder: Path):
    write(folder, "ablations/two.yaml", "title: t\nbase: tiny\naxes: {a: {x: {eval.fid_weights: inception.pth}}}\n")
    write(folder, "inception.pth", "some numbers")
    finished: list[Run] = []
    store: Any = SimpleNamespace(summaries=lambda name: finished)  # the runs that MLflow has of this sweep

    def planned() -> Any:
        return records(store, plan.load("two"))[0]

    tags = {"sana.trial": planned().key}
    finished.append(Run("1", "x", "FINISHED", tags, {}, {}, 0.0, 1.0, "0", None))
    assert planned().done
    write(folder, "inception.pth", "same numbers")
    assert not planned().done
    assert state(planned()) == "to run"


# --- what was known before is known still

MODELS = {
    "shapes": "b50bea4acee9fc94",
    "shapes_attributes": "4426c4ef0cbb005e",
    "shapes_clip": "ad0a0d4f87a73f49",
    "shapes_dcae_f32": "b3f720dce2a5b0b3",
    "shapes_sana": "4fe51f617287b690",
    "shapes_vae_f8": "a4ffe10391042fb6",
}


@pytest.mark.parametrize("name", MODELS)
def test_models_keep_their_hash(here: Path, name: str):
    assert experiment_hash(load(name)) == MODELS[name]
    ship = experiments.locate("experiments", name).parent / "weights" / f"{name}.safetensors"
    assert not ship.exists() or weights.card(ship)["hash"] == MODELS[name]


def test_trials_keep_their_hash(here: Path):
    assert trial_hash(name="shapes") == "59f7d2e99af57952"
    assert hashing.trial_hash(plan.load("attention").trials[0]) == "fe4eceb7d36b7f80"
    assert hashing.trial_hash(plan.load("quantize").trials[0]) == "67d6e340c309ac76"
