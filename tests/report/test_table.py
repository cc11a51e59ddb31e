"""Trials grouped over seeds: means against numpy, holes, intervals, commits."""

import re
from datetime import date

import numpy as np
import pytest

from sana_lab.config import experiments
from sana_lab.report.columns import COLUMNS, column
from sana_lab.report.significance import best
from sana_lab.report.table import Cell, build_table, load_published

DAY = date(2026, 11, 23)
SHA = "0123456789" * 4


def record(label="a", seed=0, status="finished", commit=SHA, error=None, labels=None, **metrics):
    return {
        "label": label, "labels": labels or {"attention": label}, "seed": seed, "status": status, "error": error,
        "metrics": metrics, "run_id": f"run-{label}-{seed}", "commit": commit, "key": "k",
    }  # fmt: skip


def test_seeds_become_mean_spread_and_count():
    values = [0.5, 0.7, 0.75]
    table = build_table([record(seed=s, geneval=v) for s, v in enumerate(values)], title="T")
    cell = table.rows[0].cells["geneval"]
    assert cell.mean == pytest.approx(np.mean(values))
    assert cell.std == pytest.approx(np.std(values, ddof=1))
    assert cell.n == 3
    assert cell.run_ids == ("run-a-0", "run-a-1", "run-a-2")
    assert table.rows[0].seeds == (0, 1, 2)
    assert any("3 seeds in each row: 0, 1, 2" in note for note in table.notes)


def test_one_seed_has_no_spread_but_its_interval():
    table = build_table([record(geneval=0.5, geneval_low=0.45, geneval_high=0.55)], title="T")
    assert table.rows[0].cells == {"geneval": Cell(0.5, None, (0.45, 0.55), 1, ("run-a-0",))}
    assert [c.name for c in table.columns] == ["geneval"]


def test_rows_keep_the_order_of_the_records():
    table = build_table([record("b"), record("a"), record("b", seed=1)], title="T")
    assert [row.label for row in table.rows] == ["b", "a"]


def test_a_failed_trial_is_a_hole_with_its_reason_and_the_other_seeds_count():
    records = [
        record("a", 0, psnr=30.0),
        record("a", 1, status="failed", error="NaN loss at step 7\nTraceback ..."),
        record("b", 0, status="failed", error="out of memory"),
        record("c", 0, status="missing"),
    ]
    a, b, c = build_table(records, title="T").rows
    assert (a.status, a.cells["psnr"].n, a.errors) == ("finished", 1, ("a, seed 1 failed: NaN loss at step 7",))
    assert (b.status, b.cells, b.errors) == ("failed", {}, ("b, seed 0 failed: out of memory",))
    assert (c.status, c.errors) == ("missing", ("c, seed 0: not run yet",))


def test_what_is_none_or_not_a_number_is_a_hole():
    table = build_table([record(fid=None, psnr=float("nan"), ssim=0.9)], title="T")
    assert list(table.rows[0].cells) == ["ssim"]


def test_columns_are_those_asked_for_in_that_order_and_absent_ones_are_said():
    table = build_table([record(params_m=1.0, geneval=0.5)], title="T", columns=["geneval", "fid", "params_m"])
    assert [c.name for c in table.columns] == ["geneval", "params_m"]
    assert "Not measured: FID." in table.notes


def test_a_table_of_failures_keeps_its_columns():
    table = build_table([record(status="failed")], title="T", columns=["geneval", "fid"])
    assert [c.name for c in table.columns] == ["geneval", "fid"]


def test_unasked_columns_come_in_the_order_of_the_registry_and_unknown_ones_last():
    table = build_table([record(mystery=1, geneval=0.5, params_m=2.0)], title="T")
    assert [c.name for c in table.columns] == ["params_m", "geneval", "mystery"]


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("params_m", "Params (M)"), ("latency_ms", "Latency (ms) ↓"), ("images_per_s", "Throughput (img/s) ↑"),
        ("geneval_two_object", "Two ↑"), ("upsample_ms", "Upsample (ms) ↓"), ("my_metric", "My metric"),
        ("tokens_per_s", "Tokens (/s) ↑"), ("distill_loss", "Distill loss ↓"),
    ],
)  # fmt: skip
def test_column_titles_give_unit_and_better_side(name, title):
    assert column(name).title == title


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.7123, "0.712"),
        (12.0, "12.0"),
        (592.4, "592"),
        (12345.6, "12346"),
        (0.0012345, "0.00123"),
        (0, "0"),
        (9.996, "10.0"),
    ],
)
def test_three_significant_digits_without_exponents(value, text):
    assert column("gmacs").text(value) == text


