"""Each training method through the verb `train`, alone and together, and one from a module of the user's own."""

from pathlib import Path

import pytest
import tiny

from sana_lab import __main__
from sana_lab.checkpoints import files, weights
from sana_lab.config import experiments, registry

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader")  # mlflow 3.17 with sqlalchemy 2.1

OWN = """
from sana_lab.methods import Method


class Small(Method):
    weight = 0.01

    def losses(self, step):
        return {self.name: step.prediction.square().mean()}
"""

TREAD = "{name: tread, start: 0, stop: 1}"


def trained(here: Path, *overrides: str) -> Path:
    tiny.write_experiment(here, changes={"system.dit.depth": 2, "trainer.max_steps": 3})
    assert __main__.main(["train", "tiny", *overrides]) == 0
    path = weights.trained(experiments.load("tiny", overrides))
    assert path is not None
    return path


def terms(path: Path) -> set[str]:
    names = {name.removeprefix("train/") for name in weights.card(path)["measured"] if name.startswith("train/")}
    return names - {"loss", "objective", "grad_norm"}


@pytest.mark.parametrize("name", sorted({*registry.TABLE["method"]} - {"distill"}))
def test_each_method_trains(runs: Path, name: str):
    intervals = ["system.dit.mean_velocity=true"] if name == "meanflow" else []
    path = trained(runs.parent, f"system.method={TREAD if name == 'tread' else name}", *intervals)
    assert terms(path) == (set() if name == "tread" else {name})
    assert not any("methods" in tensor for tensor in files.tensor_names(path))


def test_two_train_together_and_a_prediction_of_the_data(runs: Path):
    overrides = [f"system.method=[irepa, {TREAD}]", "system.prediction=data", "system.weighting=min_snr"]
    assert terms(trained(runs.parent, *overrides)) == {"irepa"}
    assert __main__.main(["sample", "a red circle", "--model", "tiny", "--out", "out", "--set", *overrides]) == 0


def test_a_method_of_ones_own_trains(runs: Path, monkeypatch: pytest.MonkeyPatch):
    (runs.parent / "penalties.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(runs.parent))
    assert terms(trained(runs.parent, "system.method=[direction, penalties:Small]")) == {"direction", "small"}


def test_few_steps_from_a_teacher_and_its_blocks(runs: Path):
    """A softmax model, then a linear one from its weights that learns its blocks and mean velocities."""
    tiny.write_experiment(runs.parent, "teacher", changes={"system.dit.attention": "softmax", "trainer.max_steps": 2})
    teacher = "experiment:teacher"
    changes = {
        "parent": {"weights": teacher, "fit": "partial"},
        "system.text_encoder": teacher,
        "system.train_text": False,
        "system.dit.mean_velocity": True,
        "system.method": [
            {"name": "meanflow", "teacher": teacher, "guidance": 2.0},
            {"name": "distill", "teacher": teacher},
        ],
        "sampling": {"solver": "meanflow", "steps": 2, "guidance": 1.0},
    }
    tiny.write_experiment(runs.parent, "student", changes=changes)
    assert __main__.main(["train", "teacher"]) == __main__.main(["train", "student"]) == 0
    path = weights.trained(experiments.load("student"))
    assert path is not None
    assert terms(path) == {"meanflow", "distill"}
    state = files.tensor_names(path)
    assert {"dit.interval_embed.mlp.2.weight", "dit.blocks.0.attention.qkv.weight"} <= {*state}
    assert not any(name.startswith(("methods.", "text_encoder.")) for name in state)
    assert __main__.main(["sample", "a red circle", "--model", "student", "--out", "out"]) == 0
    overrides = ["--set", "sampling.solver=meanflow"]
    assert __main__.main(["sample", "a red circle", "--model", "teacher", "--out", "out", *overrides]) == 1
