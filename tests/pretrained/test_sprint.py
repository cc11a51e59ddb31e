"""SANA-Sprint: pictures of a SanaSprintPipeline's folder, ours and diffusers' from the same noise, and back."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_peers
import torch
from diffusers import SanaSprintPipeline
from torch import Tensor

from sana_lab import __main__
from sana_lab.config import experiments
from sana_lab.config.validation import SpecError
from sana_lab.diffusion.sampling import Sampling, generator
from sana_lab.pretrained import export, loading
from sana_lab.systems.text2image import TextToImage

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers on numpy 2
PROMPTS = ["A red circle left of a blue Square", "three green triangles"]
SIZE, SEED = 32, 5
Pair = tuple[Any, TextToImage]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_peers.saved(tiny_peers.sprint_pipeline(), tmp_path_factory.mktemp("sprint") / "pipeline")


@pytest.fixture(scope="module")
def pair(folder: Path) -> Pair:
    """diffusers' pipeline and ours, of one folder."""
    return opened(folder), loading.load(folder)


def opened(folder: Path) -> Any:
    pipeline = SanaSprintPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def diffusers_images(pipeline: Any, steps: int, guidance: float, middle: float | None = 1.3) -> Tensor:
    """(B, 3, H, W) uint8, the noise between steps from the generators that made the first."""
    random = [generator(SEED, i) for i in range(len(PROMPTS))]
    options: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance, "height": SIZE, "width": SIZE}
    options |= {"intermediate_timesteps": middle if steps == 2 else None, "use_resolution_binning": False}
    images = pipeline(PROMPTS, generator=random, output_type="np", **options).images
    return torch.from_numpy((images * 255).round().astype("uint8")).permute(0, 3, 1, 2)


def our_images(system: TextToImage, steps: int, guidance: float, batch: int = 64, **changes: Any) -> Tensor:
    sampling = {**system.experiment["sampling"], "steps": steps, "guidance": guidance, **changes}
    return system.sample(PROMPTS, size=SIZE, sampling=Sampling(**sampling), seed=SEED, batch=batch)


def difference(a: Tensor, b: Tensor) -> int:
    return int((a.int() - b.int()).abs().max())


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_images_are_diffusers(pair: Pair, steps: int, guidance: float):
    theirs, ours = pair
    images = diffusers_images(theirs, steps, guidance)
    assert images.float().std() > 10, "a flat image proves nothing"
    assert difference(images, our_images(ours, steps, guidance)) <= 1


def test_another_angle_between_two_steps(pair: Pair):
    theirs, ours = pair
    images = our_images(ours, 2, 4.5, solver={"name": "scm", "middle": 0.9})
    assert difference(diffusers_images(theirs, 2, 4.5, 0.9), images) <= 1
    assert difference(diffusers_images(theirs, 2, 4.5), images) > 1
    even = our_images(ours, 2, 4.5, solver={"name": "scm", "middle": None})
    assert difference(diffusers_images(theirs, 2, 4.5, None), even) <= 1


def test_the_comparison_detects_guidance_and_the_noise_between_steps(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    theirs, ours = pair
    images = diffusers_images(theirs, 2, 4.5)
    assert difference(images, our_images(ours, 2, 1.0)) > 1
    monkeypatch.setattr(Sampling, "_supplied", lambda self, fresh: {"noise": lambda: torch.zeros(())})
    assert difference(images, our_images(ours, 2, 4.5)) > 1


def test_the_noise_between_steps_does_not_depend_on_the_batch(pair: Pair):
    _, ours = pair
    assert difference(our_images(ours, 4, 4.5), our_images(ours, 4, 4.5, batch=1)) <= 1
    assert torch.equal(our_images(ours, 4, 4.5), our_images(ours, 4, 4.5))


def test_options_of_the_folder(pair: Pair, folder: Path, tmp_path: Path):
    _, ours = pair
    sampling = ours.experiment["sampling"]
    assert (sampling["solver"], sampling["steps"], sampling["guidance"]) == ({"name": "scm", "middle": 1.3}, 2, 4.5)
    assert (ours.dit.spec["time_scale"], ours.dit.spec["guidance"]) == (1.0, 0.1)
    assert __main__.main(["sample", "a red circle", "--model", str(folder), "--out", str(tmp_path / "out")]) == 0
    assert [*(tmp_path / "out").glob("*.png")]


def test_export_and_import(pair: Pair, folder: Path, tmp_path: Path):
    theirs, ours = pair
    export.export(ours, tmp_path / "out")
    assert json.loads((tmp_path / "out/model_index.json").read_text())["_class_name"] == "SanaSprintPipeline"
    assert "intermediate_timesteps=1.3" in (tmp_path / "out/README.md").read_text()
    again = opened(tmp_path / "out")
    for steps in (1, 2, 4):
        assert torch.equal(diffusers_images(again, steps, 4.5), diffusers_images(theirs, steps, 4.5))
    assert __main__.main(["import", str(folder), "--out", str(tmp_path / "sprint.safetensors")]) == 0
    imported = loading.load(tmp_path / "sprint.safetensors")
    assert torch.equal(our_images(imported, 2, 4.5), our_images(ours, 2, 4.5))


def test_a_sprint_checkpoint_of_nvlabs(pair: Pair, tmp_path: Path):
    """Its DiT in place of the folder's gives the same pictures."""
    theirs, ours = pair
    torch.save({"state_dict": tiny_peers.nvlabs_state(theirs.transformer)}, tmp_path / "sprint.pth")
    dit = loading.load(tmp_path / "sprint.pth", **tiny_peers.NVLABS_HINTS, cross_norm_eps=1e-5)
    before, expected = ours.dit, our_images(ours, 2, 4.5)
    try:
        ours.dit = dit
        assert difference(our_images(ours, 2, 4.5), expected) <= 1
    finally:
        ours.dit = before


def test_pipelines_that_are_half_sprint(tmp_path: Path, folder: Path, sana_folder: Path):
    for source, name, message in (
        (folder, "SanaPipeline", "SanaPipeline whose transformer has guidance_embeds True"),
        (sana_folder, "SanaSprintPipeline", "guidance_embeds False and whose scheduler is none of Sprint"),
    ):
        copy = tmp_path / name
        copy.mkdir()
        for item in source.iterdir():
            (copy / item.name).symlink_to(item)
        (copy / "model_index.json").unlink()
        index = json.loads((source / "model_index.json").read_text())
        (copy / "model_index.json").write_text(json.dumps({**index, "_class_name": name}))
        with pytest.raises(SpecError, match=message):
            loading.load(copy)


def test_what_scm_does_not_go_with(pair: Pair):
    _, ours = pair
    with pytest.raises(ValueError, match=r"guidance_interval is .*distilled with guidance"):
        our_images(ours, 2, 4.5, guidance_interval=(0.2, 0.8))
    with pytest.raises(ValueError, match=r"solver 'scm' has times of its own, and shift 3.0 and grid 'even'"):
        our_images(ours, 2, 4.5, shift=3.0)
    with pytest.raises(SpecError, match=r"middle"):
        experiments.check_sampling({"solver": {"name": "scm", "middle": 2.0}})


def test_a_model_of_our_own_is_sampled_by_scm():
    """Any flow model can be: x - t v is its prediction of the data."""
    system = tiny.text2image().eval()
    images = system.sample(["a ring"], size=16, sampling=Sampling("scm", 4, 3.0))
    assert images.shape == (1, 3, 16, 16)
