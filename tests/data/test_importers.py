"""Published layouts become a manifest that `data: folder` reads."""

import json
from pathlib import Path

import pytest
from PIL import Image

from sana_lab.data import captions, importers
from sana_lab.data.folder import Folder


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(path)


@pytest.fixture
def mjhq(tmp_path: Path) -> Path:
    table = {
        "0a": {"category": "animals", "prompt": "a cat, asleep"},
        "0b": {"category": "art", "prompt": "a blue vase"},
    }
    (tmp_path / "meta_data.json").write_text(json.dumps(table))
    for name, said in table.items():
        picture(tmp_path / said["category"] / f"{name}.jpg")
    return tmp_path


@pytest.fixture
def coco(tmp_path: Path) -> tuple[Path, Path]:
    table = {
        "images": [{"id": 7, "file_name": "7.jpg"}, {"id": 9, "file_name": "9.jpg"}],
        "annotations": [
            {"id": 1, "image_id": 9, "caption": "A dog.\n"},
            {"id": 2, "image_id": 7, "caption": "A car"},
            {"id": 3, "image_id": 9, "caption": "One dog."},
        ],
    }
    (tmp_path / "captions_val.json").write_text(json.dumps(table))
    for row in table["images"]:
        picture(tmp_path / "val" / row["file_name"])
    return tmp_path / "captions_val.json", tmp_path / "val"


class TestMjhq:
    def test_becomes_a_folders_manifest(self, mjhq):
        manifest = importers.mjhq(mjhq)
        expected = [("animals/0a.jpg", ("a cat, asleep",)), ("art/0b.jpg", ("a blue vase",))]
        assert [e[:2] for e in captions.entries(mjhq, str(manifest))] == expected
        assert json.loads(manifest.read_text().splitlines()[0])["category"] == "animals"
        data = Folder(str(mjhq), size=8, held_out=1)
        data.setup()
        assert (data.len_train, data.len_val) == (1, 1)

    def test_pictures_may_lie_in_the_archives_own_folder(self, mjhq):
        (mjhq / importers.MJHQ_IMAGES).mkdir()
        for category in ("animals", "art"):
            (mjhq / category).rename(mjhq / importers.MJHQ_IMAGES / category)
        assert captions.entries(mjhq, str(importers.mjhq(mjhq)))[0].name == "mjhq30k_imgs/animals/0a.jpg"

    def test_missing_pictures_are_named(self, mjhq):
        (mjhq / "art" / "0b.jpg").unlink()
        with pytest.raises(ValueError, match=r"1 of 2 images are not in .*'art/0b.jpg'"):
            importers.mjhq(mjhq)
        assert not (mjhq / importers.MANIFEST).exists()
        with pytest.warns(UserWarning, match="'art/0b.jpg'; they are left out"):
            manifest = importers.mjhq(mjhq, absent=0.5)
        assert len(manifest.read_text().splitlines()) == 1

    def test_a_table_of_another_program_and_a_caption_that_is_no_unicode(self, mjhq):
        table = json.loads((mjhq / "meta_data.json").read_text())
        table["0a"]["prompt"] = "a cat \ud83d"
        (mjhq / "meta_data.json").write_bytes(json.dumps(table).encode("utf-16"))
        manifest = importers.mjhq(mjhq)
        with pytest.warns(UserWarning, match=r"captions.jsonl:1: 'a cat .*surrogate"):
            assert [e.name for e in captions.entries(mjhq, str(manifest))] == ["art/0b.jpg"]

    def test_other_tables(self, mjhq, tmp_path):
        (mjhq / "meta_data.json").rename(mjhq / "meta-data.json")
        with pytest.raises(ValueError, match=r"no file .*meta_data.json'; did you mean 'meta-data.json'"):
            importers.mjhq(mjhq)
        for text, told in (("{", "is no JSON"), ("[]", "holds list"), ('{"a": 1}', "has 1 for 'a'"), ("{}", "nothing")):
            (mjhq / "meta_data.json").write_text(text)
            with pytest.raises(ValueError, match=told):
                importers.mjhq(mjhq)


class TestCoco:
    def test_becomes_a_folders_manifest_with_all_captions(self, coco):
        manifest = importers.coco(*coco)
        expected = [("7.jpg", ("A car",)), ("9.jpg", ("A dog.", "One dog."))]
        assert [e[:2] for e in captions.entries(coco[1], str(manifest))] == expected

    def test_the_manifest_may_lie_elsewhere(self, coco, tmp_path):
        assert importers.coco(*coco, tmp_path / "coco.jsonl") == tmp_path / "coco.jsonl"

    def test_a_caption_that_is_no_text(self, coco):
        table = json.loads(coco[0].read_text())
        table["annotations"][0]["caption"] = None
        coco[0].write_text(json.dumps(table))
        with pytest.raises(ValueError, match="expected a caption that is text"):
            importers.coco(*coco)

    def test_what_is_missing(self, coco, tmp_path):
        with pytest.raises(ValueError, match=r"no folder .*nowhere"):
            importers.coco(coco[0], tmp_path / "nowhere")
        with pytest.raises(ValueError, match=r"no file .*captions_train.json"):
            importers.coco(tmp_path / "captions_train.json", coco[1])
        table = json.loads(coco[0].read_text())
        coco[0].write_text(json.dumps({**table, "annotations": table["annotations"][1:2]}))
        with pytest.raises(ValueError, match=r"no caption of '9.jpg' \(1 of 2\)"):
            importers.coco(*coco)
        coco[0].write_text(json.dumps({"images": table["images"]}))
        with pytest.raises(ValueError, match="no list 'annotations' of image_id and caption"):
            importers.coco(*coco)
