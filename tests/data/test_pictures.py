"""`data: pictures`: the same pictures from a folder, tars and tables; what cannot be used is named and counted."""

import io
import itertools
import json
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tiny_pictures
import torch
from PIL import Image

from sana_lab.config.specs import SpecError
from sana_lab.data import picture_index
from sana_lab.data.files import Files
from sana_lab.data.layouts import detect
from sana_lab.data.pictures import Pictures
from sana_lab.types import Part

NUMBERS = range(30)


@pytest.fixture
def make(tmp_path):
    def make(root: Path, **options) -> Pictures:
        given = {"size": 32, "batch": 4, "held_out": 6, "index": str(tmp_path / "index"), **options}
        return Pictures(str(root), **given)

    return make


def numbers(data: Pictures) -> list[int]:
    """The number of each picture of the index, by its first pixel."""
    return [int(np.asarray(data.picture(row))[0, 0, 0]) for row in range(data.table.meta["rows"])]


def captions(data: Pictures) -> list[list[str]]:
    ends = [0, *data.table["row_captions_end"].tolist()]
    return [data.texts(range(a, b)) for a, b in itertools.pairwise(ends)]


def parquet(path: Path, rows: list[dict], **options) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


def arrow(path: Path, rows: list[dict], stream: bool = True) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    opened = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with opened(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return path


@contextmanager
def bytes_read() -> Iterator[list[int]]:
    """A list that holds, after the block, how many bytes this process has read in it."""

    def total() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    counted, before = list[int](), total()
    yield counted
    counted.append(total() - before)


def rows_of(numbers) -> list[dict]:
    """Rows as Hugging Face's datasets have them."""
    return [
        {"image": {"bytes": tiny_pictures.picture(n), "path": f"{n}.png"}, **tiny_pictures.said(n)} for n in numbers
    ]


class TestLayouts:
    def test_the_same_pictures_from_each(self, make, tmp_path):
        rows = rows_of(NUMBERS)
        parquet(tmp_path / "parquet" / "data" / "train-00000-of-00001.parquet", rows, row_group_size=8)
        arrow(tmp_path / "stream" / "data-00000-of-00001.arrow", rows)
        arrow(tmp_path / "file" / "data.arrow", rows, stream=False)
        roots = {"folder": tiny_pictures.folder(tmp_path / "folder", NUMBERS)}
        roots |= {"tars": tiny_pictures.tars(tmp_path / "tars", NUMBERS)}
        for root, layout in [
            *((p, n) for n, p in roots.items()),
            *((tmp_path / n, "tables") for n in ("parquet", "stream", "file")),
        ]:
            assert detect.layout_of(root) == layout
            data = make(root)
            assert numbers(data) == list(NUMBERS), root
            assert captions(data) == [tiny_pictures.said(n)["captions"] for n in NUMBERS]
            assert data.table["score"].tolist() == [20.0, 30.0] * 30
            assert (data.len_train, data.len_val) == (24, 6)

    def test_a_parquet_manifest_beside_pictures(self, make, tmp_path):
        root = tiny_pictures.folder(tmp_path / "pictures", range(8))
        (root / "captions.jsonl").unlink()
        parquet(root / "list.parquet", [{"file_name": f"{n:05}.png", "caption": f"a {n}"} for n in range(8)])
        assert captions(make(root / "list.parquet")) == [[f"a {n}"] for n in range(8)]
        with pytest.raises(ValueError, match=r"8 of 8 images have no caption.*is 'list.parquet' the manifest\?"):
            make(root).setup()

    def test_two_manifests_of_one_folder(self, make, tmp_path, monkeypatch):
        """Each has its index, also one elsewhere; a file of the same name in the working directory is another."""
        root = tiny_pictures.folder(tmp_path / "pictures", range(8))
        (root / "captions.jsonl").unlink()
        (tmp_path / "elsewhere").mkdir()
        paths = [root / "a.jsonl", root / "b.jsonl", tmp_path / "elsewhere" / "a.jsonl"]
        for path, word in zip(paths, ("one", "two", "three"), strict=True):
            rows = [{"file_name": f"{n:05}.png", "caption": f"{word} {n}"} for n in range(8)]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        monkeypatch.chdir(tmp_path / "elsewhere")
        third = {"name": "folder", "manifest": str(paths[2])}
        sets = [make(paths[0]), make(paths[1]), make(root, layout=third)]
        words = [captions(data)[3] for data in sets]
        assert words == [["one 3"], ["two 3"], ["three 3"]]
        assert len({data.digest() for data in sets}) == 3

    def test_mjhq(self, make, tmp_path):
        for n in range(4):
            path = tmp_path / "mjhq" / "mjhq30k_imgs" / "art" / f"{n}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40)).save(path)
        table = {str(n): {"category": "art", "prompt": f"art {n}"} for n in range(4)}
        (tmp_path / "mjhq" / "meta_data.json").write_text(json.dumps(table))
        assert detect.layout_of(tmp_path / "mjhq") == "mjhq"
        assert captions(make(tmp_path / "mjhq", held_out=1)) == [[f"art {n}"] for n in range(4)]

    def test_pd12m(self, make, tmp_path):
        """Pictures called after the id or after the address; rows that were not downloaded are left out."""
        root = tmp_path / "pd12m"
        rows = [
            {"id": f"id{n}", "url": f"https://host/{n:05}.png", "caption": f"picture {n}", "width": 9} for n in range(6)
        ]
        parquet(root / "metadata" / "pd12m.000.parquet", rows)
        (root / "images" / "00").mkdir(parents=True)
        for n, name in ((0, "id0"), (1, "00001"), (2, "00002"), (3, "id3")):
            (root / "images" / "00" / f"{name}.png").write_bytes(tiny_pictures.picture(n))
        assert detect.layout_of(root) == "pd12m"
        with pytest.raises(ValueError, match=r"2 of 6 pictures cannot be used: .*pd12m.000.parquet:5.*is missing"):
            make(root, held_out=1).setup()
        data = make(root, held_out=1, unreadable=0.5)
        assert (numbers(data), captions(data)[3]) == ([0, 1, 2, 3], ["picture 3"])

    def test_splits_of_a_hub_dataset_are_in_the_names_of_its_files(self, make, tmp_path):
        parquet(tmp_path / "hub" / "train-00000-of-00001.parquet", rows_of(range(8)))
        parquet(tmp_path / "hub" / "test-00000-of-00001.parquet", rows_of(range(8, 11)))
        data = make(tmp_path / "hub", held_out=0)
        assert sorted(numbers(data)[row] for row in data.selection("val").rows) == [8, 9, 10]

    def test_splits_of_tars_are_in_the_names_of_their_folders(self, make, tmp_path):
        for name, group in (("train", range(8)), ("val", range(8, 11))):
            tiny_pictures.tars(tmp_path / "tars" / name, group)
        data = make(tmp_path / "tars", held_out=0)
        assert sorted(numbers(data)[row] for row in data.selection("val").rows) == [8, 9, 10]

    def test_files_that_datasets_computed_are_no_pictures(self, make, tmp_path):
        arrow(tmp_path / "saved" / "data-00000-of-00001.arrow", rows_of(range(8)))
        arrow(tmp_path / "saved" / "cache-1b2c3d.arrow", rows_of(range(8)))
        assert numbers(make(tmp_path / "saved")) == [*range(8)]

    def test_a_table_gives_its_name_to_its_pictures(self, make, tmp_path):
        data = make(parquet(tmp_path / "one.parquet", rows_of(range(8))))
        assert data.name_of(2) == "one.parquet:3"

    @pytest.mark.skipif(not Path("/proc/self/io").is_file(), reason="needs Linux's count of bytes that are read")
    @pytest.mark.parametrize("write", [parquet, arrow])
    def test_each_group_of_rows_is_read_once(self, make, tmp_path, write):
        """To write the index, and again to read all pictures in order."""
        file = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)).save(file, "PNG")
        rows = [{"image": {"bytes": file.getvalue()}, "caption": f"{n}" * (n + 1)} for n in range(14)]
        options = {"row_group_size": 7, "use_dictionary": False, "compression": "none"} if write is parquet else {}
        path = write(tmp_path / "t" / f"noise.{write.__name__}", rows, **options)
        size = path.stat().st_size
        assert size > 14 * 512 * 512 * 3
        data = make(path)
        with bytes_read() as counted:
            data.setup()
        assert counted[0] <= (1.1 * size if write is parquet else 1e6)  # Arrow's is mapped into memory
        with bytes_read() as counted:
            for row in range(14):
                data.picture(row)
        assert counted[0] <= (1.1 * size if write is parquet else 1e6)

    def test_pictures_of_one_stem(self, make, tmp_path):
        """Which one a row means is unknown; both are named. A row may have an id alone."""
        root = tmp_path / "pd12m"
        parquet(root / "a.parquet", [{"id": f"id{n}", "url": None, "caption": f"picture {n}"} for n in range(4)])
        for folder, group in (("x", range(4)), ("y", [2])):
            (root / folder).mkdir()
            for n in group:
                (root / folder / f"id{n}.png").write_bytes(tiny_pictures.picture(n))
        data = make(root, held_out=1, unreadable=0.5, layout="pd12m")
        assert numbers(data) == [0, 1, 3]
        assert "'a.parquet:3' (both x/id2.png and y/id2.png are called so)" in data.table.meta["examples"]

    def test_what_is_no_layout(self, make, tmp_path):
        with pytest.raises(SpecError, match=r"there is no .*nowhere"):
            make(tmp_path / "nowhere").setup()
        parquet(tmp_path / "bare.parquet", [{"text": "a cat"}])
        with pytest.raises(ValueError, match=r"bare.parquet has no column with pictures; it has text"):
            make(tmp_path / "bare.parquet", layout="tables").setup()


