"""`eval` and `stats` on what is no experiment: folders of pictures, GenEval's layout, diffusers pipelines."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_folders
import tiny_peers
import torch
from PIL import Image

import sana_lab
from sana_lab import __main__
from sana_lab.config.specs import SpecError
from sana_lab.evaluation import compare
from sana_lab.evaluation.geneval.prompts import prompts
from sana_lab.shapes.data import Shapes
from sana_lab.shapes.scenes import SHAPES

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # of diffusers
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),  # of MLflow
]

MEANS = "{name: function, function: 'features:means'}"


@pytest.fixture
def photos(here: Path) -> Path:
    """Twenty pictures of the embedded world, of two sizes, with captions."""
    folder = here / "photos"
    folder.mkdir()
    lines = []
    for i in range(20):
        image, prompt = Shapes(size=32 if i % 3 else 48).example(i)
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{i:02d}.png")
        lines.append(json.dumps({"file_name": f"{i:02d}.png", "caption": prompt}))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return folder


def test_pictures_are_no_distance_from_their_own_statistics(photos, capsys):
    assert __main__.main(["stats", str(photos), "--extractor", MEANS, "--out", "own.safetensors", "--features"]) == 0
    assert "20 pictures" in capsys.readouterr().out
    asked = f"{{name: distances, extractor: {MEANS}, metrics: [fid, precision], reference: own.safetensors}}"
    report = sana_lab.evaluate(str(photos), [f"eval.measures=[{asked}]"])
    values = report["measures"]["distances"]["values"]
    assert values["fd_means"]["value"] == pytest.approx(0, abs=1e-6)
    assert values["precision_means"]["value"] == 1.0
    assert report["measures"]["distances"]["settings"]["reference"]["n"] == 20


def test_a_folder_of_real_captions_stands_for_held_out_data(photos, here):
    other = here / "other"
    other.mkdir()
    for i in range(12):
        noise = np.random.default_rng(i).integers(0, 255, (32, 32, 3), np.uint8)
        Image.fromarray(noise).save(other / f"{i}.png")
    asked = [f"eval.measures=[{{name: distances, extractor: {MEANS}}}]", f"eval.captions={photos}"]
    assert sana_lab.evaluate(str(other), asked)["measures"]["distances"]["values"]["fd_means"]["value"] > 100


SHAPES_CLIP = "eval.measures=[{name: clip_shapes}]"


class TestCompare:
    """Two folders are paired over the same prompts, or the same names; never because they are of one size."""

    def reports(self, *folders: Path) -> list[dict]:
        return [sana_lab.evaluate(str(folder), ["eval.measures=[clip_shapes]"]) for folder in folders]

    def write(self, folder: Path, prompts: list[str], first: int = 0) -> Path:
        """A folder of pictures of the embedded world, with these captions."""
        folder.mkdir()
        for i, prompt in enumerate(prompts):
            image, _ = Shapes(size=32).example(i + first)
            Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{folder.name}-{i}.png")
            (folder / f"{folder.name}-{i}.txt").write_text(prompt)
        return folder

    def test_the_same_prompts_are_paired_whatever_the_files_are_called(self, here):
        prompts = ["a red circle", "three stars", "a green square", "two blue stars"]
        a, b = self.reports(self.write(here / "a", prompts), self.write(here / "b", prompts, first=9))
        line = compare.compare(a, b)[0]
        changes = np.subtract(*(r["per_image"]["clip_shapes"]["values"] for r in (b, a)))
        assert line.difference is not None
        assert line.difference.value == pytest.approx(changes.mean())
        assert line.difference.test == "paired t test over prompts"

    def test_other_prompts_are_not(self, here):
        prompts = ["a red circle", "three stars"]
        a, b = self.reports(self.write(here / "a", prompts), self.write(here / "b", prompts[::-1]))
        line = compare.compare(a, b)[0]
        assert (line.difference, line.reason) == (None, "other prompts, noise or numbers of images")

    def test_pictures_of_one_prompt_are_one_cluster(self, here):
        prompts = ["a red circle"] * 3 + ["two blue stars"] * 3
        (report,) = self.reports(self.write(here / "a", prompts))
        assert report["per_image"]["clip_shapes"]["images_per_prompt"] == 3

    def test_a_folder_in_place_of_a_file_says_what_to_run(self, photos, capsys):
        assert __main__.main(["compare", "photos", "photos"]) == 1
        assert "first evaluate it: sana-lab eval photos eval=SUITE --json photos.json" in capsys.readouterr().err


def plain_copy(photos: Path, name: str, captioned: int = 0) -> Path:
    """The photos in another folder, the first ones with a caption beside them."""
    folder = photos.parent / name
    folder.mkdir()
    for i, path in enumerate(sorted(photos.glob("*.png"))):
        (folder / path.name).write_bytes(path.read_bytes())
        if i < captioned:
            (folder / path.name).with_suffix(".txt").write_text("a red circle")
    return folder


def test_pictures_without_a_caption_are_named_and_counted_where_a_measure_reads_it(photos):
    bare, half = plain_copy(photos, "bare"), plain_copy(photos, "half", 18)
    with pytest.raises(ValueError, match=r"'clip_shapes' scores images against captions, and 20 of 20 pictures .*bare"):
        sana_lab.evaluate(str(bare), [SHAPES_CLIP])
    with pytest.raises(ValueError, match=r"2 of 20 pictures in '.*half' have none: '18.png', '19.png'; expected a"):
        sana_lab.evaluate(str(half), [SHAPES_CLIP])
    assert sana_lab.evaluate(str(photos), [SHAPES_CLIP])["measures"]["clip_shapes"]["settings"]["images"] == 20


METRICS = ("fid", "kid", "cmmd", "cmmd_biased", "precision", "recall")


@pytest.mark.parametrize("held_out", [1000, 15])
def test_a_folder_is_no_distance_from_itself_captions_or_not(photos, held_out, capsys):
    """Pictures of two sizes, neither of them the reference's former 256 px; the cut is that of both sides."""
    bare = plain_copy(photos, "bare")
    measure = f"{{name: distances, extractor: shapes, metrics: [{', '.join(METRICS)}]}}"
    options = [f"eval.measures=[{measure}]", f"eval.captions={bare}", f"eval.held_out={held_out}"]
    assert __main__.main(["eval", str(bare), *options, "--json", "a.json"]) == 0
    report, n = json.loads(Path("a.json").read_text()), min(held_out, 20)
    values = {name: value["value"] for name, value in report["measures"]["distances"]["values"].items()}
    assert values.pop("precision_shapes") == values.pop("recall_shapes") == 1.0
    assert list(values.values()) == pytest.approx([0.0] * 4, abs=1e-6)
    settings = report["measures"]["distances"]["settings"]
    assert (settings["images"], settings["reference"]["n"]) == (n, n)
    line = next(line for line in capsys.readouterr().out.splitlines() if "compared with" in line)
    assert "both sides at their own sizes; resized to 64 px (clean) by shapes" in line
    counts = "15 of 20 real pictures of" if held_out < 20 else "20 real pictures of"
    assert f"compared with {counts}" in line
    assert ("15 of 20 judged ones (eval.held_out)" in line) == (held_out < 20)


