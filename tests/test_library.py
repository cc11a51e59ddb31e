"""The package in other programs: types, LightningCLI, the notebook."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sana_lab

ROOT = Path(sana_lab.__file__).parents[1]

pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader"),  # mlflow 3.17 with sqlalchemy 2.1
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # Lightning 2.6 with torch >= 2.13
]


def test_the_package_has_types():
    assert (ROOT / "sana_lab/py.typed").is_file()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jsonargparse") is None, reason="needs jsonargparse")
def test_lightning_cli_trains_a_system(here: Path):
    """The program and the command of docs/library.md."""
    page = (ROOT / "docs/library.md").read_text()
    program = re.search(r"```python\n# fit.py\n(.*?)```", page, re.S)
    command = re.search(r"^python (fit.py .*)$", page, re.M)
    assert program is not None
    assert command is not None
    (here / "fit.py").write_text(program[1])
    extra = " --trainer.logger=false --trainer.enable_checkpointing=false --data.held_out=4"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    line = f"{sys.executable} {command[1]}{extra}"
    done = subprocess.run(line, shell=True, cwd=here, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "max_steps=2" in done.stdout + done.stderr


def test_the_notebook_runs(here: Path, runs: Path):
    """Every code cell of docs/tour.ipynb, in order; the pictures that it shows are uint8 images."""
    notebook = json.loads((ROOT / "docs/tour.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    shown: list[torch.Tensor] = []
    scope: dict[str, object] = {}
    torch.manual_seed(0)
    for cell in cells:
        exec(compile(cell, "tour.ipynb", "exec"), scope)
        if isinstance(scope.get("images"), torch.Tensor):
            shown.append(scope["images"])  # type: ignore[arg-type]
    assert shown
    assert all(images.dtype == torch.uint8 and images.ndim == 4 for images in shown)
