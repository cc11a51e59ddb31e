"""The user's archives: found, verified, read; and what is said of one that is missing or another."""

from pathlib import Path

import pytest
import tiny_emoji

from sana_lab.emoji import archives


def test_members_of_an_archive(emoji: Path):
    files = archives.drawings(emoji, "noto")
    table = tiny_emoji.entries()
    assert files.keys() == {archives.code(e["hexcode"]) for row in table for e in (row, *row.get("skins", ()))}
    assert all(content.startswith(b"\x89PNG") for content in files.values())
    assert archives.names(emoji) == table


def test_codes_are_without_variation_selectors():
    assert archives.code("1F6B6-200D-2640-FE0F-200D-27A1-FE0F") == "1f6b6-200d-2640-200d-27a1"


def test_a_missing_archive_names_the_command_that_fetches_it(emoji: Path):
    (emoji / "emojibase-data-17.0.0.tgz").rename(emoji / "emojibase-data-16.0.3.tgz")
    with pytest.raises(ValueError, match=r"no .*emojibase-data-17\.0\.0\.tgz \(there is emoji-.*; fetch it: ") as e:
        archives.check(emoji)
    assert str(e.value).endswith(
        f"npm pack --pack-destination {emoji} emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 "
        "emojibase-data@17.0.0"
    )


def test_no_folder_at_all(here: Path):
    with pytest.raises(ValueError, match=r"there is no nowhere/emoji-datasource-google-16\.0\.0\.tgz; fetch it"):
        archives.check(Path("nowhere"))


def test_an_archive_with_another_content(emoji: Path):
    path = emoji / archives.ARCHIVES["twemoji"].file
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"twitter-16\.0\.0\.tgz has sha256 .*, expected .*fetch it again"):
        archives.drawings(emoji, "twemoji")
