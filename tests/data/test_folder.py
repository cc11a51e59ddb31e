"""`data: folder`: what is read, what is said of it, in which order, and what a person is told when it cannot be."""

import csv
import json
import pickle
import runpy
import tracemalloc
import warnings
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from sana_lab.config import specs
from sana_lab.data import captions
from sana_lab.data import images as pictures
from sana_lab.data.folder import Folder
from sana_lab.data.stream import Order, turn

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def paint(path: Path, color: tuple[int, ...] = RED, size: tuple[int, int] = (20, 20), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)
    return path


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def write_rows(path: Path, *rows: dict) -> Path:
    return write_lines(path, *(json.dumps(row) for row in rows))


def shades(root: Path, count: int = 10) -> Path:
    """`count` grey pictures whose shade and caption tell which they are."""
    for i in range(count):
        paint(root / f"{i:02}.png", (i * 10,) * 3)
        write_lines(root / f"{i:02}.txt", f"shade {i}", f"grey {i}", f"tone {i}")
    return root


def which(batch) -> list[int]:
    """The pictures of `shades` in a batch, known by their pixels."""
    return ((batch.images[:, 0, 0, 0] + 1) * 127.5 / 10).round().int().tolist()


def folder(root: Path, **options) -> Folder:
    return Folder(str(root), **{"size": 8, "batch": 4, "held_out": 0, **options})


