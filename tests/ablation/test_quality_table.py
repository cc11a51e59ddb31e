"""Notes of a quality table: what its numbers were measured on."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import tiny

from sana_lab.ablation import quality_table
from sana_lab.ablation.record import TrialRecord
from sana_lab.config import experiments
from sana_lab.config.schema import Ablation, Trial
from sana_lab.report import significance
from sana_lab.report.render import to_markdown
from sana_lab.report.table import build_table
from sana_lab.tracking.store import Run


def record(
    overrides: Sequence[str] = (), metrics: Mapping[str, float] = {}, tags: Mapping[str, str] = {}, label: str = "row"
) -> TrialRecord:
    """A finished trial of `tiny` in the working directory."""
    measured = {"prompts": 6.0, "images": 36.0, "geneval": 0.5, "fid": 1.0, **metrics}
    run = Run("id", label, "FINISHED", dict(tags), {}, measured, 0.0, 1.0, "sweep", None)
    return TrialRecord(Trial({"model": label}, 0, experiments.load("tiny", overrides)), label, label, run)


@pytest.fixture(autouse=True)
def folder(here):
    tiny.write_experiment(here)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "6 prompts, 36 images a row; same prompts, same noise."),
        (["eval.noise_seeds=3"], "36 images a row, a share of each of 3 seeds of noise (43, 44, 45); same prompts"),
    ],
)
def test_prompts_images_and_seeds_of_noise_are_stated(overrides: Sequence[str], words: str):
    notes = quality_table.measurement_notes([record(overrides)])
    assert [note for note in notes if words in note]


def test_the_largest_range_between_seeds_of_noise_is_stated():
    values = [{"geneval": [0.50, 0.52], "geneval_colors": [0, 1]}, {"geneval": [0.30, 0.36]}]
    reports = {str(i): {"by_noise_seed": {"seeds": [43, 44], "values": v}} for i, v in enumerate(values)}
    (note,) = quality_table.noise_note(reports)
    assert note.endswith("Largest range between the seeds of one row: GenEval 0.06.")
    assert quality_table.noise_note({"a": {"measures": {}}}) == []


def test_rows_of_another_tier_are_marked_and_never_the_best():
    """A step cache and fewer bits are approximations: their rows have a tier, and bold is of the exact rows alone."""
    rows = [
        record(metrics={"geneval": 0.4}, label="one"),
        record(metrics={"geneval": 0.5}, label="other"),
        record(["sampling.cache=tea"], {"geneval": 0.9}, label="cached"),
        record(["sampling.cache=tea", "sampling.quantize=fp8_simulated"], {"geneval": 0.8}, label="both"),
    ]
    labels = [trial["labels"] for trial in quality_table.with_tiers(rows)]
    assert [label["tier"] for label in labels] == ["exact", "exact", "step cache", "step cache, quantised"]
    table = build_table(quality_table.with_tiers(rows), title="t", columns=["geneval"])
    assert table.axes == ["model", "tier"]
    assert significance.best(table.rows, table.columns[0]) == {1}
    assert "| cached | step cache | 0.90 |" in to_markdown(table)
    assert [note for note in quality_table.measurement_notes(rows) if note.startswith("Tier: exact rows")]


def test_rows_whose_chooser_is_a_judge_of_the_table_are_oracles():
    """By the measures of the columns, whatever the rows are called; exact_shapes and geneval read one detector."""
    rows = [
        record(metrics={"geneval": 0.4}, label="oracle"),
        record(["sampling.best_of=4", "sampling.best_by=geneval"], {"geneval": 0.9}, label="best"),
        record(["sampling.best_of=4", "sampling.best_by=clip_shapes"], {"geneval": 0.5}, label="chosen"),
    ]
    tiers = {
        column: [row["labels"].get("tier") for row in quality_table.with_tiers(rows, ["val_loss", column])]
        for column in ("geneval_colors", "exact", "clip_shapes", "fd_shapes")
    }
    assert tiers["geneval_colors"] == tiers["exact"] == ["exact", "oracle", "exact"]
    assert tiers["clip_shapes"] == ["exact", "exact", "oracle"]
    assert tiers["fd_shapes"] == [None, None, None]
    (note,) = quality_table.oracle_notes(rows, ["geneval"])
    assert note.startswith("Tier: images of oracle rows are chosen by what judges them in columns here (geneval)")
    assert quality_table.oracle_notes(rows, ["fd_shapes"]) == []
    table = build_table(quality_table.with_tiers(rows, ["geneval"]), title="t", columns=["geneval"])
    assert significance.best(table.rows, table.columns[0]) == {2}


def test_a_table_of_exact_rows_has_no_tier():
    rows = [record(label="one"), record(label="other")]
    assert [trial["labels"] for trial in quality_table.with_tiers(rows)] == [{"model": "one"}, {"model": "other"}]
    assert not [note for note in quality_table.measurement_notes(rows) if "Tier" in note]


def test_generation_is_plotted_over_reconstruction_where_both_are_measured(tmp_path: Path):
    def names(**metrics: float) -> set[str]:
        rows = [
            {"label": label, "labels": {"row": label}, "seed": 0, "status": "finished", "error": None, "run_id": "r"}
            | {"metrics": {name: value + i for name, value in metrics.items()}, "commit": None}
            for i, label in enumerate("ab")
        ]
        ablation = Ablation(title="T", base="tiny", axes={"row": {"a": None, "b": None}})
        folder = tmp_path / str(len(metrics))
        return {path.name for path in quality_table.metric_plots(ablation, build_table(rows, title="T"), folder)}

    assert names(geneval=0.1, psnr=30.0) == {"geneval.png", "geneval_psnr.png"}
    assert names(psnr=30.0) == {"psnr.png"}
