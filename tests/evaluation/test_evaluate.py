"""A trained system judged: what comes out, what it depends on, and the weights that ship held to their bars."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio
from torch import Tensor

import sana_lab
from sana_lab import __main__, api
from sana_lab.checkpoints import weights
from sana_lab.config import experiments, hashing
from sana_lab.config.specs import SpecError
from sana_lab.evaluation import evaluate, reconstruction
from sana_lab.evaluation.command import columns
from sana_lab.evaluation.geneval.prompts import prompts
from sana_lab.evaluation.geneval.vocabulary import TASKS
from sana_lab.shapes import scenes
from sana_lab.shapes.data import Shapes
from sana_lab.systems.text2image import TextToImage
from sana_lab.training import train

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")  # MLflow's


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory) -> Iterator[Path]:
    """A working directory with `squeeze`, trained, and `tiny`, untrained but there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("here"))
        counts = {"data.held_out": 12, "eval.reconstructions": 10}
        tiny.write_experiment(Path(), "squeeze", tiny.SQUEEZE, counts)
        changes = {"system.autoencoder": "experiment:squeeze", "sampling.steps": 1, "sampling.guidance": 1.0}
        changes |= {"trainer.max_steps": 0, "eval": {"prompts_per_task": 2, "images_per_prompt": 2, "batch": 5}}
        tiny.write_experiment(Path(), changes=changes)
        for name in ("squeeze", "tiny"):
            train.train(experiments.load(name), name=name)
        yield Path.cwd()


@pytest.fixture(scope="module")
def report(folder) -> dict[str, Any]:
    return sana_lab.evaluate("tiny")


class Painter(TextToImage):
    """Draws single objects as they are asked for, whatever the prompt; keeps what it was asked."""

    def sample(self, prompts, *, size, indices=None, **options) -> Tensor:
        assert (size, options["seed"], options["sampling"].steps) == (32, 43, 1)
        self.asked = [*getattr(self, "asked", []), (list(indices), list(prompts))]
        return torch.cat([paint(prompt, size) for prompt in prompts])


def paint(prompt: str, size: int) -> Tensor:
    """(1, 3, H, W): the last shape and colour that the prompt names, in the middle."""
    words = prompt.split()
    shape = next((scenes.SHAPES.index(w) for w in reversed(words) if w in scenes.SHAPES), 0)
    color = next((scenes.COLORS.index(w) for w in reversed(words) if w in scenes.COLORS), 0)
    rows = np.full((1, scenes.MAX_OBJECTS), shape), np.full((1, scenes.MAX_OBJECTS), color)
    places = np.full((1, scenes.MAX_OBJECTS, 2), 0.5, np.float32), np.full((1, scenes.MAX_OBJECTS), 0.2, np.float32)
    return torch.from_numpy(scenes.render(scenes.Scenes(np.array([0]), np.array([1]), *rows, *places), size))


def test_a_painter_of_single_objects_earns_what_it_draws():
    experiment = experiments.load("tiny")
    system = Painter(**{k: v for k, v in experiment["system"].items() if k != "name"})
    system.experiment = experiment
    report = evaluate.evaluate(system)
    for found in (report["exact"], report["geneval"]):
        values = {task: t["value"] for task, t in found["tasks"].items()}
        assert values == {**dict.fromkeys(TASKS, 0.0), "single_object": 1.0, "colors": 1.0}
        assert found["overall"] == pytest.approx(2 / 6)
    assert [len(indices) for indices, _ in system.asked] == [5, 5, 5, 5, 4]
    assert [i for indices, _ in system.asked for i in indices] == list(range(24))
    rows = prompts(2, seed=43, classes=scenes.SHAPES)
    assert [p for _, texts in system.asked for p in texts] == [r["prompt"] for r in rows for _ in range(2)]


def test_a_report_says_what_was_measured_and_with_what(report):
    experiment = experiments.load("tiny")
    assert (report["geneval"]["prompts"], report["geneval"]["images"]) == (12, 24)
    assert report["model"] == hashing.experiment_hash(experiment)
    assert report["settings"] == {k: experiment[k] for k in ("sampling", "eval", "seed")}
    assert "torch" in report["environment"]
    assert "fid" not in report
    assert json.loads(json.dumps(report)) == report


def test_the_batch_changes_no_verdict(report):
    """Noise belongs to the image, so whatever stands beside it does not matter."""
    again = sana_lab.evaluate("tiny", ["eval.batch=64"])
    assert again["geneval"]["outcomes"] == report["geneval"]["outcomes"]


def test_headline_numbers_under_the_names_of_columns(report):
    flat = columns(report)
    assert flat["geneval"] == report["geneval"]["overall"]
    endings = ["", "_correct_images", "_correct_prompts", *(f"_{task}" for task in TASKS)]
    shown = {name + ending for name in ("exact", "geneval") for ending in endings}
    ends = {f"{name}{end}" for name in shown for end in ("_low", "_high")}
    assert flat.keys() == shown | ends | {"prompts", "images"}
    assert flat["geneval_low"] <= flat["geneval"] <= flat["geneval_high"]


def test_an_autoencoder_is_judged_by_what_it_gives_back():
    report = sana_lab.evaluate("squeeze")
    system = api.load("squeeze")
    images = Shapes(size=16, held_out=12).batch_at(range(10), "val").images
    with torch.no_grad():
        made = system.autoencoder.decode(system.autoencoder.encode(images))
    pairs = [((x + 1) * 127.5).round().clamp(0, 255).numpy().astype(np.uint8) for x in (images, made)]
    expected = np.mean([peak_signal_noise_ratio(a, b) for a, b in zip(*pairs, strict=True)])
    assert report["reconstruction"]["psnr"] == pytest.approx(expected, abs=1e-3)
    assert report["reconstruction"]["n"] == 10
    assert columns(report).keys() == {f"{name}{end}" for name in ("psnr", "ssim") for end in ("", "_low", "_high")}


