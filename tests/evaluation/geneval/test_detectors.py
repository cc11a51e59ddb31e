"""Detectors: Mask2Former's scores against transformers' own, boxes against masks, OWLv2 against its post-processing."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_folders
import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
)

from sana_lab.config import specs
from sana_lab.config.specs import SpecError
from sana_lab.evaluation import transformers_models
from sana_lab.evaluation.geneval import color
from sana_lab.evaluation.geneval.detectors import mask2former
from sana_lab.evaluation.geneval.detectors.mask2former import Mask2Former, box, instances
from sana_lab.evaluation.geneval.detectors.owlv2 import Owlv2, corners, iou, non_maximum_suppression
from sana_lab.evaluation.geneval.prompts import coco_classes
from sana_lab.shapes.detector import ShapesDetector
from sana_lab.shapes.scenes import COLORS
from sana_lab.types import Object

COCO = [{v: k for k, v in mask2former.RENAMED.items()}.get(name, name) for name in coco_classes()]


@pytest.fixture(scope="module")
def image() -> Tensor:
    coarse = torch.rand(1, 3, 6, 8, generator=torch.Generator().manual_seed(4))
    smooth = torch.nn.functional.interpolate(coarse, (96, 128), mode="bicubic").clamp(0, 1)
    return (smooth[0] * 255).to(torch.uint8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    home = tmp_path_factory.mktemp("models")
    return {
        "mask2former": tiny_folders.mask2former(home / "mask2former", COCO),
        "owlv2": tiny_folders.owlv2(home / "owlv2"),
        "clip": tiny_folders.clip(home / "clip"),
    }


class TestMask2Former:
    def test_scores_and_labels_are_transformers_own_at_its_size(self, tmp_path: Path) -> None:
        """At 384 pixels, where both measure masks alike: transformers rounds scores to six digits."""
        folder = tiny_folders.mask2former(tmp_path, COCO, side=384)
        picture = torch.randint(0, 256, (3, 384, 384), dtype=torch.uint8)
        processor = Mask2FormerImageProcessor.from_pretrained(folder)
        network = Mask2FormerForUniversalSegmentation.from_pretrained(folder).eval()
        with torch.no_grad():
            outputs = network(**processor([picture], return_tensors="pt"))
        theirs = processor.post_process_instance_segmentation(
            outputs, threshold=0.0, target_sizes=[(384, 384)], return_binary_maps=True
        )[0]
        info = sorted(theirs["segments_info"], key=lambda s: -s["score"])
        ours = Mask2Former(folder, threshold=0.0, counting_threshold=0.0)
        found = ours.detect(picture)
        assert len(found) == len(info) == 10
        assert [o.score for o in found] == pytest.approx([s["score"] for s in info], abs=2e-6)
        assert len({o.label for o in found}) > 1
        assert [o.label for o in found] == [ours.labels[s["label_id"]] for s in info]
        masks = theirs["segmentation"][[theirs["segments_info"].index(s) for s in info]]
        assert torch.equal(torch.stack([o.mask for o in found]), masks.bool())

    def test_masks_and_boxes_have_the_size_of_the_picture(self, folders: dict[str, str], image: Tensor) -> None:
        found = Mask2Former(folders["mask2former"], threshold=0.01).detect(image)
        assert found
        for thing in found:
            assert thing.mask is not None
            assert thing.mask.shape == (96, 128)
            ys, xs = np.nonzero(thing.mask.numpy())
            assert thing.box == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
            assert thing.label in coco_classes()

    def test_it_speaks_of_genevals_classes(self, folders: dict[str, str]) -> None:
        detector = Mask2Former(folders["mask2former"])
        assert list(detector.labels) == coco_classes()
        assert (detector.threshold_for({"tag": "colors"}), detector.threshold_for({"tag": "counting"})) == (0.3, 0.9)

    def test_older_spellings_are_known(self) -> None:
        assert {mask2former.RENAMED.get(n, n) for n in ("mouse", "sofa", "tvmonitor", "dog")} == {
            "computer mouse",
            "couch",
            "tv",
            "dog",
        }

    def test_mmdets_size(self, folders: dict[str, str], image: Tensor) -> None:
        detector = Mask2Former(folders["mask2former"], size="mmdet", threshold=0.0)
        assert detector.identity()["preprocessing"]["size"] == mask2former.MMDET
        assert detector.detect(image[:, :20, :20])[0].mask.shape == (20, 20)

    def test_identity(self, folders: dict[str, str]) -> None:
        facts = Mask2Former(folders["mask2former"]).identity()
        assert json.loads(json.dumps(facts)) == facts
        assert facts["weights_sha256"] == transformers_models.weights_sha256(folders["mask2former"])

    def test_the_rule(self) -> None:
        """Two queries, two classes: one query comes twice, an empty mask never, and nothing that is below `least`."""
        masks = torch.full((3, 4, 4), -9.0)
        masks[0, :2, :2], masks[1, 1:3, 2:] = 2.0, 9.0
        classes = torch.tensor([[3.0, 2.5, 0.0], [0.0, 9.0, 0.0], [9.0, 0.0, 0.0]])
        held, scores, labels = instances(classes, masks, ((4, 4), (4, 4)), 0.2)
        chances = classes.softmax(-1)
        sure = torch.tensor(2.0).sigmoid()
        assert labels.tolist() == [1, 0]
        assert scores.tolist() == pytest.approx([float(chances[1, 1]), float(chances[0, 0] * sure)], abs=1e-3)
        assert box(held[0]) == (2, 1, 4, 3)
        assert instances(classes, masks, ((4, 4), (8, 8)), 0.2)[0].shape == (2, 8, 8)
        assert len(instances(classes, masks, ((4, 4), (4, 4)), 0.99)[0]) == 1
        assert instances(classes, masks, ((4, 4), (4, 4)), 1.0)[0].shape == (0, 4, 4)

    def test_pruning_by_chance_loses_nothing(self) -> None:
        generator = torch.Generator().manual_seed(0)
        classes = 3 * torch.randn(20, 6, generator=generator)
        masks = 3 * torch.randn(20, 8, 8, generator=generator)
        all_of_them = instances(classes, masks, ((16, 16), (32, 24)), 0.0)
        some = instances(classes, masks, ((16, 16), (32, 24)), 0.4)
        n = int((all_of_them[1] > 0.4).sum())
        assert 0 < n < len(all_of_them[1])
        for a, b in zip(all_of_them, some, strict=True):
            assert torch.equal(a[:n], b)


class TestOwlv2:
    def test_boxes_are_transformers_own(self, folders: dict[str, str], image: Tensor) -> None:
        """Before any is dropped for overlap; a box may reach beyond the picture in transformers."""
        names = ["dog", "red circle", "cat"]
        ours = Owlv2(folders["owlv2"], threshold=0.0, counting_threshold=0.0, overlap=1.0, labels=names)
        found = ours.detect(image)
        network = Owlv2ForObjectDetection.from_pretrained(folders["owlv2"]).eval()
        processor = Owlv2ImageProcessor.from_pretrained(folders["owlv2"])
        tokens = AutoTokenizer.from_pretrained(folders["owlv2"])(
            [f"a photo of a {name}" for name in names], padding="max_length", max_length=16, return_tensors="pt"
        )
        with torch.no_grad():
            outputs = network(
                tokens["input_ids"],
                processor([image], return_tensors="pt")["pixel_values"],
                attention_mask=tokens["attention_mask"],
            )
        theirs = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[(96, 128)])[0]
        order = theirs["scores"].argsort(descending=True)
        assert [o.score for o in found] == pytest.approx(theirs["scores"][order].tolist(), abs=1e-5)
        assert len({o.label for o in found}) > 1
        assert [o.label for o in found] == [names[i] for i in theirs["labels"][order]]
        inside = theirs["boxes"][order].clamp(min=0).minimum(torch.tensor([128.0, 96.0, 128.0, 96.0]))
        assert torch.allclose(torch.tensor([o.box for o in found]), inside, atol=1e-3)
        assert {o.mask for o in found} == {None}

    def test_it_looks_for_genevals_classes(self, folders: dict[str, str]) -> None:
        detector = Owlv2(folders["owlv2"])
        assert detector.labels == coco_classes()
        facts = detector.identity()
        assert json.loads(json.dumps(facts)) == facts

    def test_one_box_for_one_thing(self) -> None:
        boxes = torch.tensor([[0, 0, 10, 10], [1, 0, 10, 10], [0, 0, 10, 10], [20, 0, 30, 10], [0, 0, 0, 0.0]])
        labels = torch.tensor([0, 0, 1, 0, 0])
        assert non_maximum_suppression(boxes, labels, 0.5).tolist() == [0, 2, 3, 4]
        assert non_maximum_suppression(boxes, labels, 0.95).tolist() == [0, 1, 2, 3, 4]
        assert non_maximum_suppression(boxes[:0], labels[:0], 0.5).tolist() == []
        assert iou(boxes)[0].tolist() == pytest.approx([1, 0.9, 1, 0, 0])

    def test_corners_of_a_padded_square(self) -> None:
        found = corners(torch.tensor([[0.25, 0.25, 0.1, 0.2], [0.5, 0.9, 1.0, 1.0]]), 50, 100)
        assert found.tolist() == [pytest.approx([20, 15, 30, 35]), pytest.approx([0, 40, 100, 50])]


class TestColor:
    def test_the_crop_is_grey_outside_of_the_mask(self) -> None:
        image = torch.randint(0, 256, (3, 10, 12), dtype=torch.uint8)
        mask = torch.zeros(10, 12, dtype=torch.bool)
        mask[2:6, 3:9] = True
        mask[2, 3] = False
        cut = color.crop(image, Object("dog", (3, 2, 9, 6), mask=mask))
        assert cut.shape == (3, 4, 6)
        assert cut[:, 0, 0].tolist() == [0x99] * 3
        assert torch.equal(cut[:, 1:], image[:, 3:6, 3:9])
        assert torch.equal(color.crop(image, Object("dog", (2.6, 1.6, 9.4, 6.2))), image[:, 2:6, 3:9])
        assert color.crop(image, Object("dog", (20, -3, 30, -1))).shape == (3, 1, 1)

    def test_names_are_the_nearest_texts(self, folders: dict[str, str], image: Tensor) -> None:
        colors = color.ClipColors(folders["clip"])
        things = [
            Object("dog", (0, 0, 60, 60), 0.9),
            Object("cat", (40, 10, 128, 96), 0.8),
            Object("dog", (9, 9, 20, 30)),
        ]
        found = colors.classify(image, things)
        assert [o._replace(color=None) for o in found] == things
        for thing in found:
            texts = [
                torch.stack(
                    [
                        colors.clip.text_features([f"a photo of a {c} {thing.label}"])[0],
                        colors.clip.text_features([f"a photo of a {c}-colored {thing.label}"])[0],
                        colors.clip.text_features([f"a photo of a {c} object"])[0],
                    ]
                ).mean(0)
                for c in COLORS
            ]
            picture = colors.clip.image_features([color.crop(image, thing)])[0]
            cosines = torch.stack([torch.cosine_similarity(picture, text, 0) for text in texts])
            assert thing.color == COLORS[int(cosines.argmax())]
        assert colors.classify(image, []) == []


@pytest.mark.parametrize("kind", [Mask2Former, Owlv2])
def test_a_wrong_folder_is_told(kind: type, folders: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="holds a clip model, expected a"):
        kind(folders["clip"])
    with pytest.raises(SpecError, match="there is no folder"):
        kind(str(tmp_path / "nothing"))


def test_shards_have_one_hash(tmp_path: Path) -> None:
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "pytorch_model.bin"):
        (tmp_path / name).write_text(name)
    sharded = transformers_models.weights_sha256(str(tmp_path))
    (tmp_path / "model-00002-of-00002.safetensors").write_text("other")
    assert transformers_models.weights_sha256(str(tmp_path)) != sharded


@pytest.mark.parametrize("kind", [Mask2Former, Owlv2, ShapesDetector])
def test_options_are_plain(kind: type) -> None:
    assert all(option.annotation is not None for option in specs.options("detector", kind).values())