def test_a_cut_for_distances_leaves_the_other_measures_whole(photos):
    measures = f"eval.measures=[{{name: distances, extractor: {MEANS}}}, {{name: clip_shapes}}]"
    report = sana_lab.evaluate(str(photos), [measures, f"eval.captions={photos}", "eval.held_out=8"])
    assert report["measures"]["clip_shapes"]["settings"]["images"] == 20
    assert report["measures"]["distances"]["settings"]["images"] == 8


def test_options_out_of_range_are_refused_for_a_folder_too(photos):
    with pytest.raises(SpecError, match=r"eval.batch is 0 .int., expected int in .1, 65536.; the nearest is 1"):
        sana_lab.evaluate(str(photos), [SHAPES_CLIP, "eval.batch=0"])


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000])
def test_a_broken_index_is_one_line(here, capsys, content):
    (here / "odd").mkdir()
    (here / "odd" / "model_index.json").write_text(content)
    assert __main__.main(["eval", "./odd", SHAPES_CLIP, "size=64"]) == 1
    error = capsys.readouterr().err
    assert "model_index.json" in error
    assert error.count("\n") == 1


def test_broken_pictures_are_named_and_counted_and_too_many_are_an_error(photos):
    asked = [f"eval.measures=[{{name: distances, extractor: {MEANS}}}]", f"eval.captions={photos}"]
    other = photos.parent / "mixed"
    other.mkdir()
    for i in range(20):
        Image.fromarray(np.full((16 + i % 2, 16, 3), i, np.uint8)).save(other / f"{i}.png")
    (other / "cut.png").write_bytes((other / "1.png").read_bytes()[:40])
    report = sana_lab.evaluate(str(other), asked)
    assert [Path(name).name for name in report["skipped"]] == ["cut.png"]
    assert report["measures"]["distances"]["values"]["fd_means"]["n"] == 20
    (other / "empty.png").touch()
    with pytest.raises(ValueError, match=r"2 of 22 files.*cut.png"):
        sana_lab.evaluate(str(other), asked)