def test_best_follows_the_direction_and_ties_in_print_share_it():
    table = build_table([record("a", fid=5.0, psnr=30.001), record("b", fid=4.0, psnr=30.002)], title="T")
    assert best(table.rows, column("fid")) == {1}
    assert best(table.rows, column("psnr")) == frozenset()  # the same in print: nothing is better
    assert best(table.rows, column("params_m")) == frozenset()  # no side is better


def test_several_axes_are_several_label_columns():
    rows = [record(f"{a}, {s}", labels={"solver": a, "steps": s}) for a in ("euler", "heun") for s in ("5", "10")]
    assert build_table(rows, title="T").axes == ["solver", "steps"]


def test_rows_from_different_commits_are_said():
    one = build_table([record("a"), record("b")], title="T", machine="a laptop", day=DAY)
    assert one.notes[-1] == "Made 2026-11-23 on a laptop, at commit 0123456789."
    two = build_table([record("a"), record("b", commit="f" * 40 + "-dirty")], title="T", day=DAY)
    assert two.notes[-1] == "Made 2026-11-23, from DIFFERENT commits (0123456789: a; ffffffffff-dirty: b)."
    assert build_table([record(commit=None)], title="T", day=DAY).notes[-1] == "Made 2026-11-23, at no known commit."


def test_no_records_are_refused():
    with pytest.raises(ValueError, match="'T' has no records"):
        build_table([], title="T")


def test_published_numbers_are_read_with_their_source(tmp_path):
    path = tmp_path / "paper.yaml"
    path.write_text("title: Table 8\nsource: arXiv 2410.10629\nrows:\n- {label: SANA-0.6B, params_m: 590, fid: 5.81}\n")
    published = load_published(path)
    assert (published.title, published.source) == ("Table 8", "arXiv 2410.10629")
    assert published.rows[0].cells["fid"].mean == 5.81
    assert published.rows[0].status == "published"
    assert published.cell("SANA-0.6B", "params_m").mean == 590
    assert published.cell("SANA-0.6B", "clip") is published.cell("SANA-1.6B", "fid") is None


def test_nothing_of_published_numbers_is_resolved(tmp_path, monkeypatch):
    monkeypatch.setenv("PLACE", "a-value-of-the-environment")
    path = tmp_path / "paper.yaml"
    path.write_text("title: '${oc.env:PLACE}'\nsource: s\nrows: [{label: a, fid: 1}]\n")
    assert load_published(path).title == "${oc.env:PLACE}"


def test_conditions_and_notes_of_published_numbers_are_kept(tmp_path):
    path = tmp_path / "paper.yaml"
    path.write_text("title: t\nsource: s\nconditions: A100\nnotes: [as printed]\nrows: [{label: a, fid: 1}]\n")
    assert load_published(path).notes == ("A100", "as printed")


PAPER = sorted(experiments.locate("eval/published", "sana_table8").parent.absolute().glob("*.yaml"))


@pytest.mark.parametrize("path", PAPER, ids=[p.stem for p in PAPER])
def test_every_published_file_is_read_and_its_metrics_are_known(path):
    published = load_published(path)
    assert re.search(r"arXiv \d{4}\.\d{5}|huggingface\.co/", published.source)
    assert not path.stem.startswith(("sana_table", "sana_figure")) or published.source.startswith("arXiv 2410.10629")
    assert published.notes
    assert all(row.cells for row in published.rows)
    assert {c.name for c in COLUMNS} >= {name for row in published.rows for name in row.cells if "dpg_" not in name}


def test_the_papers_tables_are_all_there():
    names = {path.stem.split("_")[1] for path in PAPER if path.stem.startswith(("sana_t", "sana_f"))}
    assert names == {"figure2"} | {f"table{i}" for i in (1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12, 13, 14)}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("rows: []", "expected the keys title, source and rows"),
        ("{title: t, source: s, rows: [{fid: 1}]}", "a row is without a label"),
        ("{title: t, source: s, rows: [x]}", "a row is not a mapping"),
        ("{title: t, source: s, rows: [{label: a, fid: 1}, {label: a, fid: 2}]}", "'a' is the label of several rows"),
        ("{title: t, source: s, rows: [{label: a, fid: low}]}", "fid of 'a' is 'low', expected a number"),
    ],
)
def test_published_files_of_another_form_are_refused(tmp_path, text, match):
    (tmp_path / "paper.yaml").write_text(text)
    with pytest.raises(ValueError, match=match):
        load_published(tmp_path / "paper.yaml")


def test_two_seeds_are_few_and_the_table_says_so():
    values = {n: build_table([record(seed=s, geneval=0.1 * s) for s in range(n)], title="T") for n in (1, 2, 3)}
    assert {n for n, table in values.items() if any("2 seeds are few" in note for note in table.notes)} == {2}