class TestFaults:
    def test_a_truncated_tar_is_named_and_what_is_before_its_end_is_used(self, make, tmp_path, capsys):
        root = tiny_pictures.tars(tmp_path / "tars", NUMBERS)
        path = root / "00001.tar"
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(ValueError, match=r"1 of 3 files cannot be read to their end: '00001.tar'"):
            make(root).setup()
        data = make(root, unreadable=0.4)
        data.setup()
        assert "00001.tar" in capsys.readouterr().err
        assert "00001.tar" in data.table.meta["examples"]
        kept = numbers(data)
        assert kept[:12] == list(range(12))
        assert kept[-6:] == list(range(24, 30))
        assert 18 < len(kept) < 30

    def test_a_damaged_tar_counts_as_a_file(self, make, tmp_path):
        """One of twelve pictures is in a damaged tar, the last of it: a share of files, as what it held is unknown."""
        root = tiny_pictures.tars(tmp_path / "tars", NUMBERS)
        path = root / "00002.tar"
        path.write_bytes(path.read_bytes()[:-8000])
        with pytest.raises(ValueError, match=r"1 of 3 files cannot be read to their end: '00002.tar' \(.*most a share"):
            make(root, unreadable=0.3).setup()
        make(root, unreadable=0.34).setup()

    def test_malformed_samples_are_named(self, make, tmp_path):
        good = [(f"{n:05}", {"png": tiny_pictures.picture(n), "txt": b"one\ntwo\n"}) for n in range(6)]
        bad = {"json": {"png": tiny_pictures.picture(7), "json": b"{"}, "bare": {"png": tiny_pictures.picture(7)}}
        bad |= {"broken": {"png": b"no picture", "txt": b"a"}, "empty": {"txt": b"a"}}
        tiny_pictures.tar(tmp_path / "tars" / "a.tar", [*good, *bad.items()])
        data = make(tmp_path / "tars", held_out=1, unreadable=0.5)
        assert captions(data) == [["one", "two"]] * 6
        reasons = dict(line.split(": ", 1) for line in (data.table.folder / "skipped.txt").read_text().splitlines())
        assert reasons["a.tar/bare"] == "no caption"
        assert "not an image" in reasons["a.tar/broken"]
        assert "no picture" in reasons["a.tar/empty"]
        assert "Expecting property name" in reasons["a.tar/json"]
        with pytest.raises(ValueError, match="4 of 10 pictures cannot be used"):
            make(tmp_path / "tars", held_out=1, unreadable=0.3).setup()

    def test_what_a_manifest_does_not_name_is_no_fault(self, make, tmp_path, capsys):
        root = tiny_pictures.folder(tmp_path / "pictures", range(8))
        lines = (root / "captions.jsonl").read_text().splitlines()
        (root / "captions.jsonl").write_text("\n".join(lines[:6]))
        data = make(root, held_out=1, unreadable=0.0)
        data.setup()
        assert data.len_train + data.len_val == 6
        assert "left out 2: '00006.png' (no row in captions.jsonl)" in capsys.readouterr().err
        assert "00007.png: no row" in (data.table.folder / "skipped.txt").read_text()

    @pytest.mark.parametrize("rule", ["softmax", "power"])
    def test_a_choice_by_scores_that_are_missing(self, make, tmp_path, rule):
        root = tiny_pictures.folder(tmp_path / "pictures", range(8), clip_scores=lambda n: None)
        with pytest.raises(SpecError, match=f"choice.rule is '{rule}', and no caption has a score"):
            make(root, choice={"rule": rule}).setup()
        with pytest.raises(SpecError, match=r"choice.min_score is 25, and no caption has a score; expected 0"):
            make(root, choice={"rule": "uniform", "min_score": 25.0}).setup()
        make(root, choice={"rule": "uniform"}).setup()

    def test_a_compressed_tar(self, make, tmp_path):
        (tmp_path / "tars").mkdir()
        (tmp_path / "tars" / "a.tar.gz").write_bytes(b"")
        with pytest.raises(ValueError, match=r"no .tar below .*'a.tar.gz' is compressed"):
            make(tmp_path / "tars", layout="tars").setup()

    def test_a_truncated_table(self, make, tmp_path):
        parquet(tmp_path / "p" / "a.parquet", rows_of(range(9)))
        whole = parquet(tmp_path / "p" / "b.parquet", rows_of(range(9)))
        whole.write_bytes(whole.read_bytes()[:500])
        with pytest.raises(ValueError, match=r"b.parquet.* is no readable .parquet"):
            make(tmp_path / "p", layout="tables").setup()

    def test_a_picture_that_breaks_later_is_named_and_the_next_of_its_bucket_takes_its_place(
        self, make, tmp_path, capsys
    ):
        root = tiny_pictures.folder(tmp_path / "pictures", NUMBERS)
        data = make(root, buckets="sana", multiple=8, unreadable=0.1)
        whole = [data.train_batch(n) for n in range(14)]  # two epochs
        row = int(data.selection("train").rows[0])
        (root / data.name_of(row)).write_bytes(b"no picture")
        batches = [data.train_batch(n) for n in range(14)]
        assert "1 of 30 so far; the next picture takes its place" in capsys.readouterr().err
        assert [b.images.shape for b in batches] == [b.images.shape for b in whole]
        assert not any(f"a picture {row}" in b.prompts for b in batches)
        for n in range(12):
            (root / f"{n:05}.png").write_bytes(b"")
        with pytest.raises(ValueError, match=r"4 of 30 so far; at most a share `unreadable` of 0.1"):
            [data.train_batch(n) for n in range(14)]

    def test_the_only_picture_of_a_bucket_breaks(self, make, tmp_path):
        """One of another bucket takes its place; where none can be read, that is said."""
        root = tiny_pictures.folder(tmp_path / "pictures", [0, 1, 4, 8])
        data = make(root, buckets="sana", multiple=8, held_out=0, unreadable=1.0)
        data.setup()
        row = next(row for row in range(4) if data.name_of(row) == "00001.png")
        shape = data.shapes[int(data.buckets_of[row])]
        (root / "00001.png").write_bytes(b"no picture")
        used, view = data.readable(row, 0, "train", shape)
        assert (used != row, view.shape) == (True, (3, *shape))
        for path in root.glob("*.png"):
            path.write_bytes(b"")
        with pytest.raises(ValueError, match=r"no picture of train in .* can be read"):
            data.readable(row, 0, "train", shape)


