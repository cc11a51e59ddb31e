"""Trained models loaded by name or checkpoint, and drawn from: in Python and by the verb `sample`."""

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch.nn.utils import parameters_to_vector

import sana_lab
from sana_lab import __main__, api
from sana_lab.checkpoints import weights
from sana_lab.config import experiments
from sana_lab.config.specs import SpecError
from sana_lab.diffusion.sampling import Sampling
from sana_lab.systems.text2image import TextToImage
from sana_lab.training import resume, train

PROMPTS = ["a red circle", "Zwei blaue Quadrate — 2 = 1 + 1!"]


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory) -> Iterator[Path]:
    """A working directory with `squeeze` and `tiny`, both trained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("here"))
        changes = {"system.autoencoder": "experiment:squeeze", "data.size": 16, "sampling.guidance": 2.0}
        changes |= {"trainer.max_steps": 3, "trainer.validate_every": 3}
        tiny.write_experiment(Path(), "squeeze", tiny.SQUEEZE)
        tiny.write_experiment(Path(), changes=changes)
        for name in ("squeeze", "tiny"):
            train.train(experiments.load(name), name=name)
        yield Path.cwd()


@pytest.fixture(scope="module")
def checkpoint(folder) -> str:
    return str(resume.latest(train.folder(experiments.load("tiny"))))


def test_loads_what_training_left(folder):
    system = api.load("tiny")
    held = weights.read(weights.find("experiment:tiny"))
    own = system.state_dict()
    assert {name.split(".")[0] for name in held} == {"dit", "text_encoder"}
    assert all(torch.equal(own[name], value) for name, value in held.items())
    squeezed = weights.read(weights.find("experiment:squeeze"))
    assert all(torch.equal(own[name], value) for name, value in squeezed.items())
    assert not system.training
    assert system.experiment == experiments.load("tiny")


def test_loads_a_part_by_the_name_of_its_experiment():
    """What an experiment takes from another one is that one's part, with its weights."""
    autoencoder = api.load("squeeze").autoencoder
    vectors = [parameters_to_vector(a.parameters()) for a in (autoencoder, api.load("tiny").autoencoder)]
    assert torch.equal(*vectors)


def test_a_name_a_system_and_the_system_itself_draw_the_same():
    system = api.load("tiny")
    images = sana_lab.sample("tiny", PROMPTS, seed=3)
    assert images.shape == (2, 3, 16, 16)
    assert torch.equal(images, sana_lab.sample(system, PROMPTS, seed=3))
    sampling = Sampling("euler", 2, 2.0)
    assert torch.equal(images, system.sample(PROMPTS, size=16, sampling=sampling, seed=3))
    assert not torch.equal(images, sana_lab.sample(system, PROMPTS, seed=4))


def test_batches_are_the_images_of_one_call():
    """To the last bit, with the noise of their indices; what does not fit is refused before the first."""
    system, sampling = api.load("tiny"), Sampling("euler", 2, 2.0)
    prompts = [f"ring {i}" for i in range(5)]
    batches = [*system.sample_batches(prompts, size=16, sampling=sampling, seed=3, batch=2)]
    assert [len(images) for images in batches] == [2, 2, 1]
    whole = system.sample(prompts, size=16, sampling=sampling, seed=3, batch=2)
    assert torch.equal(torch.cat(batches), whole)
    last = system.sample(prompts[4:], size=16, sampling=sampling, seed=3, indices=[4])
    assert torch.equal(batches[2], last)
    of_api = torch.cat([*api.sample_batches(system, prompts, seed=3)])
    assert torch.equal(of_api, sana_lab.sample(system, prompts, seed=3))
    with pytest.raises(ValueError, match="the nearest is 16 x 16"):
        system.sample_batches(prompts, size=20, sampling=sampling)


