"""The four formats, read back by other readers than the writer."""

import csv
import io
import json
import re
import shutil
import subprocess
from datetime import date

import pytest

from sana_lab.report.render import to_csv, to_json, to_latex, to_markdown, write
from sana_lab.report.table import Cell, Published, Row, build_table

PAPER = Published("Table 8", "arXiv 1", [Row("SANA_0.6B", {}, {"fid": Cell(5.81, None, None, 1, ())}, "published", ())])
NASTY = r"50% & \x_1 {a} | #2 ~ ^ $ <b> *"


def record(label, seed=0, status="finished", error=None, labels=None, **metrics):
    common = {"label": label, "labels": labels or {"row": label}, "seed": seed, "status": status, "error": error}
    return common | {"metrics": metrics, "run_id": f"run-{label}-{seed}", "commit": "c" * 40}


@pytest.fixture
def table():
    records = [
        record(
            "base", params_m=0.7, latency_ms=1234.5, geneval=0.5, geneval_low=0.45, geneval_high=0.55, psnr=float("inf")
        ),
        record("+ linear", params_m=0.7, latency_ms=99.94, geneval=0.6, geneval_low=0.54, geneval_high=0.65),
        record("+ broken", status="failed", error=NASTY),
    ]
    return build_table(records, title=NASTY, notes=["Latency at 1024 px."], published=PAPER, day=date(2026, 1, 2))


def cells(line):
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_markdown_has_one_cell_for_each_column_and_bold_for_the_best(table):
    lines = [cells(line) for line in to_markdown(table).splitlines() if line.startswith("|")]
    assert lines[0] == ["Row", "Params (M)", "Latency (ms) ↓", "GenEval ↑", "PSNR (dB) ↑"]
    assert lines[2] == ["base", "0.700", "1234", "0.50 [0.45, 0.55]", "inf"]
    assert lines[3] == ["+ linear", "0.700", "**99.9**", "**0.60 [0.54, 0.65]**", "—"]
    assert lines[4] == ["+ broken [1]", "—", "—", "—", "—"]


def test_markdown_puts_errors_notes_and_published_rows_apart(table):
    text = to_markdown(table)
    notes = [line[2:] for line in text.splitlines() if line.startswith("- ")]
    assert notes[0].startswith(r"[1] + broken, seed 0 failed: 50% & \\x\_1 {a} \| #2")
    assert notes[-2:] == ["Latency at 1024 px.", "Made 2026-01-02, at commit cccccccccc."]
    ours, theirs = text.split("**Published, not measured here: Table 8 (arXiv 1)**")
    assert "5.81" not in ours
    assert r"| SANA\_0.6B | 5.81 |" in theirs


def test_a_published_number_stands_beside_ours_of_the_same_label_and_is_never_the_best():
    row = Row("a", {}, {"fid": Cell(1.25, None, None, 1, ()), "clip": Cell(27.1, None, None, 1, ())}, "published", ())
    paper = Published("Table 9", "arXiv 1", [row], ("At 512 px.",))
    table = build_table([record("a", fid=6.0, psnr=30.0), record("b", fid=7.0, psnr=31.0)], title="T", published=paper)
    text = to_markdown(table)
    lines = [cells(line) for line in text.splitlines() if line.startswith("|")]
    assert lines[0] == ["Row", "FID ↓", "FID ↓, published", "PSNR (dB) ↑"]
    assert lines[2] == ["a", "**6.00**", "1.25", "30.00"]
    assert lines[3] == ["b", "7.00", "—", "**31.00**"]
    assert "| a | 27.1 | 1.25 |" in text
    assert "At 512 px." in text
    assert "At 512 px." in to_latex(table)
    assert "FID $\\downarrow$, published" in to_latex(table)
    assert [r["cells"]["fid"]["mean"] for r in json.loads(to_json(table))["rows"]] == [6.0, 7.0]


def test_spread_is_shown_with_the_means_decimals_and_not_where_it_is_nought():
    records = [record("a", seed, geneval=0.5 + 0.1 * seed, params_m=0.7) for seed in range(3)]
    assert "| a | 0.700 | 0.60 ± 0.10 |" in to_markdown(build_table(records, title="T"))


def test_a_row_with_fewer_seeds_says_how_many():
    records = [record("a", 0, fid=1.0), record("a", 1, fid=2.0), record("b", 0, fid=3.0), record("b", 1, "failed")]
    lines = [cells(line) for line in to_markdown(build_table(records, title="T")).splitlines() if line.startswith("|")]
    assert [line[:2] for line in lines] == [["Row", "Seeds"], [":--", ":--"], ["a", "2"], ["b [1]", "1"]]


def test_two_axes_are_two_columns():
    records = [record("x, 5", labels={"solver": "x", "steps": "5"}, fid=1.0)]
    assert "| Solver | Steps | FID ↓ |" in to_markdown(build_table(records, title="T"))
    assert to_csv(build_table(records, title="T")).splitlines()[0].startswith("solver,steps,status,")


def test_latex_escapes_what_latex_reads(table):
    text = to_latex(table)
    escaped = r"50\% \& \textbackslash{}x\_1 \{a\} \textbar{} \#2 \textasciitilde{} \textasciicircum{} \$"
    assert rf"\caption{{{escaped}" in text
    body = text.split(r"\midrule")[1].split(r"\bottomrule")[0]
    assert [line.count("&") for line in body.strip().splitlines()] == [4, 4, 4]
    assert r"\textbf{99.9}" in body
    assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex here")
def test_latex_compiles(table, tmp_path):
    head = r"\documentclass{article}\usepackage[T1]{fontenc}\usepackage{booktabs,graphicx}\begin{document}"
    (tmp_path / "t.tex").write_text(head + to_latex(table) + r"\end{document}", encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-draftmode", "t.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:]


def test_csv_is_unrounded_and_carries_runs_and_errors(table):
    lines = list(csv.DictReader(io.StringIO(to_csv(table))))
    assert [float(line["latency_ms"]) for line in lines[:2]] == [1234.5, 99.94]
    assert [line["status"] for line in lines] == ["finished", "finished", "failed", "published"]
    assert lines[0]["run_ids"] == "run-base-0"
    assert [float(line["geneval_low"]) for line in lines[:2]] == [0.45, 0.54]
    assert lines[2]["errors"].endswith(NASTY)
    assert "geneval_std" not in lines[0]  # nothing to say


def test_csv_keeps_an_axis_that_has_the_name_of_a_metric():
    records = [record("5", labels={"steps": "5"}, steps=5, fid=1.0)]
    (line,) = csv.DictReader(io.StringIO(to_csv(build_table(records, title="T"))))
    assert line["steps"] == "5"


def test_json_names_the_run_behind_each_cell_and_is_strict(table):
    data = json.loads(to_json(table), parse_constant=lambda text: pytest.fail(text))
    assert data["rows"][0]["cells"]["geneval"] == {
        "mean": 0.5, "std": None, "interval": [0.45, 0.55], "n": 1, "run_ids": ["run-base-0"]
    }  # fmt: skip
    assert data["rows"][0]["cells"]["psnr"]["mean"] is None  # infinity
    assert data["published"]["rows"][0]["label"] == "SANA_0.6B"


def test_write_makes_the_folder_and_four_files(table, tmp_path):
    paths = write(table, tmp_path / "deep" / "er", "quickstart")
    assert [p.name for p in paths] == ["quickstart.md", "quickstart.tex", "quickstart.csv", "quickstart.json"]
    assert paths[0].read_text(encoding="utf-8") == to_markdown(table)
