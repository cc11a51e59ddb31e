"""Text files in the encodings and with the line ends of other programs."""

import pytest

from sana_lab.config import text_files

TEXT = "a red circle\nschön 🙂\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings_and_line_ends(tmp_path, encoding, end):
    path = tmp_path / "a.txt"
    path.write_bytes(TEXT.replace("\n", end).encode(encoding))
    assert text_files.read(path) == TEXT
    assert list(text_files.lines(path)) == TEXT.splitlines()


@pytest.mark.parametrize(
    ("content", "lines"),
    [(b"", []), (b"\n", [""]), (b"a", ["a"]), (b"a\n\n", ["a", ""]), (b"a\rb\r\n\rc\n", ["a", "b", "", "c"])],
)
def test_lines(tmp_path, content, lines):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    assert list(text_files.lines(path)) == lines
    assert text_files.read(path).removesuffix("\n").split("\n") == (lines or [""])


def test_big_endian_with_a_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xfe\xff" + TEXT.encode("utf-16-be"))
    assert text_files.read(tmp_path / "a.txt") == TEXT


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a\r\nb\r\nsch\xf6n", r"a.txt:3 is not UTF-8.*byte f6.*save it as UTF-8"),
        (b"\xff\xfea\0\n\0\x3d", r"a.txt:2 is not UTF-16"),
        (b"ab\ncd\0", r"a.txt:2 holds a NUL"),
        (b"a\n\xed\xa0\xbd", r"a.txt:2 is not UTF-8"),
    ],
)
def test_what_is_no_text_is_named_by_line(tmp_path, content, words):
    (tmp_path / "a.txt").write_bytes(content)
    for read in (text_files.read, lambda path: list(text_files.lines(path))):
        with pytest.raises(ValueError, match=words):
            read(tmp_path / "a.txt")


def test_halves_of_surrogate_pairs_on_request(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x \xed\xa0\xbd y \xed\xa0\xbd\xed\xb9\x82")
    text = text_files.read(tmp_path / "a.txt", surrogates=True)
    assert text == "x \ud83d y 🙂"  # a pair that was encoded half by half is one character
    assert not text_files.is_unicode(text)
    assert list(text_files.lines(tmp_path / "a.txt", surrogates=True)) == [text]
