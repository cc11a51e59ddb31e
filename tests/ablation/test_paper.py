"""The paper's ablations: each loads, resolves and builds at both scales, and speaks of rows that the paper has."""

import functools
from pathlib import Path

import pytest

from sana_lab import __main__
from sana_lab.ablation import plan, quality
from sana_lab.ablation.quality_table import tabulate
from sana_lab.config import experiments, schema
from sana_lab.costs.flops import PAIR
from sana_lab.models.text import loading
from sana_lab.report.columns import column
from sana_lab.report.table import load_published
from sana_lab.training import checks

EFFICIENCY = [name for name in experiments.available("ablations", "paper") if plan.compares_efficiency(name)]
NAMES = [name for name in experiments.available("ablations", "paper") if name not in EFFICIENCY]
BY_SCALE = [(name, scale) for name in NAMES for scale in (None, "toy")]


def test_every_ablation_of_the_paper_has_a_file():
    assert {Path(name).name for name in NAMES} == {
        "block_design", "autoencoder_split", "latent_channels", "text_encoder", "instruction",
        "objective", "captions", "sampler_steps", "model_size",
    }  # fmt: skip
    assert {Path(name).name for name in EFFICIENCY} == {"table8", "table9", "table14", "figure2"}


@functools.cache
def loaded(name: str, scale: str | None = None) -> tuple[schema.Ablation, list[schema.Trial]]:
    _, ablation, trials = plan.load(name, scale=scale)[:3]
    assert isinstance(ablation, schema.Ablation)
    return ablation, trials


@pytest.mark.parametrize(("name", "scale"), BY_SCALE)
def test_every_trial_builds_and_is_one_of_its_own(name: str, scale: str | None, here: Path):
    ablation, trials = loaded(name, scale)
    assert len(trials) == len(ablation.seeds) * len({t.label for t in trials}) == len({str(t.config) for t in trials})
    built = {str(t.config["system"]): t for t in reversed(trials) if t.seed == ablation.seeds[0]}
    for trial in built.values():
        checks.check(trial.config)


@pytest.mark.parametrize("name", NAMES)
def test_the_toy_scale_is_the_embedded_world_with_the_papers_expectation(name: str):
    paper, toy = loaded(name), loaded(name, "toy")
    of_quality = [e for e in paper[0].expect if e.metric != "images_per_s"]  # speed is timed by the efficiency tables
    assert of_quality == toy[0].expect != []
    assert {experiments.image_size(t.config["data"]) for t in toy[1]} == {64}
    assert all(column(toy[0].stand_in.get(e.metric, e.metric)).better for e in toy[0].expect)
    assert {toy[0].stand_in.get(e.metric, e.metric) for e in toy[0].expect} <= {*toy[0].columns}


@pytest.mark.parametrize("name", [n for n in NAMES if loaded(n)[0].published])
def test_rows_have_the_published_labels_and_expect_what_is_published(name: str):
    """Every row is one of the paper's, and the expected orders are those of its numbers."""
    ablation, trials = loaded(name)
    published = load_published(experiments.locate("eval/published", ablation.published))
    assert {t.label for t in trials} <= {row.label for row in published.rows}
    for expected in ablation.expect:
        numbers = [published.cell(label, expected.metric).mean for label in expected.order]
        assert numbers == sorted(numbers, reverse=column(expected.metric).better == "higher")


def test_a_table_says_what_is_reproduced_beside_what_was_published():
    """On made-up measurements: flow matching better by far over two seeds, at toy scale."""
    ablation, trials = loaded("paper/objective", "toy")
    measured = {"Flow matching": 0.3, "DDPM": 0.8}
    records = [
        {"label": t.label, "labels": t.labels, "seed": t.seed, "status": "finished", "error": None, "commit": None,
         "metrics": {"fd_shapes": measured[t.label] + 0.01 * t.seed, "fid": 9.0}, "run_id": None}
        for t in trials
    ]  # fmt: skip
    table = tabulate(ablation, records)
    assert table.notes[0].startswith(
        "Expected: 'Flow matching' better than 'DDPM' in FD-shapes. Reproduced: difference +0.5"
    )
    assert table.published.cell("DDPM", "fid").mean == 19.5
    worse = [{**r, "metrics": {"fd_shapes": -r["metrics"]["fd_shapes"]}} for r in records]
    assert "Not reproduced: difference -0.5" in tabulate(ablation, worse).notes[0]


def test_macs_of_a_guided_pair_come_with_how_they_are_counted():
    """Whatever the bench size: the column's own definition stands under the table, and under no other's."""
    ablation, trials = loaded("paper/block_design")
    base = {"labels": {}, "seed": 0, "status": "finished", "error": None, "commit": None, "run_id": None}
    records = [{**base, "label": t.label, "metrics": {"tmacs_pair": 1.0, "images_per_s": 2.0}} for t in trials]
    assert any(note == f"MACs of a guided pair: {PAIR}." for note in tabulate(ablation, records).notes)
    bare = [{**r, "metrics": {"images_per_s": 2.0}} for r in records]
    assert not any(PAIR in note for note in tabulate(ablation, bare).notes)


@pytest.mark.parametrize(
    ("name", "published"), [("paper/text_encoder", "text_params_m"), ("paper/model_size", "dit_params_b")]
)
def test_parameters_stand_beside_those_of_the_same_network(name: str, published: str):
    ablation, _ = loaded(name)
    theirs = load_published(experiments.locate("eval/published", ablation.published))
    assert published in ablation.columns
    assert all("params_m" not in row.cells for row in theirs.rows)
    assert any(published in row.cells for row in theirs.rows)
    stage = {"params_m": 5.0, "latency_s": 0.2}
    flat = quality.costs({"params_m": 12.0, "stages": {"text": {"params_m": 7.0, "latency_s": 0.1}, "denoise": stage}})
    assert flat == {"params_m": 12.0, "dit_params_m": 5.0, "dit_params_b": 0.005, "text_params_m": 7.0, "text_s": 0.1}


@pytest.mark.parametrize("name", NAMES)
def test_every_trial_is_checked_without_a_network(name: str, here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loading, "HfApi", None)
    for trial in {str(t.config["system"]): t for t in loaded(name)[1]}.values():
        checks.check(trial.config)


def test_a_scale_is_an_option_of_the_verb_and_part_of_the_sweeps_name(here: Path, capsys: pytest.CaptureFixture[str]):
    assert __main__.main(["ablate", "paper/objective", "--scale", "toy", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Training objective (shapes, 64 px")
    assert sum(" model " in line for line in lines) == 2 * 3
    assert lines[7].startswith("6 trainings: ")
    assert plan.sweep_name("paper/objective", "toy") == "paper-objective-toy"
    assert __main__.main(["ablate", "paper/objective", "--scale", "tiny", "--dry-run"]) == 1
    assert "has no scale 'tiny'" in capsys.readouterr().err
