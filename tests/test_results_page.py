"""Tables in README.md and docs/ are those of benchmarks/results."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sana_lab.ablation import plan
from sana_lab.report.claims import outcome_of

ROOT = Path(__file__).parents[1]


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import results_page

    yield results_page
    sys.modules.pop("results_page", None)


def test_committed_pages_show_the_results(page: Any):
    """Where this fails: python benchmarks/results_page.py"""
    assert [str(path.relative_to(ROOT)) for path in page.stale(ROOT)] == []


def test_a_block_is_filled_and_stays_so(page: Any):
    text = "before\n<!-- results: quickstart/table.md -->\nPREVIOUS\n<!-- /results -->\nafter\n"
    filled = page.fill(text)
    assert "| DiT baseline |" in filled
    assert "PREVIOUS" not in filled
    assert filled.startswith("before\n<!-- results: quickstart/table.md -->\n")
    assert filled.endswith("\n<!-- /results -->\nafter\n")
    assert page.fill(filled) == filled


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<!-- results: quickstart/table.md -->\n", "not closed"),
        ("<!-- results: none.md -->\n<!-- /results -->", "no results 'none.md'"),
        ("<!-- results: quickstart/samples.png -->\n<!-- /results -->", "no renderer"),
    ],
)
def test_wrong_blocks(page: Any, text: str, words: str):
    with pytest.raises(ValueError, match=words):
        page.fill(text)


def test_every_committed_result_is_shown(page: Any):
    """A file with numbers in benchmarks/results that no section and no other page shows is forgotten."""
    shown = {Path(name).parent.name or name for _, name, _ in page.SECTIONS} | {*page.CPU_FILES}
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    shown |= {block["name"].split("/")[0] for path in pages for block in page.BLOCK.finditer(path.read_text())}
    used_by_cards = {path.stem for path in page.WEIGHTS.glob("*.safetensors")}
    assert {path.name for path in page.RESULTS.iterdir()} <= shown | used_by_cards


def test_numbers_are_those_of_the_files(page: Any):
    memory = page.render("memory/sana_600m_1024.json")
    assert "| all on the device | 6.60 | 6.74 | 8.68 | 8.68 | -1.68 | 6.32 |" in memory
    quality = page.render("shapes_sana/eval.json")
    assert "| Exact | 0.85 [0.84, 0.86] |" in quality
    assert "| GenEval | 0.88 [0.87, 0.89] |" in quality
    speed = page.render("cpu")
    assert "| 21.7 s | 2.11 s | 10.31x | exact algebra |" in speed
    assert "| 113 s | 71.3 s | 1.59x | exact algebra |" in speed
    assert page.render("models").count("\n| `shapes_") == len(list(page.WEIGHTS.glob("*.safetensors")))
    assert page.render("quickstart/table.csv").splitlines()[0].count("|") == 8


def test_a_verdict_added_after_the_run_is_that_of_the_committed_cells(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import verdicts

    table = json.loads((verdicts.RESULTS / "objective" / "table.json").read_text())
    (late,) = [verdict for verdict in table["verdicts"] if verdict["why"].endswith(verdicts.ADDED)]
    cells = {row.label: row.cells["geneval"] for row in verdicts.rows(table)}
    outcome, why = outcome_of(cells["Flow matching"], cells["DDPM"], "geneval")
    assert (late["outcome"], late["why"]) == (outcome, f"{why}; {verdicts.ADDED}")
    expected = plan.load("paper/objective", scale="toy").table
    claims = verdicts.verdicts(verdicts.rows(table), expected.expect, expected.stand_in)
    assert len(claims) == 2
    assert verdicts.added(table, claims) == []
    earlier = {**table, "verdicts": table["verdicts"][:1]}
    assert [v.metric for v in verdicts.added(earlier, claims)] == ["geneval"]
    assert verdicts.inserted("a\n- Expected: x.\nb\n", []) == "a\n- Expected: x.\nb\n"
