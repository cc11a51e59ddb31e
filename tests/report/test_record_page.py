"""Pages of one evaluation and of one benchmark."""

import re

import numpy as np
import sweeps

from sana_lab.report import record_page


def words(text: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<(style|script).*?</\1>|<[^>]+>", " ", text, flags=re.S))


def test_an_evaluation_shows_measures_tasks_outcomes_and_origin():
    report = sweeps.report_of(np.random.default_rng(0), 0.5) | {"model": "abc", "environment": {"cpu": "some CPU"}}
    text = record_page.evaluation("shapes", report, {report["exact"]["outcomes"][0]["prompt"]: "UklG"})
    shown = words(text)
    value = report["measures"]["exact"]["values"]["exact"]
    assert f"Exact ↑ {value['value']:.4g} {value['low']:.4g} {value['high']:.4g} 12" in shown
    assert "Exact by task" in shown
    assert "color attr" in shown
    assert "some CPU" in shown
    assert '"UklG"' in text
    assert report["exact"]["outcomes"][0]["prompt"] in text


def test_a_reconstruction_has_its_intervals():
    report = {"reconstruction": {"psnr": 21.25, "psnr_interval": [20.5, 22.0], "n": 8}, "environment": {}}
    assert "PSNR (dB) ↑ 21.25 20.5 22 8" in words(record_page.evaluation("vae", report))


def test_a_benchmark_shows_stages_totals_and_definitions():
    stages = {"text": {"gmacs": 1.5, "latency_s": 0.25, "energy_j": None}, "total": {"gmacs": 3.0, "latency_s": 0.5}}
    record = {
        "size": 64,
        "latency_s": 0.5,
        "stages": stages,
        "notes": ["A MAC is a product and a sum."],
        "settings": {},
    }
    shown = words(record_page.benchmark("shapes", record))
    assert "Stage MACs (G) ↓ Latency (s) ↓ text 1.50 0.250 total 3.00 0.500" in shown
    assert "Latency 0.500 s" in shown
    assert "A MAC is a product and a sum." in shown