def test_changes_are_fields_of_sampling():
    system = api.load("tiny")
    plain = sana_lab.sample(system, PROMPTS)
    assert not torch.equal(plain, sana_lab.sample(system, PROMPTS, steps=5))
    assert sana_lab.sample(system, PROMPTS, size=24).shape[-2:] == (24, 24)
    with pytest.raises(SpecError, match="did you mean 'guidance'"):
        sana_lab.sample(system, PROMPTS, guidence=2.0)
    with pytest.raises(SpecError, match="did you mean 'euler'"):
        sana_lab.sample(system, PROMPTS, solver="eulr")


def test_overrides_of_what_trains_are_another_model():
    assert api.load("tiny", ["sampling.steps=7"]).experiment["sampling"]["steps"] == 7
    with pytest.raises(SpecError, match=r"'tiny' is not trained yet .*run: sana-lab train tiny"):
        api.load("tiny", ["system.dit.depth=2"])


def test_a_text_is_no_list_of_prompts():
    for prompts in ("a red circle", [], [7]):
        with pytest.raises(ValueError, match="expected a list with at least one text"):
            sana_lab.sample("tiny", prompts)


def test_an_autoencoder_draws_nothing():
    with pytest.raises(SpecError, match="AutoencoderSystem, expected a text2image"):
        sana_lab.sample("squeeze", PROMPTS)


class TestCheckpoint:
    def test_draws_when_told_the_size(self, checkpoint):
        system = api.load(checkpoint)
        with pytest.raises(SpecError, match="such as size=64"):
            sana_lab.sample(system, PROMPTS)
        assert sana_lab.sample(system, PROMPTS, size=16, steps=1).shape == (2, 3, 16, 16)

    def test_of_an_autoencoder_is_its_average(self, tmp_path):
        experiment = experiments.load("squeeze", ["trainer.max_steps=4", "trainer.checkpoint_every=2"])
        train.train(experiment)
        path = resume.latest(train.folder(experiment))
        loaded = api.load(str(path)).autoencoder
        held = torch.load(str(path), weights_only=True)["average"]["values"]
        assert all(torch.equal(p, held[name]) for name, p in loaded.named_parameters())

    def test_takes_no_overrides(self, checkpoint):
        with pytest.raises(SpecError, match=r"seed=1 changes an experiment, .* is a checkpoint"):
            api.load(checkpoint, ["seed=1"])

    def test_the_verb_takes_it(self, checkpoint, tmp_path):
        assert __main__.main(["sample", "a ring", "--out", str(tmp_path), "--model", checkpoint, "--size", "16"]) == 0
        with Image.open(tmp_path / "000-a-ring.png") as image:
            assert json.loads(image.text["sana_lab"])["sampling"]["solver"]["name"] == "dpmpp"


