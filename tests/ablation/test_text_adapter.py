"""`ablations/text_adapter`: its rows load and build at both scales."""

from pathlib import Path

import pytest

from sana_lab.ablation import plan
from sana_lab.training import checks


@pytest.mark.parametrize("scale", [None, "shapes_sana"])
def test_every_row_builds(scale: str | None, here: Path):
    rows = {trial.label: trial for trial in plan.load("text_adapter", scale=scale).trials if trial.seed == 0}
    assert len(rows) == 6
    for trial in rows.values():
        checks.check(trial.config)
