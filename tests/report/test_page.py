"""The HTML page, read back by Python's own parser."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from sana_lab.report import page
from sana_lab.report.html import Outcomes
from sana_lab.report.table import Cell, Published, Row, Table, build_table

NASTY = "50% & <b>bold</b> \"quoted\" 'and' | more"


class Reader(HTMLParser):
    """Texts by tag, sources of images, and tags that were not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.images: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.images.append(dict(attributes)["src"] or "")
        elif tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)


@pytest.fixture
def table() -> Table:
    shared = {"seed": 0, "status": "finished", "error": None, "run_id": "r", "commit": "c" * 40}
    records = [
        {**shared, "label": label, "labels": {"row": label}, "metrics": {"geneval": value}}
        for label, value in ((NASTY, 0.5), ("second", 0.75))
    ]
    paper = Published("Table 8", "arXiv 1", [Row("SANA", {}, {"fid": Cell(5.81, None, None, 1, ())}, "published", ())])
    return build_table(records, title=NASTY, notes=["A note < that."], published=paper)


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    assert reader.open == []
    return reader


def test_it_holds_table_notes_and_pictures(table: Table, tmp_path: Path):
    picture = tmp_path / "training_loss.png"
    Image.new("RGB", (8, 8), "red").save(picture)
    path = page.write(table, [picture], tmp_path)
    picture_bytes = picture.read_bytes()
    picture.unlink()
    reader = read(path)
    assert path.name == "report.html"
    assert reader.texts["h1"] == reader.texts["title"] == [NASTY]
    assert reader.texts["button"][:2] == ["Row", "GenEval ↑"]
    assert {NASTY, "second", "0.50", "5.81"} <= set(reader.texts["td"])
    assert reader.texts["b"] == ["0.75"]  # the best
    assert "A note < that." in reader.texts["li"]
    assert reader.texts["h2"] == ["Table", "Curves", "Notes"]
    assert reader.texts["figcaption"] == ["Training loss."]
    (source,) = reader.images
    assert base64.b64decode(source.removeprefix("data:image/png;base64,")) == picture_bytes


def test_numbers_name_their_runs_and_are_sorted_by_value(table: Table):
    text = page.to_html(table)
    assert '<td data-value="0.75" title="n = 1; runs: r"><b>0.75</b></td>' in text


def test_samples_of_several_steps_have_a_slider(table: Table, tmp_path: Path):
    for step in (10, 20):
        Image.new("RGB", (4, 4), (step, 0, 0)).save(tmp_path / f"{step}.png")
    files = {10: tmp_path / "10.png", 20: tmp_path / "20.png"}
    steps = {"first": files, "second": {10: files[10]}}
    text = page.to_html(table, content=page.Content("Which?", "The second.", steps))
    assert 'data-steps="[10, 20]"' in text
    assert [line.count('alt="second, step 10"') for line in text.splitlines() if "second, step" in line] == [2]
    assert "Samples during training" not in page.to_html(table, content=page.Content(steps={"first": {10: files[10]}}))


def test_outcomes_are_data_that_no_text_breaks_out_of(table: Table):
    rows = [Outcomes(NASTY, {"</script>": 0.5}, {"</script>": "colors"}, {}), Outcomes("b", {"</script>": 1.0}, {}, {})]
    text = page.to_html(table, content=page.Content(outcomes=rows))
    data = json.loads(text.partition('<script type="application/json">')[2].partition("</script>")[0])
    assert data["prompts"] == ["</script>"]
    assert [row["shares"] for row in data["rows"]] == [[0.5], [1.0]]
    assert data["tasks"] == ["colors"]


def test_nothing_is_loaded_from_elsewhere(table: Table):
    assert not re.search(r"(src|href)=\"(?!data:|#)|url\(|@import", page.to_html(table))
