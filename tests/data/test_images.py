"""Image files with odd metadata are read; those too large to decode are refused before they are."""

import random
import struct
import zlib
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sana_lab.data import images
from sana_lab.data.image_metadata import orientation, stripped

RED, BLUE = (255, 0, 0), (0, 0, 255)


def halves() -> Image.Image:
    """Blue on the left, red on the right; 24 x 16."""
    image = Image.new("RGB", (24, 16), RED)
    image.paste(BLUE, (0, 0, 12, 16))
    return image


def encoded(kind: str = "PNG", **options: object) -> bytes:
    file = BytesIO()
    halves().save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int) -> bytes:
    """The header of a picture of that size, without pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


words, longs = st.integers(0, 2**16 - 1), st.integers(0, 2**32 - 1)
entries = st.tuples(
    st.sampled_from([0x011A, 0x011B, 0x0128, 0x010F, 0x8769, 0x8825, 0xA005, 0xB001]) | words,
    st.integers(0, 15),
    st.sampled_from([0, 1, 2]) | longs,
    st.sampled_from([0, 8]) | longs,
).filter(lambda entry: entry[0] != 0x0112)


COUNTS = (0, 1, 2, 5, 1000, 2**31, 2**32 - 1)


class TestExif:
    @given(
        before=st.lists(entries, max_size=4),
        after=st.lists(entries, max_size=4),
        tail=st.binary(max_size=40),
        order=st.sampled_from("<>"),
        number=st.integers(1, 8),
        kind=st.sampled_from(["JPEG", "PNG", "WEBP"]),
    )
    @settings(deadline=None)
    def test_the_orientation_beside_any_other_tags(self, tmp_path_factory, before, after, tail, order, number, kind):
        turned = struct.pack(order + "HHIHH", 0x0112, 3, 1, number, 0)
        several = [struct.pack(order + "HHII", *e) for e in before], [struct.pack(order + "HHII", *e) for e in after]
        head = {"<": b"II*\0\x08\0\0\0", ">": b"MM\0*\0\0\0\x08"}[order]
        count = struct.pack(order + "H", len(before) + 1 + len(after))
        exif = b"Exif\0\0" + head + count + b"".join([*several[0], turned, *several[1]]) + tail
        path = tmp_path_factory.mktemp("exif") / "a"
        path.write_bytes(encoded(kind, exif=exif))
        assert images.dimensions(path) == (24, 16)
        assert images.read(path).size == ((16, 24) if number > 4 else (24, 16))

    @given(st.binary(max_size=80), st.sampled_from([b"", b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08"]))
    def test_any_bytes(self, tmp_path_factory, content, head):
        path = tmp_path_factory.mktemp("exif") / "a.jpg"
        path.write_bytes(encoded("JPEG", exif=b"Exif\0\0" + head + content))
        assert set(images.read(path).size) == {24, 16}
        assert orientation(head + content) in {None, *range(1, 9)}

    @pytest.mark.parametrize("number", range(1, 9))
    def test_each_orientation_turns_as_pillow_does(self, tmp_path, number):
        from PIL import ImageOps

        exif = Image.Exif()
        exif[0x0112] = number
        (tmp_path / "a.png").write_bytes(encoded(exif=exif))
        expected = ImageOps.exif_transpose(Image.open(tmp_path / "a.png"))
        assert images.read(tmp_path / "a.png").tobytes() == expected.tobytes()
        halves().save(tmp_path / "a.tif", exif=exif)
        assert images.read(tmp_path / "a.tif").tobytes() == expected.tobytes()

    @pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "I;16"])
    def test_an_uncompressed_tiff_is_turned(self, tmp_path, mode):
        image = halves().convert("L" if mode == "I;16" else mode).convert(mode)
        image.save(tmp_path / "a.tif", tiffinfo={0x0112: 6})
        expected = images.rgb(image).transpose(Image.Transpose.ROTATE_270)
        assert images.read(tmp_path / "a.tif").tobytes() == expected.tobytes()

    @pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate"])
    @pytest.mark.parametrize("number", [1, 6])
    def test_odd_tags_of_a_tiff_are_ignored(self, tmp_path, compression, number):
        """Types, counts and offsets of tags that change no pixel, at random; the picture and its orientation stay."""
        tags = {
            270: "a description beyond the entry",
            305: "of somebody",
            296: 2,
            315: "me",
            33432: "nobody",
            274: number,
        }
        halves().save(tmp_path / "a.tif", compression=compression, tiffinfo=tags)
        content, expected = (tmp_path / "a.tif").read_bytes(), images.read(tmp_path / "a.tif").tobytes()
        first = int.from_bytes(content[4:8], "little")
        entries = [first + 2 + 12 * i for i in range(int.from_bytes(content[first : first + 2], "little"))]
        odd = [at for at in entries if int.from_bytes(content[at : at + 2], "little") in tags.keys() - {274}]
        assert len(odd) == 5
        moments = random.Random(0)
        for _ in range(60):
            damaged = bytearray(content)
            for at in moments.sample(odd, moments.randint(1, 3)):
                fields = [moments.choice(choices) for choices in (range(17), COUNTS, (0, 4, len(content) - 2, 2**31))]
                struct.pack_into("<HII", damaged, at + 2, *fields)
            (tmp_path / "a.tif").write_bytes(damaged)
            assert images.read(tmp_path / "a.tif").tobytes() == expected
            assert set(images.dimensions(tmp_path / "a.tif")) == set(halves().size)

    def test_the_orientation_of_xmp(self, tmp_path):
        xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'
        (tmp_path / "a.jpg").write_bytes(encoded("JPEG", xmp=xmp))
        assert images.read(tmp_path / "a.jpg").size == (16, 24)

    def test_a_broken_index_of_several_pictures(self, tmp_path):
        index = b"MPF\0II*\0\x08\0\0\0" + struct.pack("<HHHII", 1, 0xB001, 2, 1, 7)
        content = encoded("JPEG")
        segment = b"\xff\xe2" + struct.pack(">H", len(index) + 2) + index
        (tmp_path / "a.jpg").write_bytes(content[:2] + segment + content[2:])
        assert images.read(tmp_path / "a.jpg").size == (24, 16)


class TestBombs:
    @pytest.mark.parametrize("size", [(13000, 13000), (20000, 20000), (2**31 - 1, 2**31 - 1)])
    def test_too_many_pixels_are_refused_by_the_header(self, tmp_path, size):
        (tmp_path / "a.png").write_bytes(png(*size))
        for function in (images.dimensions, images.read):
            with pytest.raises(images.UnreadableError, match=r"pixels: at most 89,478,485 .* save a smaller copy"):
                function(tmp_path / "a.png")

    def test_a_large_jpeg_is_read_at_half_its_size(self, tmp_path, monkeypatch):
        monkeypatch.setattr(images, "MAX_PIXELS", 24 * 16 - 1)
        (tmp_path / "a.jpg").write_bytes(encoded("JPEG"))
        (tmp_path / "a.png").write_bytes(encoded())
        assert images.read(tmp_path / "a.jpg").size == (12, 8)
        with pytest.raises(images.UnreadableError, match=r"384 pixels: at most 383 .* PNG cannot be read"):
            images.dimensions(tmp_path / "a.png")

    @pytest.mark.parametrize(("kind", "head"), [(b"zTXt", b"a\0\0"), (b"iTXt", b"a\0\1\0\0\0"), (b"iCCP", b"a\0\0")])
    @pytest.mark.parametrize("place", ["start", "end"])
    def test_text_that_unpacks_to_much_is_not_unpacked(self, tmp_path, kind, head, place):
        content, bomb = encoded(), chunk(kind, head + zlib.compress(bytes(4_000_000)))
        at = 33 if place == "start" else len(content) - 12
        (tmp_path / "a.png").write_bytes(content[:at] + bomb + content[at:])
        assert images.dimensions(tmp_path / "a.png") == (24, 16)
        assert images.read(tmp_path / "a.png").tobytes() == halves().tobytes()

    def test_a_drawing_that_runs_a_program_is_no_picture(self, tmp_path):
        halves().save(tmp_path / "a.eps")
        (tmp_path / "a.eps").rename(tmp_path / "a.png")
        with pytest.raises(images.UnreadableError, match="not an image"):
            images.read(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_a_file_without_its_metadata_has_the_same_pixels(tmp_path: Path, kind: str):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a").write_bytes(encoded(kind, exif=exif))
    file, block = stripped(tmp_path / "a")
    assert orientation(block) == 6
    bare = Image.open(file)
    assert 0x0112 not in bare.getexif()
    assert bare.tobytes() == Image.open(BytesIO(encoded(kind))).tobytes()


def test_truncated_files_stay_unreadable(tmp_path):
    for kind in ("PNG", "JPEG"):
        (tmp_path / "a").write_bytes(encoded(kind)[:60])
        with pytest.raises(images.UnreadableError):
            images.read(tmp_path / "a")
