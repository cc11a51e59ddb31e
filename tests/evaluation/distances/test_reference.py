"""Reference statistics: made, written, read again, and refused where they are of something else."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sana_lab.config.specs import SpecError
from sana_lab.evaluation.distances import reference
from sana_lab.evaluation.extractors.function import Function


def colours(pictures: torch.Tensor) -> torch.Tensor:
    return pictures.float().flatten(2).std(2)


def broken(pictures: torch.Tensor) -> torch.Tensor:
    found = colours(pictures)
    found[pictures[:, 0, 0, 0] > 250] = float("nan")
    return found


EXTRACTOR = Function(f"{__name__}:colours")


def images(count: int = 20, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 250, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)


def test_holds_what_was_seen():
    found = reference.compute([images()[:7], images()[7:]], EXTRACTOR, features=True, batch=4)
    features = colours(images())
    np.testing.assert_allclose(found.gaussian.covariance, np.cov(features.double(), rowvar=False), rtol=1e-9)
    np.testing.assert_allclose(found.gaussian.mean, features.double().mean(0), rtol=1e-12)
    torch.testing.assert_close(found.features, features)
    assert found.record["n"] == 20
    assert found.record["extractor"] == EXTRACTOR.identity()
    assert {"torch", "transformers"} <= found.record["versions"].keys()


def test_comes_back_whole(tmp_path):
    made = reference.compute([images()], EXTRACTOR, features=True)
    reference.save(made, tmp_path / "a.safetensors")
    found = reference.load(tmp_path / "a.safetensors", EXTRACTOR)
    assert torch.equal(found.gaussian.covariance, made.gaussian.covariance)
    assert torch.equal(found.features, made.features)
    assert found.record == made.record
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_features_are_left_out_unless_asked_for(tmp_path):
    reference.save(reference.compute([images()], EXTRACTOR), tmp_path / "a.safetensors")
    assert reference.load(tmp_path / "a.safetensors").features is None


def test_the_hash_is_of_the_images_and_not_of_their_order():
    def sha256(*batches: torch.Tensor) -> str:
        return reference.compute(batches, EXTRACTOR).record["images_sha256"]

    other = images().clone()
    other[3, 1, 2, 5] += 1
    assert sha256(images()) == sha256(images()[10:], images()[:10])
    assert sha256(images()) != sha256(other)
    assert sha256(images()) != sha256(images(), images()[:1])


def test_another_extractor_is_refused_by_what_differs(tmp_path):
    reference.save(reference.compute([images()], EXTRACTOR), tmp_path / "a.safetensors")
    with pytest.raises(SpecError, match=r"another extractor: version is '', expected '2'$"):
        reference.load(tmp_path / "a.safetensors", Function(f"{__name__}:colours", version="2"))
    with pytest.raises(SpecError, match=r"extractor is 'colours', expected 'broken'; function is"):
        reference.load(tmp_path / "a.safetensors", Function(f"{__name__}:broken"))


def test_other_files_are_refused(tmp_path):
    with pytest.raises(SpecError, match=r"no file of reference statistics .*sana-lab stats"):
        reference.load(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes(b"PK")
    with pytest.raises(SpecError, match="truncated or holds no reference statistics"):
        reference.load(tmp_path / "a.safetensors")
    save_file({"weight": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(SpecError, match="truncated or holds no reference statistics"):
        reference.load(tmp_path / "a.safetensors")
    tensors = {"mean": torch.zeros(2), "covariance": torch.eye(2)}
    save_file(tensors, tmp_path / "a.safetensors", {"record": json.dumps({"format": 9})})
    with pytest.raises(SpecError, match="format 9, expected 1"):
        reference.load(tmp_path / "a.safetensors")


def test_features_that_are_not_finite_are_named():
    pictures = images()
    pictures[13, 0, 0, 0] = 255
    with pytest.raises(ValueError, match=r"features of image 13 \(from 0\) are not finite"):
        reference.compute([pictures], Function(f"{__name__}:broken"), batch=6)


def test_too_few():
    with pytest.raises(ValueError, match="at least two images; given 1"):
        reference.compute([images(1)], EXTRACTOR)