class TestIndex:
    def test_is_written_again_when_the_content_changes(self, make, tmp_path):
        root = tiny_pictures.tars(tmp_path / "tars", range(12))
        first = make(root)
        written = first.table.folder
        assert make(root).table.folder == written
        tiny_pictures.tars(root, range(20))
        assert make(root).table.folder != written
        assert make(root).digest() != first.digest()

    def test_serves_without_the_pictures(self, make, tmp_path):
        root = tiny_pictures.tars(tmp_path / "tars", range(12))
        digest = make(root).digest()
        root.rename(tmp_path / "elsewhere")
        assert make(root).digest() == digest == make(tmp_path / "elsewhere").digest()

    def test_of_many_pictures_is_opened_without_a_look_at_each(self, make, tmp_path, monkeypatch):
        """By the manifest and the folders; what was overwritten in place counts once its folder is touched."""
        monkeypatch.setattr(picture_index, "MANY", 12)
        root = tiny_pictures.folder(tmp_path / "pictures", range(12))
        (root / "more").mkdir()
        (tmp_path / "linked").mkdir()
        (root / "link").symlink_to(tmp_path / "linked")
        first = make(root)
        written, digest = first.table.folder, first.digest()
        with monkeypatch.context() as patch:
            patch.setattr(Files, "_walk", lambda files: pytest.fail("the files were listed"))
            patch.setattr(detect, "below", lambda *_: pytest.fail("the files were listed"))
            patch.setattr(detect, "tables_below", lambda *_: pytest.fail("the files were listed"))
            again = pickle.loads(pickle.dumps(make(root)))
            assert (again.table.folder, again.digest()) == (written, digest)
            assert numbers(again) == [*range(12)]
        (root / "00000.png").write_bytes(tiny_pictures.picture(4))
        assert make(root).table.folder == written
        os.utime(root)
        assert make(root).table.folder != written
        for folder in (root / "more", tmp_path / "linked"):
            before = make(root).table.folder
            (folder / "new.png").write_bytes(tiny_pictures.picture(3))
            assert make(root).table.folder != before
        with (root / "captions.jsonl").open("a") as file:
            file.write(json.dumps({"file_name": "more/new.png", "caption": "another"}) + "\n")
        assert make(root).table.meta["rows"] == 13

    def test_of_few_pictures_or_without_a_manifest_compares_each_file(self, make, tmp_path, monkeypatch):
        root = tiny_pictures.folder(tmp_path / "pictures", range(8))
        written = make(root).table.folder
        (root / "00000.png").write_bytes(tiny_pictures.picture(4))
        assert make(root).table.folder != written
        monkeypatch.setattr(picture_index, "MANY", 1)
        (root / "captions.jsonl").unlink()
        for n in range(8):
            (root / f"{n:05}.txt").write_text(f"a {n}")
        written = make(root).table.folder
        (root / "00003.txt").write_text("another")
        assert make(root).table.folder != written

    def test_a_damaged_one(self, make, tmp_path):
        data = make(tiny_pictures.tars(tmp_path / "tars", range(12)))
        (data.table.folder / "caption.bin").write_bytes(b"")
        with pytest.raises(ValueError, match=r"caption.bin' is missing or truncated; delete"):
            make(data.root).setup()

    def test_exif_turns_count(self, make, tmp_path):
        root = tmp_path / "pictures"
        root.mkdir()
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new("RGB", (64, 32)).save(root / "a.jpg", exif=exif)
        data = make(root, layout={"name": "folder", "caption": ""}, held_out=0)
        assert (data.table["height"][0], data.table["width"][0]) == (64, 32)


