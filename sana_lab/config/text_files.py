"""Text files as other programs write them: UTF-8 with or without a byte order mark, UTF-16 and UTF-32."""

import codecs
from collections.abc import Iterator
from pathlib import Path

MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def read(path: Path | str, *, surrogates: bool = False) -> str:
    """The text without its byte order mark, each line end as a newline.

    With `surrogates`, halves of surrogate pairs stay in the text, for a caller that reports them by name. OSError;
    ValueError with the line that is not text.
    """
    return decode(Path(path).read_bytes(), path, surrogates=surrogates)


def decode(content: bytes, path: Path | str, *, surrogates: bool = False) -> str:
    """The text of the bytes of a file, as `read`; `path` names it in messages. ValueError."""
    mark, encoding = _encoding(content)
    return _decoded(content.removeprefix(mark), encoding, path, 1, surrogates)


def lines(path: Path | str, *, surrogates: bool = False) -> Iterator[str]:
    """The lines of `read`, the last one only if it is not empty; of a file in UTF-8 one is in memory at a time."""
    with Path(path).open("rb") as file:
        mark, encoding = _encoding(file.read(4))
        if encoding != "utf-8":
            yield from _lines_of(read(path, surrogates=surrogates))
            return
        file.seek(len(mark))
        number = 1
        for content in file:
            for line in _lines_of(_decoded(content, encoding, path, number, surrogates)):
                yield line
                number += 1


def _lines_of(text: str) -> list[str]:
    lines = text.split("\n")
    return lines if lines[-1] else lines[:-1]


def _decoded(content: bytes, encoding: str, path: Path | str, first: int, surrogates: bool) -> str:
    """The text of a part of a file that begins with line `first`."""
    try:
        text = content.decode(encoding, "surrogatepass" if surrogates else "strict")
    except UnicodeDecodeError as error:
        line = _lines(content[: error.start].decode(encoding, "replace")) + first - 1
        bad = content[error.start : error.start + 1]
        raise ValueError(
            f"{path}:{line} is not {encoding.upper()}: {error.reason} (byte {bad.hex() or 'none'}); save it as UTF-8"
        ) from error
    if "\0" in text:
        line = _lines(text[: text.index("\0")]) + first - 1
        raise ValueError(f"{path}:{line} holds a NUL character, expected text; save it as UTF-8")
    return _joined(text).replace("\r\n", "\n").replace("\r", "\n")


def is_unicode(text: str) -> bool:
    """Whether a text holds no half of a surrogate pair, which no file can hold in UTF-8."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _encoding(content: bytes) -> tuple[bytes, str]:
    """(byte order mark, encoding); UTF-16 without a mark by the zeros of its first two characters."""
    for mark, encoding in MARKS:
        if content.startswith(mark):
            return mark, encoding
    zeros = [byte == 0 for byte in content[:4]]
    if zeros == [False, True, False, True]:
        return b"", "utf-16-le"
    return b"", "utf-16-be" if zeros == [True, False, True, False] else "utf-8"


def _joined(text: str) -> str:
    """Surrogate pairs that were encoded half by half, as one character."""
    if is_unicode(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


def _lines(text: str) -> int:
    """Number of the line that follows a text."""
    return text.replace("\r\n", "\n").replace("\r", "\n").count("\n") + 1
