"""Metadata of image files: the orientation, however odd the rest is, and the file without it."""

from functools import partial
from io import BytesIO
from typing import Any, BinaryIO, Literal

ORIENTATION = 0x0112
LARGEST = 2**28  # bytes of a file that is copied without its metadata

_EXIF = b"Exif\0\0"
_WHOLE_NUMBERS = {1: 1, 3: 2, 4: 4, 6: 1, 8: 2, 9: 4}  # EXIF type -> bytes
_PNG = b"\x89PNG\r\n\x1a\n"
_TIFF = {b"II*\0": "little", b"MM\0*": "big"}
_TIFF_TAGS = (
    *(256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325),
    *(338, 339, 347, 529, 530, 531, 532),
)  # which change the pixels
_PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"gAMA")  # of the first picture, which change its pixels


def orientation(exif: bytes) -> int | None:
    """The orientation, 1 to 8, of an EXIF block; None if missing or invalid. Other tags are not read."""
    exif = exif.removeprefix(_EXIF)
    order: Literal["little", "big"] | None = {b"II": "little", b"MM": "big"}.get(exif[:2])  # type: ignore[assignment]
    if order is None:
        return None
    number = partial(_number, exif, order)
    first = number(4, 4)
    for at in range(first + 2, min(first + 2 + 12 * number(first, 2), len(exif) - 11), 12):
        size = _WHOLE_NUMBERS.get(number(at + 2, 2))
        if number(at, 2) == ORIENTATION and size and 1 <= number(at + 8, size) <= 8:
            return number(at + 8, size)
    return None


def bare_tiff(file: BinaryIO) -> tuple[BytesIO, bytes] | None:
    """`stripped` of an open TIFF; None for another format, or beyond LARGEST bytes."""
    start, size = file.read(4), file.seek(0, 2)
    file.seek(0)
    return _tiff(file.read()) if start in _TIFF and size <= LARGEST else None


def _number(content: bytes, order: Literal["little", "big"], at: int, size: int) -> int:
    return int.from_bytes(content[at : at + size], order)


def stripped(path: Any) -> tuple[BytesIO, bytes] | None:
    """(a PNG, JPEG or TIFF without its metadata, its EXIF block); None for another format, or beyond LARGEST bytes."""
    with path.open("rb") as file:
        start = file.read(8)
        if start == _PNG:
            return _png(file)
        if path.stat().st_size > LARGEST:
            return None
        if start[:4] in _TIFF:
            return _tiff(start + file.read())
        return _jpeg(start + file.read()) if start.startswith(b"\xff\xd8\xff") else None


def _png(file: BinaryIO) -> tuple[BytesIO, bytes]:
    kept, exif = BytesIO(), b""
    kept.write(_PNG)
    while len(head := file.read(8)) == 8:
        length, kind = int.from_bytes(head[:4]), head[4:]
        if kind in _PNG_CHUNKS and kept.tell() + length <= LARGEST:
            kept.write(head + file.read(length + 4))
        elif kind == b"eXIf" and length < 2**20:
            exif = file.read(length + 4)[:-4]
        else:
            file.seek(length + 4, 1)
    kept.seek(0)
    return kept, exif


def _tiff(content: bytes) -> tuple[BytesIO, bytes]:
    """With a directory at its end that has the tags of the first picture's pixels alone; the file is its EXIF block."""
    order: Any = _TIFF[content[:4]]
    first = _number(content, order, 4, 4)
    count = min(_number(content, order, first, 2), (len(content) - first) // 12)
    entries = [content[at : at + 12] for at in range(first + 2, first + 2 + 12 * count, 12)]
    kept = [entry for entry in entries if _number(entry, order, 0, 2) in _TIFF_TAGS]
    even = content + b"\0" * (len(content) % 2)  # a directory begins on a word
    directory = len(kept).to_bytes(2, order) + b"".join(kept) + bytes(4)
    return BytesIO(even[:4] + len(even).to_bytes(4, order) + even[8:] + directory), content


def _jpeg(content: bytes) -> tuple[BytesIO, bytes]:
    """Without application segments and comments; JFIF's and Adobe's stay, which name the colour space."""
    kept, exif, at = content[:2], b"", 2
    while at + 4 <= len(content) and content[at] == 0xFF and content[at + 1] != 0xDA:
        marker, end = content[at + 1], at + 2 + int.from_bytes(content[at + 2 : at + 4])
        if marker == 0xE1 and not exif and content.startswith(_EXIF, at + 4):
            exif = content[at + 4 : end]
        if marker in (0xE0, 0xEE) or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept += content[at:end]
        at = end
    return BytesIO(kept + content[at:]), exif