class TestBatches:
    @pytest.fixture
    def data(self, make, tmp_path) -> Pictures:
        return make(tiny_pictures.tars(tmp_path / "tars", NUMBERS), buckets="sana", multiple=8)

    def test_have_one_shape_near_that_of_their_pictures(self, data):
        shapes = set()
        for number in range(12):
            batch = data.train_batch(number)
            assert batch.images.shape[0] == len(batch.prompts) == 4
            assert tuple(batch.images.shape[2:]) in data.shapes
            shapes.add(tuple(batch.images.shape[2:]))
        assert len(shapes) == 4

    def test_ranks_share_a_batch_of_one_bucket(self, data):
        for number in range(8):
            whole, parts = data.train_batch(number), [data.train_batch(number, Part(rank, 2)) for rank in range(2)]
            assert torch.equal(whole.images, torch.cat([part.images for part in parts]))
            assert whole.prompts == [prompt for part in parts for prompt in part.prompts]

    def test_held_out_batches_too(self, data):
        batches = list(data.val_dataloader())
        assert sum(len(batch.prompts) for batch in batches) == 6 == data.len_val
        assert len({tuple(b.images.shape[2:]) for b in batches}) > 1

    def test_items_of_any_buckets_are_squares(self, data):
        assert data.batch_at(range(6), "val").images.shape == (6, 3, 32, 32)
        with pytest.raises(IndexError, match="there are 6 val pictures; given index 6"):
            data.batch_at([6], "val")

    def test_are_those_of_another_process(self, data):
        other = pickle.loads(pickle.dumps(data))
        assert torch.equal(other.train_batch(7).images, data.train_batch(7).images)

    def test_pixels_are_the_pictures(self, make, tmp_path):
        root = tmp_path / "pictures"
        root.mkdir()
        pixels = np.random.default_rng(0).integers(0, 256, (16, 32, 3), np.uint8)
        Image.fromarray(pixels).save(root / "a.png")
        data = make(root, size=16, held_out=0, layout={"name": "folder", "caption": "x"})
        middle = torch.from_numpy(pixels[:, 8:24]).permute(2, 0, 1) / 127.5 - 1
        torch.testing.assert_close(data.batch_at([0]).images[0], middle, atol=1e-6, rtol=0)

    def test_random_crops_and_flips_are_functions_of_the_turn(self, make, tmp_path):
        data = make(tiny_pictures.tars(tmp_path / "tars", NUMBERS), crop="random", flip=True)
        wide = int(np.flatnonzero(np.diff(data.table["height"][data.selection("train").rows]) < 0)[0]) + 1
        views = [data.batch_at([wide], draw=turn).images for turn in range(6)]
        assert torch.equal(views[3], data.batch_at([wide], draw=3).images)
        assert len({view.numpy().tobytes() for view in views}) > 2


def test_a_jpeg_is_read_from_memory_as_from_a_file(tmp_path):
    from sana_lab.data import images

    file = io.BytesIO()
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(file, "JPEG")
    (tmp_path / "a.jpg").write_bytes(file.getvalue())
    assert images.read(images.Blob(file.getvalue())).tobytes() == images.read(tmp_path / "a.jpg").tobytes()