def level(path: Path) -> list[int]:
    """The colour in the middle of a picture, as read."""
    image = pictures.read(path)
    assert image.mode == "RGB"
    return list(image.getpixel((image.width // 2, image.height // 2)))


class TestCaptions:
    def prompts(self, data: Folder) -> dict[str, tuple[str, ...]]:
        data.setup()
        return {e.name: e.captions for e in data.index.train + data.index.val}

    def test_text_files_beside_the_pictures_at_any_depth(self, tmp_path):
        paint(tmp_path / "a.JPG")
        paint(tmp_path / "deep/er/b.png")
        (tmp_path / "a.txt").write_text("\ufeffa red square\n\n  all red  \na red square\n", "utf-8")
        write_lines(tmp_path / "deep/er/b.txt", "ein Viereck, rot und schön")
        expected = {"a.JPG": ("a red square", "all red"), "deep/er/b.png": ("ein Viereck, rot und schön",)}
        assert self.prompts(folder(tmp_path)) == expected

    @pytest.mark.parametrize(("file", "text"), [("file_name", "text"), ("image", "captions"), ("file", "prompt")])
    def test_jsonl_columns_lists_and_repeated_rows(self, tmp_path, file, text):
        paint(tmp_path / "a.png")
        paint(tmp_path / "sub/b.png")
        rows = [{file: "a.png", text: "one"}, {file: "./sub/b.png", text: ["b", "c"]}, {file: "a.png", text: "two"}]
        write_rows(tmp_path / "list.jsonl", *rows)
        data = folder(tmp_path, manifest="list.jsonl")
        assert self.prompts(data) == {"a.png": ("one", "two"), "sub/b.png": ("b", "c")}

    def test_csv_with_commas_quotes_and_lists(self, tmp_path):
        paint(tmp_path / "a.png")
        paint(tmp_path / "b.png")
        with (tmp_path / "metadata.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["image", "caption"], ["a.png", 'red, "very"'], ["b.png", '["one", "two"]']])
        assert self.prompts(folder(tmp_path)) == {"a.png": ('red, "very"',), "b.png": ("one", "two")}

    def test_a_default_stands_in_only_where_there_is_no_caption(self, tmp_path):
        paint(tmp_path / "a.png")
        paint(tmp_path / "b.png")
        write_lines(tmp_path / "b.txt", "said")
        assert self.prompts(folder(tmp_path, caption="")) == {"a.png": ("",), "b.png": ("said",)}

    def test_text_files_in_any_case_and_normalisation(self, tmp_path):
        for name in ("a.png", "b.jpg", "caf\u00e9.png", "nai\u0308ve.png"):
            paint(tmp_path / name)
        write_lines(tmp_path / "a.TXT", "one")
        write_lines(tmp_path / "b.jpg.txt", "two")
        write_lines(tmp_path / "cafe\u0301.txt", "three")
        (tmp_path / "na\u00efve.Txt").write_bytes("four\r\n".encode("utf-16"))
        assert sorted(self.prompts(folder(tmp_path)).values()) == [("four",), ("one",), ("three",), ("two",)]

    def test_manifests_in_upper_case_with_names_as_another_system_writes_them(self, tmp_path):
        for name in ("sub/a.png", "sub/b.JPG", "caf\u00e9.png", "c.png"):
            paint(tmp_path / name)
        lines = ("sub\\a.png,one", ".\\sub\\b.jpg,two", "cafe\u0301.PNG,three", f"{tmp_path}/c.png,four")
        write_lines(tmp_path / "CAPTIONS.CSV", "File Name,Caption", *lines)
        expected = {"sub/a.png": ("one",), "sub/b.JPG": ("two",), "caf\u00e9.png": ("three",), "c.png": ("four",)}
        assert self.prompts(folder(tmp_path)) == expected

    def test_lists_that_pandas_writes_into_a_csv(self, tmp_path):
        paint(tmp_path / "a.png")
        write_lines(tmp_path / "captions.csv", "file_name,captions", """a.png,"['a cat', ""it's""]\"""")
        assert self.prompts(folder(tmp_path)) == {"a.png": ("a cat", "it's")}

    def test_endings_of_pillow_and_pictures_without_one(self, tmp_path):
        for name in ("a.jfif", "b.jpe", "c.TIF", "d.apng", "e.qoi", "f.tga"):
            paint(tmp_path / name)
        paint(tmp_path / "g.png").rename(tmp_path / "g")
        write_lines(tmp_path / "g.txt", "no ending")
        prompts = self.prompts(folder(tmp_path, caption=""))
        assert set(prompts) == {"a.jfif", "b.jpe", "c.TIF", "d.apng", "e.qoi", "f.tga", "g"}
        assert prompts["g"] == ("no ending",)

    def test_linked_folders_are_read_and_each_picture_once(self, tmp_path):
        paint(tmp_path / "elsewhere/a.png")
        paint(tmp_path / "root/deep/b.png")
        (tmp_path / "root/linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
        (tmp_path / "root/again").symlink_to(tmp_path / "root/deep", target_is_directory=True)
        (tmp_path / "root/deep/ring").symlink_to(tmp_path / "root", target_is_directory=True)
        assert set(self.prompts(folder(tmp_path / "root", caption=""))) == {"linked/a.png", "deep/b.png"}

    def test_what_a_manifest_says_stays_on_the_disk(self, tmp_path):
        """Ten megabytes of captions, sorted by picture, in less than three of memory."""
        for n in range(200):
            paint(tmp_path / f"{n:03}.png", size=(1, 1))
        rows = ({"file_name": f"{n % 200:03}.png", "caption": f"{n} {'x' * 1000}"} for n in range(10_000))
        write_rows(tmp_path / "captions.jsonl", *rows)
        tracemalloc.start()
        counts = [len(entry.captions) for entry in captions.Listing(tmp_path)]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert counts == [50] * 200
        assert peak < 3e6

    def test_hidden_files_are_left_out(self, tmp_path):
        for name in ("a.png", "._a.png", ".trash/b.png"):
            paint(tmp_path / name)
        assert set(self.prompts(folder(tmp_path, caption=""))) == {"a.png"}


class TestLeftOut:
    """Pictures that cannot be used are named, counted and skipped, at the start."""

    def left_out(self, data: Folder) -> dict[str, str]:
        with pytest.warns(UserWarning, match=r"skipped \d+ of \d+ files") as warned:
            data.check_content()
        assert f"skipped {len(data.skipped)} of {len(data.skipped) + data.len_train} files" in str(warned[0].message)
        assert all(repr(name) in str(warned[0].message) for name in data.skipped)
        return data.skipped

    def test_files_by_reason(self, tmp_path):
        paint(tmp_path / "good.png")
        (tmp_path / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic")
        (tmp_path / "link.png").symlink_to(tmp_path / "nowhere.png")
        paint(tmp_path / "copy.png").rename(tmp_path / "copy.bak")
        paint(tmp_path / "name.png").rename(tmp_path / "na\udcffme.png")
        (tmp_path / "empty.jpg").touch()
        (tmp_path / "notes.md").write_text("no picture")
        assert self.left_out(folder(tmp_path, caption="")) == {
            "photo.heic": "Pillow cannot read .heic files",
            "link.png": "a link to a file that is missing",
            "copy.bak": "a picture whose ending '.bak' is not that of one; rename it",
            "na\udcffme.png": "its name is not UTF-8; rename it",
            "empty.jpg": "not an image: the file is empty",
        }

    def test_a_caption_that_is_no_unicode(self, tmp_path):
        for name in ("a.png", "b.png", "c.png"):
            paint(tmp_path / name)
        captions = ["x \ud83d"], ["one", "y \ud83d"], "\ud83d\ude42"
        rows = [{"file_name": f"{n}.png", "text": text} for n, text in zip("abc", captions, strict=True)]
        write_rows(tmp_path / "metadata.jsonl", *rows)
        data = folder(tmp_path)
        with pytest.warns(UserWarning, match=r"left out 2 captions: .*metadata.jsonl:1: .*metadata.jsonl:2: "):
            assert "metadata.jsonl:1" in self.left_out(data)["a.png"]
        assert [e.captions for e in data.index.train] == [("one",), ("\U0001f642",)]

    def test_a_caption_file_that_is_no_unicode(self, tmp_path):
        paint(tmp_path / "a.png")
        (tmp_path / "a.txt").write_bytes(b"one\nx \xed\xa0\xbd\n")
        with pytest.warns(UserWarning, match=r"left out 1 captions: .*a.txt:2: 'x \\ud83d' holds half of a surrogate"):
            assert folder(tmp_path).prompts_at([0]) == ["one"]

    def test_pictures_without_a_row_and_rows_of_dangling_links(self, tmp_path):
        for name in ("a.png", "b.png"):
            paint(tmp_path / name)
        (tmp_path / "c.png").symlink_to(tmp_path / "nowhere.png")
        write_lines(tmp_path / "captions.csv", "file_name,caption", "a.png,one", "c.png,three")
        skipped = self.left_out(folder(tmp_path))
        assert skipped["b.png"] == "no row in captions.csv"
        assert "captions.csv:3: a link to a file that is missing" in skipped["c.png"]

    def test_an_odd_ending_is_read_where_a_manifest_names_it(self, tmp_path):
        paint(tmp_path / "a.png").rename(tmp_path / "a.bak")
        write_lines(tmp_path / "captions.csv", "file_name,caption", "a.bak,one")
        assert folder(tmp_path).prompts_at([0]) == ["one"]


class TestMistakes:
    """Each ends in a ValueError that says what was given, what was expected and what comes near."""

    def fails(self, data: Folder, *words: str) -> None:
        with pytest.raises(ValueError, match="data 'folder'") as error:
            data.setup("fit")
        assert all(word in str(error.value) for word in words), str(error.value)

    def test_no_such_folder(self, tmp_path):
        (tmp_path / "photos").mkdir()
        self.fails(folder(tmp_path / "photo"), "photo", "did you mean 'photos'?")

    def test_a_file_for_a_folder(self, tmp_path):
        self.fails(folder(paint(tmp_path / "a.png")), "a.png", "expected a folder")

    def test_an_empty_folder(self, tmp_path):
        self.fails(folder(tmp_path), str(tmp_path), "no image", ".jpg", "it holds nothing")

    def test_a_folder_without_pictures(self, tmp_path):
        write_lines(tmp_path / "notes.md", "hello")
        self.fails(folder(tmp_path), "no image", "notes.md")

    def test_no_such_manifest(self, tmp_path):
        paint(tmp_path / "a.png")
        write_rows(tmp_path / "list.jsonl", {"image": "a.png", "text": "x"})
        self.fails(folder(tmp_path, manifest="lists.jsonl"), "lists.jsonl", "did you mean 'list.jsonl'?")

    def test_a_manifest_of_another_sort(self, tmp_path):
        paint(tmp_path / "a.png")
        write_lines(tmp_path / "list.yaml", "a: b")
        self.fails(folder(tmp_path, manifest="list.yaml"), ".yaml", ".jsonl, .csv or .parquet")

    def test_two_manifests(self, tmp_path):
        for name in ("captions.jsonl", "Metadata.JSONL"):
            write_rows(tmp_path / name, {"image": "a.png", "text": "x"})
        self.fails(folder(tmp_path), "captions.jsonl", "Metadata.JSONL", "manifest")

    def test_a_row_that_names_a_missing_file(self, tmp_path):
        paint(tmp_path / "sub/cat.png")
        write_rows(tmp_path / "captions.jsonl", {"image": "cat.png", "text": "x"})
        self.fails(folder(tmp_path), "1 of 1", "'cat.png'", "did you mean 'sub/cat.png'?")

    def test_a_row_without_file_or_caption(self, tmp_path):
        table = tmp_path / "captions.jsonl"
        write_rows(table, {"imgae": "a.png", "text": "x"})
        self.fails(folder(tmp_path), "captions.jsonl:1", "'imgae'", "'image'")
        write_rows(table, {"image": "a.png", "captoin": "x"})
        self.fails(folder(tmp_path), "captions.jsonl:1", "'captoin'", "'caption'")
        write_rows(table, {"image": "a.png", "caption": ["x", 3]})
        self.fails(folder(tmp_path), "captions.jsonl:1", "3", "list of texts")

    @pytest.mark.parametrize("line", ["{not json", "[1, 2]", '"text"'])
    def test_a_line_that_is_no_object(self, tmp_path, line):
        write_lines(tmp_path / "captions.jsonl", '{"image": "a.png", "text": "x"}', line)
        self.fails(folder(tmp_path), "captions.jsonl:2")

    def test_a_comma_that_splits_a_caption(self, tmp_path):
        write_lines(tmp_path / "captions.csv", "image,caption", "a.png,red, very")
        self.fails(folder(tmp_path), "captions.csv:2", "double quotes")

    def test_a_quote_that_swallows_other_rows(self, tmp_path):
        for name in ("a.png", "b.png", "c.png"):
            paint(tmp_path / name)
        table = tmp_path / "captions.csv"
        write_lines(table, "image,caption", 'a.png,"red', "b.png,blue", "c.png,green")
        self.fails(folder(tmp_path), "captions.csv:2", "not closed")
        write_lines(table, "image,caption", 'a.png,"red', 'b.png,blue"', "c.png,green")
        self.fails(folder(tmp_path), "captions.csv:2", "several lines", "'b.png'")
        write_lines(table, "caption,image", '"red,a.png', 'blue",b.png', "green,c.png")
        self.fails(folder(tmp_path), "captions.csv:2", "several lines", "'a.png'")

    def test_a_csv_without_a_header(self, tmp_path):
        paint(tmp_path / "a.png")
        write_lines(tmp_path / "captions.csv", "a.png,red", "a.png,blue")
        self.fails(folder(tmp_path), "captions.csv:2", "first line must name the columns")

    @pytest.mark.parametrize(
        "name", ["../b.png", "/b.png", "C:\\b.png", "x" * 5000 + ".png", "b.png\0", "\ud83d.png"], ids=range(6)
    )
    def test_names_of_files_that_are_not_below_the_folder(self, tmp_path, name):
        paint(tmp_path / "root/a.png")
        paint(tmp_path / "b.png")
        write_rows(tmp_path / "root/captions.jsonl", {"image": name, "text": "x"})
        self.fails(folder(tmp_path / "root"), "names 1 of 1 files that are not below", "first in line 1")

    def test_an_empty_manifest_and_one_that_is_no_text(self, tmp_path):
        (tmp_path / "captions.csv").write_text("image,caption\n")
        self.fails(folder(tmp_path), "no rows")
        (tmp_path / "captions.csv").write_bytes(b"image,caption\na.png,sch\xf6n\n")
        self.fails(folder(tmp_path), "UTF-8")

    def test_pictures_without_captions(self, tmp_path):
        paint(tmp_path / "a.png")
        self.fails(folder(tmp_path), "1 of 1", "'a.png'", "'a.txt'", 'caption: ""')
        write_rows(tmp_path / "mine.jsonl", {"image": "a.png", "text": "x"})
        self.fails(folder(tmp_path), "manifest: mine.jsonl")
        write_rows(tmp_path / "mine.jsonl", {"image": "a.png", "text": " "})
        self.fails(folder(tmp_path, manifest="mine.jsonl"), "no caption", "mine.jsonl")

    def test_all_held_out(self, tmp_path):
        self.fails(folder(shades(tmp_path, 3), held_out=3), "held_out is 3 of 3", "at most 2")

    @pytest.mark.parametrize(
        "options", [{"size": 0}, {"batch": 0}, {"held_out": 1.0}, {"held_out": -1}, {"workers": -1}]
    )
    def test_numbers_out_of_range(self, tmp_path, options):
        with pytest.raises(ValueError, match=next(iter(options))):
            folder(tmp_path, **options)

    def test_a_spec_with_a_typo(self, tmp_path):
        with pytest.raises(specs.SpecError, match="did you mean 'crop'"):
            specs.resolve("data", {"name": "folder", "root": "x", "corp": "random"})
        with pytest.raises(specs.SpecError, match="cover"):
            specs.resolve("data", {"name": "folder", "root": "x", "resize": "covr"})

    def test_a_spec_builds_one(self, tmp_path):
        spec = {"name": "folder", "root": str(shades(tmp_path)), "held_out": 2, "size": 8}
        data = specs.build("data", spec)
        assert (data.len_train, data.len_val) == (8, 2)  # 2 stays a number of pictures, not a share


class TestModes:
    """Every file becomes upright 8-bit RGB."""

    def test_exif_orientation(self, tmp_path):
        image = Image.new("RGB", (30, 20), RED)
        image.paste(BLUE, (0, 0, 15, 20))  # blue on the left as stored
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned clockwise by 90 degrees: left becomes top
        image.save(tmp_path / "a.png", exif=exif)
        upright = pictures.read(tmp_path / "a.png")
        assert upright.size == (20, 30)
        assert (upright.getpixel((10, 2)), upright.getpixel((10, 28))) == (BLUE, RED)

    def test_alpha_on_white(self, tmp_path):
        assert level(paint(tmp_path / "a.png", (255, 0, 0, 0), mode="RGBA")) == [255, 255, 255]
        assert level(paint(tmp_path / "b.png", (255, 0, 0, 51), mode="RGBA")) == [255, 204, 204]
        assert level(paint(tmp_path / "c.png", (0, 51), mode="LA")) == [204, 204, 204]

    def test_transparent_palette_and_colour_key(self, tmp_path):
        palette = Image.new("P", (8, 8), 1)
        palette.putpalette([0, 0, 0, 0, 255, 0])
        palette.save(tmp_path / "plain.png")
        palette.save(tmp_path / "clear.png", transparency=1)
        Image.new("RGB", (8, 8), RED).save(tmp_path / "key.png", transparency=RED)
        assert level(tmp_path / "plain.png") == [0, 255, 0]
        assert level(tmp_path / "clear.png") == level(tmp_path / "key.png") == [255, 255, 255]

    @pytest.mark.parametrize(("mode", "color"), [("L", 77), ("1", 255)])
    def test_grey_and_bilevel(self, tmp_path, mode, color):
        Image.new(mode, (8, 8), color).save(tmp_path / "a.png")
        assert level(tmp_path / "a.png") == [color] * 3

    def test_cmyk(self, tmp_path):
        Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.tif")
        assert level(tmp_path / "a.tif") == [255, 0, 0]
        Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
        assert np.abs(np.array(level(tmp_path / "a.jpg")) - (255, 0, 0)).max() <= 3

    @pytest.mark.parametrize("suffix", [".png", ".tif"])
    def test_sixteen_bits(self, tmp_path, suffix):
        values = np.array([[0, 257, 128 * 257], [1000, 40000, 65535]], np.uint16)
        Image.fromarray(values).save(tmp_path / f"a{suffix}")
        read = np.asarray(pictures.read(tmp_path / f"a{suffix}"))
        assert (read == np.round(values / 257)[..., None]).all()

    @pytest.mark.parametrize("white", [1.0, 255.0])
    def test_floats(self, tmp_path, white):
        Image.fromarray(np.linspace(0, white, 6, dtype=np.float32)[None]).save(tmp_path / "a.tif")
        assert np.asarray(pictures.read(tmp_path / "a.tif"))[0, :, 0].tolist() == [0, 51, 102, 153, 204, 255]

    @pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
    def test_first_frame(self, tmp_path, suffix):
        frames = [Image.new("RGB", (8, 8), color) for color in (RED, GREEN)]
        frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:])
        assert np.abs(np.array(level(tmp_path / f"a{suffix}")) - RED).max() <= 2

    @pytest.mark.parametrize("size", [(1, 1), (1, 500), (3000, 2)])
    @pytest.mark.parametrize("resize", ["cover", "contain", "stretch", "crop"])
    def test_any_size(self, tmp_path, size, resize):
        assert pictures.fit(Image.new("RGB", size, RED), 16, resize).size == (16, 16)


class TestFit:
    def noise(self, width: int, height: int) -> Image.Image:
        return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))

    @pytest.mark.parametrize(("width", "height"), [(96, 64), (64, 96)])
    def test_cover_is_scale_then_crop(self, width, height):
        image = self.noise(width, height)
        whole = image.resize((width // 2, height // 2), Image.Resampling.BICUBIC)
        left, top = (whole.width - 32) // 2, (whole.height - 32) // 2
        expected = np.asarray(whole.crop((left, top, left + 32, top + 32)), int)
        assert np.abs(np.asarray(pictures.fit(image, 32, "cover"), int) - expected).max() <= 1

    @pytest.mark.parametrize(("at", "left"), [((0, 0), 0), ((1, 1), 32)])
    def test_cover_takes_the_corner_it_is_told(self, at, left):
        image = self.noise(96, 64)
        expected = image.crop((left, 0, left + 64, 64))
        assert (np.asarray(pictures.fit(image, 64, "cover", at)) == np.asarray(expected)).all()

    @pytest.mark.parametrize(("at", "corner"), [((0, 0), (0, 0)), ((1, 1), (64, 32)), ((0.51, 0.5), (33, 16))])
    def test_crop_takes_pixels_as_they_are(self, at, corner):
        image = self.noise(96, 64)
        expected = np.asarray(image)[corner[1] : corner[1] + 32, corner[0] : corner[0] + 32]
        assert (np.asarray(pictures.fit(image, 32, "crop", at)) == expected).all()

    def test_crop_of_a_smaller_image_is_cover(self):
        image = self.noise(24, 16)
        assert pictures.fit(image, 32, "crop", (1, 0)).tobytes() == pictures.fit(image, 32, "cover", (1, 0)).tobytes()

    def test_contain_pads_with_white_and_stretch_does_not(self):
        image = Image.new("RGB", (40, 20), RED)
        contained = np.asarray(pictures.fit(image, 16, "contain"))
        assert (contained[:4] == 255).all()
        assert (contained[12:] == 255).all()
        assert (contained[4:12] == RED).all()
        assert (np.asarray(pictures.fit(image, 16, "stretch")) == RED).all()

    def test_antialiased(self):
        """A fine chequerboard becomes grey, not a coarser one."""
        board = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
        small = np.asarray(pictures.fit(Image.fromarray(board).convert("RGB"), 37, "cover"), int)
        assert np.abs(small - 127).max() <= 8

    @pytest.mark.parametrize("seed", range(20))
    def test_no_crop_leaves_the_picture(self, seed):
        """Rounding must not push the square over the edge, which Pillow refuses."""
        rng = np.random.default_rng(seed)
        width, height = rng.integers(1, 5000, 2)
        image = Image.new("L", (int(width), int(height)))
        assert pictures.fit(image, 4, "cover", tuple(rng.random(2).tolist())).size == (4, 4)


class TestBroken:
    def truncated(self, path: Path) -> None:
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:-4000])

    def test_bad_headers_are_named_counted_and_skipped(self, tmp_path):
        shades(tmp_path, 4)
        (tmp_path / "empty.png").touch()
        (tmp_path / "text.jpg").write_text("not a picture")
        data = folder(tmp_path, caption="")
        with pytest.warns(UserWarning, match=r"skipped 2 of 6 files: 'empty.png' \(.*'text.jpg' \("):
            data.setup("fit")
        assert set(data.skipped) == {"empty.png", "text.jpg"}
        assert data.len_train == 4

    def test_bad_pixels_are_replaced_by_the_next_picture_and_its_caption(self, tmp_path):
        shades(tmp_path, 4)
        self.truncated(tmp_path / "01.png")
        data = folder(tmp_path)
        data.setup("fit")
        with pytest.warns(UserWarning, match=r"'01.png' cannot be read \(.*1 of 4 skipped so far"):
            batch = data.batch_at([0, 1, 2, 3])
        assert which(batch) == [0, 2, 2, 3]
        assert [p.split()[1] for p in batch.prompts] == ["0", "2", "2", "3"]
        with warnings.catch_warnings():  # reported once
            warnings.simplefilter("error")
            assert which(data.batch_at([1])) == [2]
        assert set(data.skipped) == {"01.png"}

    def test_the_last_one_wraps_round(self, tmp_path):
        self.truncated(shades(tmp_path, 3) / "02.png")
        with pytest.warns(UserWarning, match=r"'02.png'"):
            assert which(folder(tmp_path).batch_at([2])) == [0]

    def test_pixels_can_be_checked_at_once(self, tmp_path):
        self.truncated(shades(tmp_path, 4) / "01.png")
        data = folder(tmp_path, check="pixels")
        with pytest.warns(UserWarning, match=r"skipped 1 of 4 files: '01.png' \(OSError"):
            data.setup("fit")
        assert data.len_train == 3

    def test_a_broken_held_out_picture_is_not_fatal(self, tmp_path):
        shades(tmp_path, 4)
        data = folder(tmp_path, held_out=1)
        self.truncated(tmp_path / data.index.val[0].name)
        with pytest.warns(UserWarning, match="cannot be read"):
            assert data.batch_at([0], "val").images.shape == (1, 3, 8, 8)

    @pytest.mark.parametrize("check", ["headers", "pixels"])
    def test_all_broken_is_fatal(self, tmp_path, check):
        for name in ("a.png", "b.png"):
            self.truncated(tmp_path / name)
        data = folder(tmp_path, caption="", check=check)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(ValueError, match=r"none of the 2 images .* 'a.png' \(.*'b.png' \("):
                data.batch_at([0])

    def test_small_ones_are_left_out_on_request(self, tmp_path):
        paint(tmp_path / "small.png", size=(100, 7))
        paint(tmp_path / "large.png", size=(8, 8))
        data = folder(tmp_path, caption="", min_side=8)
        with pytest.warns(UserWarning, match=r"'small.png' \(100x7 is smaller than min_side 8\)"):
            data.setup()
        assert [e.name for e in data.index.train] == ["large.png"]


class TestOrder:
    def test_each_epoch_holds_every_item_once_in_its_own_order(self):
        order = Order(7, seed=3)
        epochs = [[item for item, epoch in order.at(range(7 * e, 7 * e + 7)) if epoch == e] for e in range(3)]
        assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
        assert epochs[0] != epochs[1]
        assert order.at([20, 3, 20]) == [(epochs[2][6], 2), (epochs[0][3], 0), (epochs[2][6], 2)]
        assert Order(7, seed=4).at(range(7)) != order.at(range(7))

    def test_turns_go_round(self):
        assert sorted(turn(5, draw, 1, 2) for draw in range(5)) == list(range(5))
        assert len({turn(5, 0, 1, i) for i in range(50)}) == 5
        assert [turn(3, draw) for draw in range(4)] == [0, 1, 2, 0]


class TestFolder:
    def test_batches(self, tmp_path):
        data = folder(shades(tmp_path))
        batch = next(iter(data.train_dataloader()))
        assert batch.images.shape == (4, 3, 8, 8)
        assert batch.images.dtype == torch.float32
        assert [int(p.split()[1]) for p in batch.prompts] == which(batch)
        assert batch.latents is None

    def test_range_of_values(self, tmp_path):
        paint(tmp_path / "a.png", (0, 255, 51))
        images = folder(tmp_path, caption="").batch_at([0]).images
        torch.testing.assert_close(images[0, :, 0, 0], torch.tensor([-1.0, 1.0, -0.6]))

    def test_every_picture_once_an_epoch_and_every_caption_in_turn(self, tmp_path):
        data = folder(shades(tmp_path, 8))
        stream = iter(data.train_dataloader())
        epochs = [[next(stream), next(stream)] for _ in range(3)]
        for epoch in epochs:
            assert sorted(which(epoch[0]) + which(epoch[1])) == list(range(8))
        said = {p for epoch in epochs for batch in epoch for p in batch.prompts}
        assert len(said) == 8 * 3

    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_batch_is_a_function_of_seed_and_step(self, tmp_path, workers):
        options = {"crop": "random", "flip": True, "size": 12}
        data, again = (folder(shades(tmp_path), **options, workers=w) for w in (0, workers))
        for number, batch in zip(range(5), again.train_dataloader(), strict=False):
            expected = data.train_batch(number)
            assert torch.equal(batch.images, expected.images)
            assert batch.prompts == expected.prompts
        other = folder(tmp_path, **options, seed=1).train_batch(0)
        assert which(other) != which(data.train_batch(0))

    def test_crop_and_flip_vary_in_training_only(self, tmp_path):
        gradient = np.linspace(0, 255, 32).astype(np.uint8)[None, :, None].repeat(16, 0).repeat(3, 2)
        for i in range(2):
            Image.fromarray(gradient).save(tmp_path / f"{i}.png")
        data = folder(tmp_path, caption="", held_out=1, crop="random", flip=True)
        views = torch.stack([data.batch_at([0], draw=d).images[0] for d in range(8)])
        rising = (views[:, 0, 0, -1] > views[:, 0, 0, 0]).sum()
        assert 0 < rising < 8
        assert len(views[:, 0, 0].unique(dim=0)) == 8
        held = [data.batch_at([0], "val", draw=d).images for d in range(3)]
        assert torch.equal(held[0], held[1])
        assert torch.equal(held[0], held[2])

    def test_held_out_stays_when_files_come(self, tmp_path):
        data = folder(shades(tmp_path, 60), held_out=0.2)
        val = {e.name for e in data.index.val}
        assert 4 <= len(val) <= 20
        shades(tmp_path, 90)
        more = folder(tmp_path, held_out=0.2)
        assert {e.name for e in more.index.val} >= val
        assert not {e.name for e in more.index.train} & val
        assert {e.name for e in folder(tmp_path, held_out=0.2, seed=5).index.val} == {e.name for e in more.index.val}

    @pytest.mark.parametrize("count", [1, 2, 3])
    @pytest.mark.parametrize("share", [0.01, 0.99])
    def test_few_pictures_still_train_and_validate(self, tmp_path, count, share):
        data = folder(shades(tmp_path, count), held_out=share)
        assert data.len_train >= 1
        assert data.len_val >= min(1, count - 1)
        assert data.len_train + data.len_val == count

    def test_validation_in_order_with_first_captions(self, tmp_path):
        data = folder(shades(tmp_path), held_out=6)
        batches = list(data.val_dataloader())
        assert len(data.val_dataloader()) == len(batches) == 2
        expected = [int(Path(e.name).stem) for e in data.index.val]
        assert [i for b in batches for i in which(b)] == expected
        assert [p for b in batches for p in b.prompts] == [f"shade {i}" for i in expected]

    def test_prompts_alone_agree_with_batches(self, tmp_path):
        data = folder(shades(tmp_path))
        for draw in range(4):
            assert data.prompts_at(range(10), draw=draw) == data.batch_at(range(10), draw=draw).prompts

    def test_indices_beyond_the_end(self, tmp_path):
        with pytest.raises(IndexError, match="there are 3 train pictures; given index 3"):
            folder(shades(tmp_path, 3)).batch_at([3])

    def test_digest_follows_content(self, tmp_path):
        digests = [folder(shades(tmp_path / "a")).digest(), folder(shades(tmp_path / "elsewhere")).digest()]
        assert digests[0] == digests[1]
        paint(tmp_path / "a/03.png", BLUE)
        digests.append(folder(tmp_path / "a").digest())
        write_lines(tmp_path / "a/03.txt", "a blue square")
        digests.append(folder(tmp_path / "a").digest())
        (tmp_path / "a/09.png").unlink()
        digests.append(folder(tmp_path / "a").digest())
        assert len(set(digests)) == 4

    def test_pickles_without_a_scan_again(self, tmp_path):
        data = folder(shades(tmp_path))
        data.setup()
        assert pickle.loads(pickle.dumps(data)).index == data.index


def test_real_photographs(tmp_path):
    """What `benchmarks/photographs.py` writes: grey and colour, of many sizes, each with several captions."""
    script = Path(__file__).parents[2] / "benchmarks/photographs.py"
    missing = runpy.run_path(str(script))["write"](tmp_path)
    data = folder(tmp_path, size=32, held_out=3)
    count = data.len_train + data.len_val
    assert count >= 15
    assert count == 19 - len(missing)
    assert data.skipped == {}
    batch = data.batch_at(range(data.len_train))
    assert batch.images.shape == (count - 3, 3, 32, 32)
    assert (batch.images.std((1, 2, 3)) > 0.02).all()
    assert all(len(e.captions) >= 3 for e in data.index.train)
    names = [e.name for e in data.index.train]
    if "coffee.png" in names:  # a red saucer on brown wood
        red, green, blue = batch.images[names.index("coffee.png")].mean((1, 2))
        assert red > green > blue


class Recorder(L.LightningModule):
    """Remembers what it was shown; one weight so that there is something to train."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []
        self.held: list[int] = []

    def training_step(self, batch, index):
        self.seen.append(which(batch))
        return (self.weight - batch.images.mean()).square()

    def validation_step(self, batch, index):
        self.held += which(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(data: Folder, steps: int, checkpoint: Path | None = None, **options) -> tuple[Recorder, L.Trainer]:
    trainer = tiny.trainer(steps, **options)
    module = Recorder()
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    return module, trainer


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning's, not ours
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"limit_train_batches": 3}])
def test_a_resumed_run_goes_on_where_it_stopped(tmp_path, options):
    root = shades(tmp_path / "data")
    whole, _ = fit(folder(root, held_out=1), 6, **options)
    first, trainer = fit(folder(root, held_out=1), 3, **options)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    second, _ = fit(folder(root, held_out=1), 6, tmp_path / "half.ckpt", **options)
    assert first.seen + second.seen == whole.seen
    batches = 6 * options.get("accumulate_grad_batches", 1)
    assert whole.seen == [which(folder(root, held_out=1).train_batch(n)) for n in range(batches)]


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_lightning_validates_on_the_held_out(tmp_path):
    data = folder(shades(tmp_path), held_out=5)
    module, _ = fit(data, 4, val_check_interval=4, check_val_every_n_epoch=None)
    assert module.held == [int(Path(e.name).stem) for e in data.index.val]