def test_the_autoencoder_of_a_system_is_measured_beside_its_images(report):
    both = sana_lab.evaluate("tiny", overrides=["eval.reconstruct=true"])
    assert both["geneval"]["overall"] == report["geneval"]["overall"]
    pictures = Shapes(size=32, held_out=4).batch_at(range(4), "val")
    alone = reconstruction.evaluate_reconstruction(api.load("tiny").autoencoder, [pictures])
    assert both["reconstruction"]["psnr"] == pytest.approx(alone["psnr"], abs=1e-3)
    assert both["reconstruction"]["n"] == 4
    assert {"psnr", "geneval"} <= columns(both).keys()
    assert "reconstruction" not in report


class TestVerb:
    def test_prints_and_writes(self, report, tmp_path, capsys):
        assert __main__.main(["eval", "tiny", "--json", str(tmp_path / "a.json")]) == 0
        said = capsys.readouterr().out.splitlines()
        for first, name in ((0, "exact"), (7, "geneval")):
            overall, (low, high) = report[name]["overall"], report[name]["interval"]
            title = {"exact": "Exact-shapes", "geneval": "GenEval-shapes"}[name]
            counts = "(12 prompts, 24 images)"
            assert said[first] == f"{title} overall {overall:.3f}  95 % [{low:.3f}, {high:.3f}]  {counts}"
            assert [line.split()[0] for line in said[first + 1 : first + 7]] == list(TASKS)
            assert [line.split()[0] for line in said[14:18] if line.split()[0].startswith(name)] == [
                f"{name}_correct_images",
                f"{name}_correct_prompts",
            ]
        assert "eval.fid_weights" in said[18]
        assert json.loads((tmp_path / "a.json").read_text())["geneval"] == report["geneval"]

    def test_an_autoencoder_in_one_line(self, capsys):
        assert __main__.main(["eval", "squeeze", "eval.reconstructions=4"]) == 0
        assert capsys.readouterr().out.startswith("PSNR ")

    def test_a_file_that_cannot_be_written_is_said_before_the_work(self, capsys):
        assert __main__.main(["eval", "tiny", "--json", "nowhere/a.json"]) == 1
        assert "cannot write nowhere/a.json: there is no folder" in capsys.readouterr().err


def test_an_experiment_without_measures_is_an_error_and_a_trial_without_them_none():
    Path("photos").mkdir()
    for i in range(2):
        Image.new("RGB", (40, 32), (i, 0, 0)).save(f"photos/{i}.png")
        Path(f"photos/{i}.txt").write_text("a photo")
    system = api.load("tiny")
    system.experiment = {**system.experiment, "data": {"name": "folder", "root": "photos", "size": 32}}
    with pytest.raises(SpecError, match=r"nothing to measure of a TextToImage; expected .*eval.measures="):
        sana_lab.evaluate(system)
    assert evaluate.evaluate(system, may_be_empty=True)["measures"] == {}


def test_what_has_no_experiment_is_refused():
    system = api.load("tiny")
    del system.experiment
    with pytest.raises(SpecError, match="TextToImage without an experiment; expected the name"):
        sana_lab.evaluate(system)


SHIPPED = sorted((Path(sana_lab.__file__).parent.parent / "experiments" / "weights").glob("*.safetensors"))


class TestShipped:
    @pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
    def test_every_file_is_what_its_recipe_trains(self, path):
        card = weights.card(path)
        assert card["hash"] == hashing.experiment_hash(experiments.load(path.stem))
        assert card["experiment"] == path.stem
        assert card["measured"]
        assert {"seed", "steps", "environment"} <= card.keys()

    def test_they_are_small(self):
        size = {path.stem: path.stat().st_size / 1e6 for path in SHIPPED}
        assert size["shapes_vae_f8"] + size["shapes_dcae_f32"] <= 6
        assert size["shapes_sana"] <= 8
        assert size["shapes_attributes"] + size["shapes_clip"] <= 4

    def test_shapes_sana_draws_what_it_is_told(self):
        report = sana_lab.evaluate("shapes_sana", ["eval.prompts_per_task=8", "eval.images_per_prompt=1"])
        assert report["geneval"]["prompts"] == 44
        assert report["geneval"]["overall"] >= 0.5

    @pytest.mark.parametrize(("name", "least"), [("shapes_vae_f8", 31.0), ("shapes_dcae_f32", 26.0)])
    def test_autoencoders_hold_their_bars(self, name, least):
        experiment = experiments.load(name)
        path = weights.shipped(experiment)
        assert path is not None
        assert weights.card(path)["hash"] == hashing.experiment_hash(experiment)
        assert sana_lab.evaluate(name, ["eval.reconstructions=64"])["reconstruction"]["psnr"] >= least

    def test_other_settings_ship_nothing_and_say_what_to_run(self):
        experiment = experiments.load("shapes_vae_f8", ["system.kl=1.0e-3"])
        assert weights.shipped(experiment) is None
        with pytest.raises(SpecError, match=r"ships no weights for these settings; run: sana-lab train shapes_vae_f8"):
            weights.find_trained(experiment, "shapes_vae_f8")
