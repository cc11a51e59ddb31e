"""`ablations/text_adapter` on tiny models of the names that it takes parts from, up to its table."""

import io
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import tiny

from sana_lab.ablation import plan, runner, worker
from sana_lab.ablation.pool import WorkerPool
from sana_lab.ablation.protocol import Job
from sana_lab.ablation.trials import records
from sana_lab.checkpoints import weights
from sana_lab.tracking.store import Store
from sana_lab.training import checks

pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:DeprecationWarning"  # mlflow 3.17 with sqlalchemy 2.1
)

LLM = {"name": "llm", "layers": 1, "heads": 2, "max_tokens": 24}
SMALL = {
    "data.size": 64,
    "trainer.max_steps": 2,
    "eval": {
        **{"prompts_per_task": 1, "images_per_prompt": 1, "held_out": 24, "bench_size": 64, "bench_repeats": 1},
        **{"bench_steps": 1, "measures": [{"name": "distances", "extractor": "shapes"}]},
    },
}


def in_this_process(pool: WorkerPool, title: str, job: Job) -> int:
    """`WorkerPool.run` without the imports of a new process."""
    with redirect_stdout(io.StringIO()):
        return worker.do(job)


@pytest.mark.parametrize("scale", [None, "shapes_sana"])
def test_every_row_builds(scale: str | None, here: Path):
    rows = {trial.label: trial for trial in plan.load("text_adapter", scale=scale).trials if trial.seed == 0}
    assert len(rows) == 6
    for trial in rows.values():
        checks.check(trial.config)


@pytest.mark.slow
def test_it_runs_to_its_table(runs: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(WorkerPool, "run", in_this_process)
    for name, width in (("shapes_paper", 64), ("shapes_sana", 96)):
        text = {**LLM, "width": width}
        tiny.write_experiment(Path(), name, changes={**SMALL, "system.text_encoder": text, "seed": 0})
    assert runner.main("text_adapter", ["trainer.max_steps=2", "trainer.validate_every=2"], workers=1, seeds="0") == 0
    ablation = plan.load("text_adapter", ["trainer.max_steps=2", "trainer.validate_every=2"], seeds=[0])
    trials = records(Store(weights.HOME), ablation)
    assert [record.run is not None for record in trials] == [True] * 6
    metrics = [record.run.metrics for record in trials if record.run is not None]
    assert all({"exact", "geneval", "val_loss", "train_s"} <= {*values} for values in metrics)
    table = next(Path("runs/tables").rglob("table.md")).read_text()
    assert all(record.trial.label in table for record in trials)
