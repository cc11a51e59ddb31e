"""The shape of the code: imports go down, every name of the table resolves, every YAML that ships is right."""

import ast
import inspect
import json
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest
from encoders import offline

import sana_lab
from sana_lab import config, parts, speed, train

ROOT = Path(sana_lab.__file__).parent
PARTS = ("attention", "dit", "autoencoders", "text", "data")
LAYERS: tuple[tuple[str, ...], ...] = (
    ("parts", "types", "digests", "outputs", "progress"),
    ("config", "ranges"),
    ("layers", "ops"),
    (*PARTS, "evaluation"),  # the interfaces: each package's __init__
    ("diffusion",),
    tuple(f"{name}." for name in PARTS),
    ("evaluation.",),
    ("keys", "files", "architectures", "foreign"),
    ("weights", "tracking", "table", "expectations", "significance"),
    ("systems",),
    ("checkpoints", "checks", "export", "pretrained"),
    (
        "train",
        "draw",
        "subjects",
        "judging",
        "compare",
        "bench",
        "room",
        "profile",
        "stand_ins",
        "logger",
        "ledger",
        "plots",
        "crossing",
        "report",
        "results",
        "ui",
    ),
    ("probes", "probes."),
    ("sweep", "worker", "speed", "speed_plots", "speed_spec", "speed_table"),
    ("cli",),
    ("", "__main__"),
)
"""From the bottom up, as in the architecture. `a.` is what lies inside the package a; `a` is a and what lies inside."""


def modules() -> dict[str, Path]:
    """Module name, relative to the package, to its file; the package itself is ''."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        if "recipes" not in path.parts:
            inside = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(inside[:-1] if inside[-1] == "__init__" else inside)] = path
    return found


def statements(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom))


def named(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    assert node.level == 0, "relative imports hide the layer"
    return [f"{node.module}.{alias.name}" for alias in node.names]


def imports(path: Path) -> set[str]:
    """The modules of this package that a file imports anywhere, also inside functions."""
    known = modules()
    found = set()
    for node in statements(ast.parse(path.read_text())):
        for name in named(node):
            inner = name.removeprefix("sana_lab").removeprefix(".")
            if name.startswith("sana_lab"):
                found.add(inner if inner in known else inner.rpartition(".")[0])
    return found


def layer(module: str) -> int:
    package = module.partition(".")[0]
    exact = [i for i, names in enumerate(LAYERS) if module in names]
    inside = [i for i, names in enumerate(LAYERS) if "." in module and f"{package}." in names]
    whole = [i for i, names in enumerate(LAYERS) if package in names]
    return (exact + inside + whole)[0]


MODULES = modules()
GRAPH = {name: imports(path) for name, path in MODULES.items()}


# --- imports


def test_every_module_has_a_layer():
    assert [
        name for name in MODULES if not any(n.rstrip(".") == name.partition(".")[0] for names in LAYERS for n in names)
    ] == []


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str):
    """To a lower layer, or beside: within one package, or among the verbs and what they share."""
    up = [other for other in GRAPH[module] if layer(other) > layer(module)]
    package = module.partition(".")[0]
    across = [
        other
        for other in GRAPH[module]
        if layer(other) == layer(module) and "." in module and other.partition(".")[0] != package
    ]
    assert (up, across) == ([], [])


def test_imports_have_no_ring():
    TopologicalSorter({name: others - {name} for name, others in GRAPH.items()}).prepare()


@pytest.mark.parametrize("package", [name for name, path in MODULES.items() if path.stem == "__init__" and name])
def test_interfaces_import_none_of_their_siblings(package: str):
    assert [other for other in GRAPH[package] if other.startswith(f"{package}.")] == []


def test_the_package_itself_imports_nothing_at_once():
    tree = ast.parse(MODULES[""].read_text())
    direct = [name for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom) for name in named(node)]
    assert [name for name in direct if name.startswith("sana_lab")] == []


# --- manners


@pytest.mark.parametrize("module", MODULES)
def test_every_signature_is_annotated(module: str):
    bare = []
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = [
                *node.args.posonlyargs,
                *node.args.args,
                *node.args.kwonlyargs,
                node.args.vararg,
                node.args.kwarg,
            ]
            bare += [
                f"{node.name}({a.arg})" for a in arguments if a and not a.annotation and a.arg not in ("self", "cls")
            ]
            bare += [node.name] if node.returns is None else []
    assert bare == []


@pytest.mark.parametrize("module", MODULES)
def test_every_file_and_public_thing_says_what_it_is(module: str):
    tree = ast.parse(MODULES[module].read_text())
    assert ast.get_docstring(tree)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    assert [node.name for node in classes if not ast.get_docstring(node)] == []


@pytest.mark.parametrize("module", MODULES)
def test_no_file_is_long(module: str):
    lines = [
        line for line in MODULES[module].read_text().splitlines() if line.strip() and not line.strip().startswith("#")
    ]
    assert len(lines) <= 400


# --- the table


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in parts.TABLE.items() for name in names])
def test_every_name_of_the_table_resolves(kind: str, name: str):
    """It is of its kind, and its options are annotated and complete themselves with plain data."""
    target = parts.find(kind, name)
    schema = parts.options(kind, target)
    if parts.TABLE[kind][name].startswith("sana_lab"):
        assert [key for key, option in schema.items() if option.annotation is Any] == []
        assert inspect.getdoc(target)
    given = {key: stand_in(option) for key, option in schema.items() if option.required}
    resolved = parts.resolve(kind, {"name": name, **given})
    assert list(resolved) == ["name", *schema]
    assert json.loads(json.dumps(resolved)) == resolved
    assert parts.canonical(kind, resolved)["name"] == name


def stand_in(option: parts.Option) -> Any:
    """Something for an option without a default: the first part of its kind, likewise, or any text."""
    kind = next(iter(option.marks(str)), None)
    if kind is None:
        return "x"
    name = next(iter(parts.TABLE[kind]))
    schema = parts.options(kind, parts.find(kind, name))
    return {"name": name, **{key: stand_in(inner) for key, inner in schema.items() if inner.required}}


def test_every_kind_is_known_by_a_class_or_by_its_first_parameters():
    assert parts.TABLE.keys() == parts.BASES.keys() | parts.LEADING.keys()
    assert parts.TABLE.keys() >= set(parts.WEIGHTED)


# --- what ships


@pytest.mark.parametrize("name", config.available("experiments"))
def test_every_shipped_experiment_is_right(name: str, here: Path):
    experiment = config.load(name)
    assert config.complete(experiment) == experiment
    train.check(offline(experiment, here))


@pytest.mark.parametrize("name", [n for n in config.available("ablations") if not speed.is_speed(n)])
def test_every_shipped_ablation_is_right(name: str, here: Path):
    ablation, trials = config.load_ablation(name)
    if any(trial.experiment["sampling"]["quantize"] != "none" for trial in trials):
        pytest.importorskip("torchao")
    for trial in trials:
        train.check(trial.experiment)
    assert len(trials) == len(ablation.seeds) * len({t.label for t in trials})
    assert ablation.columns


@pytest.mark.parametrize("name", config.available("eval"))
def test_every_shipped_suite_is_right(name: str, here: Path):
    given = config.read(config.locate("eval", name))
    suite = config.load("shapes", [f"eval={name}"])["eval"]
    measures = given.pop("measures", [])
    assert {key: suite[key] for key in given} == given
    assert suite["measures"] == [parts.resolve("measure", spec) for spec in measures]


def test_recipes_are_data():
    for kind in ("experiments", "ablations", "eval"):
        assert list((ROOT.parent / kind).rglob("*.py")) == []
