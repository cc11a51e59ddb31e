"""Command `sana-lab new`: write a commented file that runs as it is."""

import re
from pathlib import Path

from sana_lab.config import registry
from sana_lab.config.specs import SpecError, nearest

TEMPLATES = Path(__file__).parents[1] / "templates"

CLASSES = {
    **{"attention": "Mean", "ffn": "GatedMlp", "dit": "ConvNet", "autoencoder": "Pixels", "text_encoder": "Letters"},
    **{"solver": "midpoint", "data": "Stripes", "measure": "Brightness", "extractor": "Thumbnails"},
    **{"system": "Palette", "method": "Frequencies"},
}
"""kind -> the name of its example in `sana_lab.templates`."""

EXPERIMENT = """# An experiment: what differs from its base. Run it: sana-lab train {name}
base: shapes # a name in experiments/ or a path; `sana-lab list experiments`

system:
  dit:
    attention: linear # `sana-lab parts attention`, or your own module:Class
    # depth: 6 # `sana-lab parts dit sana` shows every option

trainer:
  max_steps: 200 # `sana-lab parts trainer`; more steps are better pictures

prompts: # a grid of samples at each validation
  - a red circle
  - three green triangles
"""

ABLATION = """# An ablation: one row for each label. List its trials: sana-lab ablate {name} --dry-run
title: What does attention change?
base: shapes # every row starts from this experiment

axes: # rows are the product of all axes
  attention:
    softmax: {{system.dit.attention: softmax}} # label: overrides
    linear: {{system.dit.attention: linear}}
    # mine: {{system.dit.attention: "my_attention:MyAttention"}} # sana-lab new part my_attention

seeds: [0] # two or more give the table a spread and marks
baseline: softmax # the row that others are tested against
columns: [params_m, gmacs, latency_s, exact, geneval] # of the table; without this line all that is measured

common: # overrides of every row
  trainer.max_steps: 200 # raise it for a result
  eval.prompts_per_task: 4
"""

NAME = r"[A-Za-z0-9_][\w-]*(/[A-Za-z0-9_][\w-]*)*"


def main(what: str, name: str, kind: str | None = None) -> None:
    """Write experiments/NAME.yaml, ablations/NAME.yaml or NAME.py and print what to run. SpecError; no file is changed.

    The file of a part is the example of its kind under the name of its own.
    """
    name = name.removesuffix(".py").removesuffix(".yaml")
    if kind is not None and what != "part":
        raise SpecError(f"--kind is of a part, and {what!r} is none")
    if what == "part":
        _write_part(name, kind or "attention")
        return
    if not re.fullmatch(NAME, name):
        raise SpecError(f"the name {name!r} is none of letters, digits, - and _; expected such as my_{what}")
    path = Path(f"{what}s") / f"{name}.yaml"
    _write(path, (EXPERIMENT if what == "experiment" else ABLATION).format(name=name))
    verb = "train" if what == "experiment" else "ablate"
    print(f"{path}\nnext: sana-lab {verb} {name} --dry-run")


def _write_part(name: str, kind: str) -> None:
    if kind not in CLASSES:
        raise SpecError(f"there is no example of kind {kind!r}; {nearest(kind, CLASSES)}")
    if not name.isidentifier():
        raise SpecError(f"the name {name!r} is no name of a Python module; expected such as my_{kind}")
    own = name if kind == "solver" else "".join(word.capitalize() for word in name.split("_"))
    text = re.sub(rf"\b{CLASSES[kind]}\b", own, (TEMPLATES / f"{kind}.py").read_text())
    _write(Path(f"{name}.py"), text)
    print(f"{name}.py: {registry.KINDS[kind]}\nnext: sana-lab check {name}:{own}")


def _write(path: Path, text: str) -> None:
    if path.exists():
        raise SpecError(f"{path} exists already; expected another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
