"""The built wheel carries recipes and weights, and finds them from any folder (slow)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import sana_lab

ROOT = Path(sana_lab.__file__).parents[1]
LOOK = """
import json
from pathlib import Path
import sana_lab
from sana_lab.checkpoints import weights
from sana_lab.config import experiments as config
files = [config.locate("experiments", "shapes_sana"), config.locate("ablations", "paper/block_design")]
files += [config.locate("eval", "shapes"), weights.shipped(config.load("shapes_vae_f8"))]
files += [config.weights_folder("quickstart")]
kinds = {kind: len(config.available(kind)) for kind in ("experiments", "ablations", "eval")}
print(json.dumps([sana_lab.__file__, [str(path) for path in files], kinds]))
"""

CHECK = """
from pathlib import Path
from sana_lab.commands import check, new
assert (Path(new.__file__).parents[1] / "py.typed").is_file()
for kind, name in new.CLASSES.items():
    new.main("part", f"my_{kind}", kind)
    own = f"my_{kind}" if kind == "solver" else "".join(word.capitalize() for word in f"my_{kind}".split("_"))
    assert check.main(f"my_{kind}:{own}") == 0, kind
"""


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="runs in the checkout")
def test_a_built_wheel_finds_its_recipes_and_weights_from_elsewhere(tmp_path: Path):
    """Without a network: hatchling, which builds it, is installed already, and so are the dependencies."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    subprocess.run([*pip, "wheel", str(ROOT), "--no-build-isolation", *offline, "--wheel-dir", tmp_path], check=True)
    (wheel,) = tmp_path.glob("sana_lab-*.whl")
    subprocess.run([*pip, "install", *offline, "--target", tmp_path / "site", wheel], check=True)
    (tmp_path / "elsewhere").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    options = {"cwd": tmp_path / "elsewhere", "env": environment, "capture_output": True, "text": True, "check": True}
    answer = subprocess.run([sys.executable, "-c", LOOK], **options)
    package, files, kinds = json.loads(answer.stdout)
    assert [p for p in (package, *files) if not Path(p).is_relative_to(tmp_path / "site")] == []
    assert kinds == {kind: len(list((ROOT / kind).glob("*.yaml"))) for kind in kinds}
    subprocess.run([sys.executable, "-c", CHECK], **options)  # parts of one's own, from an ordinary folder
