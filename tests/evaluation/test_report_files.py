"""Reports in runs: numbers per image come back bit for bit, read when asked for; older reports are read as they are."""

import json
from pathlib import Path

import pytest
import torch

from sana_lab.config.specs import SpecError
from sana_lab.evaluation import compare, report_files
from sana_lab.report.significance import paired
from sana_lab.tracking.store import Store

NUMBERS = torch.randn(3000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def report(numbers: torch.Tensor) -> dict:
    values = {"value": float(numbers.mean()), "low": None, "high": None, "n": len(numbers)}
    return {
        "measures": {"m": {"values": {"score": values}, "settings": {}}},
        "per_image": {"score": {"values": numbers.tolist(), "drawn": "a", "images_per_prompt": 2}},
        "model": "x",
    }


def numbers(store: Store, run: str) -> Path:
    """The file of a run's numbers per image."""
    (path,) = store.file(run).glob("per_image-*.safetensors")
    return path


@pytest.fixture
def run(runs) -> tuple[Store, str]:
    store = Store(runs)
    run = store.start_run("evaluation", "a", {})
    report_files.write(store, run, report(NUMBERS))
    return store, run


def test_numbers_come_back(run):
    found, expected = report_files.read(*run), report(NUMBERS)
    column = found["per_image"]["score"]["values"]
    assert (list(column), len(column), column[7], column[-3:]) == (
        expected["per_image"]["score"]["values"],
        3000,
        float(NUMBERS[7]),
        NUMBERS[-3:].tolist(),
    )
    assert {**found, "per_image": None} == {**expected, "per_image": None}


def test_json_is_short_and_a_report_is_read_without_its_numbers(run):
    store, name = run
    assert store.file(name, "report.json").stat().st_size < 1000
    found = report_files.read(store, name)
    numbers(store, name).unlink()
    assert found["measures"] == report(NUMBERS)["measures"]
    for each in (found, report_files.read(store, name)):
        with pytest.raises(SpecError, match="does not hold the numbers per image of 'score'"):
            list(each["per_image"]["score"]["values"])


def test_a_kill_while_a_report_is_written_anew_leaves_the_old_one(run, monkeypatch):
    store, name = run

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "log_dict", killed)
    with pytest.raises(KeyboardInterrupt):
        report_files.write(store, name, report(NUMBERS + 1))
    assert list(report_files.read(store, name)["per_image"]["score"]["values"]) == NUMBERS.tolist()


def test_a_paired_test_is_that_of_lists(run):
    base = report(NUMBERS.flip(0) + 0.01)
    expected = paired(report(NUMBERS), base, "score")
    assert expected is not None
    assert paired(report_files.read(*run), base, "score") == expected


def test_reports_of_earlier_versions_are_read(run):
    store, name = run
    store.log_dict(name, report(NUMBERS), "report.json")
    assert report_files.read(store, name) == report(NUMBERS)


def test_a_report_is_written_over_itself(run):
    """As where a measure is appended."""
    store, name = run
    report_files.write(store, name, report_files.read(store, name))
    assert list(report_files.read(store, name)["per_image"]["score"]["values"]) == NUMBERS.tolist()


class TestCompare:
    def test_reads_a_runs_artifacts(self, run):
        found = compare.read(run[0].file(run[1], "report.json"))
        assert found == report(NUMBERS)

    def test_names_what_is_missing_or_wrong(self, run):
        store, name = run
        path = store.file(name, "report.json")
        numbers(store, name).write_bytes(b"x" * 20)
        with pytest.raises(SpecError, match="does not hold the numbers per image"):
            compare.read(path)
        numbers(store, name).unlink()
        with pytest.raises(SpecError, match="there is none beside it; copy both"):
            compare.read(path)

    def test_a_count_that_is_none(self, run, tmp_path):
        path = tmp_path / "x.json"
        path.write_text(json.dumps({**report(NUMBERS), "per_image": {"score": {"values": True}}}))
        with pytest.raises(SpecError, match="values"):
            compare.read(path)