def test_genevals_layout_is_judged_as_it_lies(here, capsys):
    """One right picture of each single object: the other tasks have none, so the score is partial and says so."""
    rows = [r for r in prompts(4, classes=SHAPES) if r["tag"] == "single_object"]
    world = Shapes(size=64)
    for at, row in enumerate(rows):
        name = row["include"][0]["class"]
        i = next(i for i in range(1000) if f" {name}" in world.example(i)[1] and len(world.example(i)[1].split()) < 6)
        tiny_folders.geneval(here / "drawn", at, row, torch.from_numpy(world.example(i)[0])[None])
    measure = "eval.measures=[{name: geneval, detector: shapes, prompts_per_task: 4, images_per_prompt: 1}]"
    assert __main__.main(["eval", str(here / "drawn"), measure, "--json", "a.json"]) == 0
    found = json.loads(Path("a.json").read_text())["measures"]["geneval"]["values"]
    assert found["geneval_partial_single_object"]["value"] == 1.0
    assert "geneval" not in found
    assert "geneval_partial" in capsys.readouterr().out


def test_geneval_on_another_layout_is_refused(photos):
    with pytest.raises(SpecError, match="GenEval's layout"):
        sana_lab.evaluate(str(photos), ["eval.measures=[{name: geneval}]"])


def test_nothing_to_measure_is_said(photos):
    with pytest.raises(SpecError, match="expected a suite with measures"):
        sana_lab.evaluate(str(photos))


def test_a_foreign_option_is_refused(photos):
    with pytest.raises(SpecError, match=r"eval\.\*, sampling\.\* and size can be given, not trainer"):
        sana_lab.evaluate(str(photos), ["trainer.max_steps=1"])


def test_a_pipeline_goes_through_the_same_measures(sana_folder, photos):
    """As our own system, since the lab reads it; its noise and its numbers are those of `sample`."""
    asked = [
        f"eval.measures=[{{name: distances, extractor: {MEANS}}}]",
        f"eval.captions={photos}",
        "eval.held_out=6",
        "sampling.steps=1",
    ]
    report = sana_lab.evaluate(str(sana_folder), [*asked, "size=64"])
    assert report["measures"]["distances"]["values"]["fd_means"]["n"] == 6
    assert report["settings"]["eval"]["held_out"] == 6


def test_peers_of_another_kind_too(here, photos):
    folder = tiny_peers.saved(tiny_peers.stable_diffusion(), here / "sd")
    asked = [
        f"eval.measures=[{{name: distances, extractor: {MEANS}}}]",
        f"eval.captions={photos}",
        "eval.held_out=4",
        "sampling.steps=1",
    ]
    report = sana_lab.evaluate(str(folder), [*asked, "size=64"])
    assert report["model"]["pipeline"] == "StableDiffusionPipeline"
    assert report["measures"]["distances"]["values"]["fd_means"]["n"] == 4
    with pytest.raises(SpecError, match="such as size=1024"):
        sana_lab.evaluate(str(folder), asked)
