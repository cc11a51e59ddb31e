"""Costs of training steps are counted once for the same network by the same code, and anew for anything else."""

import json
from pathlib import Path

import pytest
from torch import nn

from sana_lab.bench import stored_costs


class Counter:
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> tuple[int, int]:
        self.calls += 1
        return 7, 11


KEY = ("step", {"name": "sana", "dim": 32}, 16)


def test_equal_keys_are_counted_once(runs: Path):
    count = Counter()
    layer = nn.Linear(2, 2)
    assert [stored_costs.recall(layer, KEY, count) for _ in range(2)] == [(7, 11)] * 2
    assert count.calls == 1
    stored_costs.recall(layer, (*KEY[:2], 17), count)
    assert count.calls == 2
    assert len(json.loads((runs / "costs.json").read_text())) == 2


def test_another_state_of_the_code_counts_anew(runs: Path, monkeypatch: pytest.MonkeyPatch):
    count = Counter()
    stored_costs.recall(nn.Linear(2, 2), KEY, count)
    monkeypatch.setattr(stored_costs, "_code", lambda: "changed")
    stored_costs.recall(nn.Linear(2, 2), KEY, count)
    assert count.calls == 2


def test_a_module_of_the_users_own_is_counted_anew(runs: Path):
    class Own(nn.Module):
        pass

    count = Counter()
    for _ in range(2):
        stored_costs.recall(nn.Sequential(Own()), KEY, count)
    assert count.calls == 2


@pytest.mark.parametrize("damage", ["", "[1, 2]", '{"a": 3}', '{"a": ["x", 1]}', "{"])
def test_a_damaged_file_is_replaced(runs: Path, damage: str):
    (runs / "costs.json").write_text(damage)
    assert stored_costs.recall(nn.Linear(2, 2), KEY, Counter()) == (7, 11)
    assert stored_costs.recall(nn.Linear(2, 2), KEY, lambda: (0, 0)) == (7, 11)


def test_without_a_folder_of_runs_nothing_is_written(here: Path):
    assert stored_costs.recall(nn.Linear(2, 2), KEY, Counter()) == (7, 11)
    assert not (here / "runs").exists()