class TestVerb:
    def test_writes_pictures_that_say_what_they_are(self, tmp_path, capsys):
        words = ["sample", *PROMPTS, "--out", str(tmp_path / "a/b"), "--model", "tiny", "--seed", "5"]
        assert __main__.main([*words, "--negative", "fog", "--set", "sampling.steps=3"]) == 0
        files = sorted((tmp_path / "a/b").iterdir())
        assert [f.name for f in files] == ["000-a-red-circle.png", "001-zwei-blaue-quadrate-2-1-1.png"]
        assert capsys.readouterr().out.splitlines() == [str(f) for f in files]
        expected = sana_lab.sample("tiny", PROMPTS, seed=5, negative="fog", steps=3)
        for i, file in enumerate(files):
            with Image.open(file) as image:
                about = json.loads(image.text["sana_lab"])
                assert image.text["prompt"] == about["prompt"] == PROMPTS[i]
                assert np.array_equal(np.asarray(image), expected[i].permute(1, 2, 0).numpy())
            assert (about["model"], about["seed"], about["index"], about["negative"]) == ("tiny", 5, i, "fog")
            assert about["sampling"]["steps"] == 3

    @pytest.mark.parametrize("source", ["file", "stdin"])
    def test_prompts_of_a_file_are_those_of_the_words(self, source, tmp_path, monkeypatch):
        content = ("\r\n".join(PROMPTS) + "\r\n").encode("utf-8-sig")
        (tmp_path / "prompts.txt").write_bytes(content)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        given = str(tmp_path / "prompts.txt") if source == "file" else "-"
        for name, words in (("words", PROMPTS), ("lines", ["--prompts", given])):
            assert __main__.main(["sample", *words, "--out", str(tmp_path / name), "--model", "tiny"]) == 0
        written = [{f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("words", "lines")]
        assert written[0] == written[1]
        assert [*sorted(written[1])] == ["000-a-red-circle.png", "001-zwei-blaue-quadrate-2-1-1.png"]

    @pytest.mark.parametrize(
        ("words", "text", "said"),
        [
            (["--prompts", "prompts.txt"], "a\n\nb\n", "prompts.txt:2 is empty"),
            (["--prompts", "prompts.txt"], "a\n \n", "prompts.txt:2 is empty"),
            (["--prompts", "prompts.txt"], "", "prompts.txt holds no prompt"),
            (["--prompts", "prompts.txt", "a ring"], "a\n", "PROMPT and --prompts prompts.txt are both given"),
            (["--prompts", "missing.txt"], "", "--prompts missing.txt: No such file or directory"),
            ([], "", "no prompt is given"),
            (["a ring", " "], "", "prompt ' ' is empty"),
        ],
    )
    def test_prompts_that_cannot_be_read_are_refused(self, words, text, said, tmp_path, monkeypatch, capsys):
        (tmp_path / "prompts.txt").write_text(text)
        monkeypatch.chdir(tmp_path)
        assert __main__.main(["sample", *words, "--out", "out", "--model", "shapes_sana"]) == 1
        assert said in capsys.readouterr().err
        assert not Path("out").exists()

    def test_batches_are_written_as_they_are_done(self, tmp_path, monkeypatch):
        """A call that ends in its second batch leaves the pictures of the first, as an unbroken one writes them."""
        prompts, real = [f"ring {i}" for i in range(66)], TextToImage._sample_best

        def sample_first(self, prompts, *rest):
            if prompts[0] != "ring 0":
                raise KeyboardInterrupt
            return real(self, prompts, *rest)

        assert __main__.main(["sample", *prompts, "--out", str(tmp_path / "all"), "--model", "tiny"]) == 0
        monkeypatch.setattr(TextToImage, "_sample_best", sample_first)
        with contextlib.suppress(KeyboardInterrupt):
            __main__.main(["sample", *prompts, "--out", str(tmp_path / "part"), "--model", "tiny"])
        every, part = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in ("all", "part"))
        assert (len(every), len(part)) == (66, 64)
        assert part.items() <= every.items()

    def test_leaves_gradients_as_they_are(self, tmp_path):
        assert __main__.main(["sample", "a", "--out", str(tmp_path), "--model", "tiny"]) == 0
        assert torch.is_grad_enabled()

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["--size", "20"], "the nearest is 16 x 16"),
            (["--set", "sampling.stpes=3"], "did you mean 'steps'?"),
            (["--model", "squeeze"], "expected a text2image system"),
        ],
    )
    def test_mistakes_are_one_line(self, words, said, tmp_path, capsys):
        given = ["--model", "tiny"] if "--model" not in words else []
        assert __main__.main(["sample", "a ring", "--out", str(tmp_path), *given, *words]) == 1
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
        assert not list(tmp_path.iterdir())


def test_a_name_without_letters_is_still_a_file(tmp_path):
    about = {"prompt": "赤い丸", "index": 12}
    assert api.write(tmp_path, torch.zeros(3, 4, 4, dtype=torch.uint8), about).name == "012-image.png"
    with Image.open(tmp_path / "012-image.png") as image:
        assert image.text["prompt"] == "赤い丸"
