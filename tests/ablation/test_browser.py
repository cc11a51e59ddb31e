"""The page of a sweep in MLflow, read in headless Chromium at 1,280 pixels: fails where MLflow changes its format."""

import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from html import unescape
from pathlib import Path

import pytest
import sweeps
from browser import needs_chromium, text_of

from sana_lab.ablation import generations, plan, results
from sana_lab.checkpoints import weights
from sana_lab.tracking import server
from sana_lab.tracking.store import Store

pytestmark = [pytest.mark.slow, needs_chromium, pytest.mark.filterwarnings("ignore:The ``noload`` loader")]


@pytest.fixture(scope="module")
def site(tmp_path_factory, empty_database) -> Iterator[tuple[Store, str]]:
    """A store with a finished sweep of two axes and three seeds, and the address of its server."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("here"))
        sweeps.write_ablation(Path())
        Path("runs").mkdir()
        shutil.copy(empty_database, "runs/mlflow.db")
        store, ablation = Store(weights.HOME), plan.load("grid")
        sweeps.finish(store, ablation)
        results.write(store, "grid", ablation.table, generations.refresh(store, ablation), Path("out"))
        port = server.free_port("127.0.0.1", 5700)
        command = server.command(store, "127.0.0.1", port)
        with subprocess.Popen(command, env=server.environment(), stderr=subprocess.DEVNULL) as process:
            try:
                wait(f"http://127.0.0.1:{port}/health")
                yield store, f"http://127.0.0.1:{port}"
            finally:
                process.terminate()


def wait(url: str) -> None:
    """Until the server answers."""
    for _ in range(180):
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise AssertionError(f"{url} does not answer")


def addresses(site: tuple[Store, str]) -> dict[str, str]:
    """The links that `sana-lab ui` prints, by what they are."""
    store, base = site
    lines = server.links(store, base, "grid", store.experiments()["grid"])
    return dict(line.strip().split(": ", 1) for line in lines)


def words(html: str) -> str:
    """The text of a page."""
    return re.sub(r"\s+", " ", unescape(re.sub(r"<(script|style).*?</\1>|<[^>]+>", " ", html, flags=re.S)))


def test_the_first_page_answers_the_question(site):
    html = text_of(addresses(site)["grid"], height=1600)
    text = words(html)
    assert "Attention and depth: Does linear attention lose quality" in text
    assert "Best Exact: linear · two with" in text
    assert text.index("Best Exact") < text.index("Exact by row.") < text.index("Same prompts, same noise")
    assert len(re.findall(r'<img[^>]+src="get-artifact\?path=table', html)) == 3
    assert "<table" in html


def test_the_trials_show_axes_quality_and_cost_the_best_first(site):
    html = text_of(addresses(site)["trials"])
    heads = re.findall(r'<div[^>]*role="columnheader"[^>]*>', html)
    places: dict[str, float] = {}
    for head in heads:
        name, left = re.search(r'col-id="((?:params|metrics)\.[^"]+)"', head), re.search(r"left: ([\d.]+)px", head)
        if name and left:
            places[name[1]] = float(left[1])
    columns = sorted(places, key=lambda name: places[name])
    expected = ["axis.attention", "axis.depth", "seed", "exact", "exact_low", "exact_high", "latency_s"]
    assert [re.sub(r"^\w+\.|`", "", name) for name in columns][:7] == expected
    text = words(html)
    assert "12 matching runs" in text
    names = re.findall(r"(?:linear|softmax) · (?:one|two)(?: \(seed \d\))?", text)
    store = site[0]
    best = max(store.find("grid", {"sana.kind": "trial"}), key=lambda run: run.metrics["exact"])
    assert names[0] == best.name
    assert "Ask questions about your experiments" not in text  # MLflow's assistant


def test_eight_charts_are_pinned(site):
    html = text_of(addresses(site)["charts"], height=2400, milliseconds=90_000)
    text = words(html)
    assert "The sweep (8)" in text
    titles = ("axis.attention vs. exact", "axis.depth vs. exact", "latency_s vs. exact", "Parallel Coordinates")
    assert [title for title in titles if title not in text] == []
    assert text.index("The sweep") < text.index("Model metrics")
