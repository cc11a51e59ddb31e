"""The shape of the code: imports go down, every name of the table resolves, every YAML that ships is right."""

import ast
import inspect
import json
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest

import sana_lab
from sana_lab.ablation import plan
from sana_lab.config import experiments, registry, specs
from sana_lab.training import checks

ROOT = Path(sana_lab.__file__).parent
FLOORS: tuple[tuple[str, ...], ...] = (
    ("types", "intervals", "environment", "config", "ops"),
    ("models", "costs", "report"),
    ("diffusion", "checkpoints", "tracking", "methods"),
    ("data", "systems", "peers"),
    ("pretrained", "bench", "contracts"),
    ("training", "evaluation", "api"),
    ("shapes", "emoji", "ablation", "profiler", "commands", "templates"),
    ("", "__main__"),
)
"""Packages and root modules, from the bottom up. A package imports lower floors only."""

FACADES = ("pretrained", *(f"ops.{name}" for name in ("conv", "linear_attention", "mix_ffn", "modulate", "rms_norm")))
"""Packages whose `__init__` re-exports functions of modules inside; every other one holds an interface."""

MAX_CHAIN = 8
"""Modules in the longest chain of imports."""

RIDDLES = {
    *("found", "there", "asked", "made", "held", "seen", "told", "said", "wanted"),
    *("gone", "begun", "taken", "worth", "meant", "come", "fallen", "drawn", "named"),
}
"""Participles and adverbs that name nothing: an identifier says what the thing is."""

REGISTRY = "config.registry"
"""The one module that names parts of every floor, as strings that are resolved when they are used."""


def modules() -> dict[str, Path]:
    """Module name, relative to the package, to its file; the package itself is ''."""
    names = {}
    for path in sorted(ROOT.rglob("*.py")):
        if "recipes" not in path.parts:
            inside = path.relative_to(ROOT).with_suffix("").parts
            names[".".join(inside[:-1] if inside[-1] == "__init__" else inside)] = path
    return names


MODULES = modules()


def import_names(node: ast.AST) -> list[str]:
    """The dotted names that an import statement, or a string such as importlib takes, means."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative imports hide the floor"
        return [f"{node.module}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("sana_lab."):
        return [node.value.partition(":")[0]]
    return []


def module_of(name: str) -> str | None:
    """The module of this package that a dotted name lies in."""
    inner = name.removeprefix("sana_lab").removeprefix(".")
    while inner and inner not in MODULES:
        inner = inner.rpartition(".")[0]
    return inner if name.startswith("sana_lab") else None


def imports(module: str) -> set[str]:
    """What a module imports: at its top, inside functions, and as strings for importlib."""
    names = [name for node in ast.walk(ast.parse(MODULES[module].read_text())) for name in import_names(node)]
    return {m for m in map(module_of, names) if m and m != module}


def imports_at_once(module: str) -> set[str]:
    """What is imported when the module is."""
    tree = ast.parse(MODULES[module].read_text())
    names = [name for node in tree.body if not isinstance(node, ast.Expr) for name in import_names(node)]
    return {m for m in map(module_of, names) if m is not None and m != module}


def package(module: str) -> str:
    return module.partition(".")[0]


def floor(module: str) -> int:
    return next(i for i, names in enumerate(FLOORS, start=1) if package(module) in names)


PARTS = {module_of(target.partition(":")[0]) for names in registry.TABLE.values() for target in names.values()}
GRAPH = {name: imports(name) if name != REGISTRY else set() for name in MODULES}


# --- imports


def test_every_module_has_a_floor():
    assert len(FLOORS) <= 8
    assert {package(name) for name in MODULES} == {name for names in FLOORS for name in names}


def test_imports_go_down():
    """To a lower floor, or inside the package. `__init__` of the root and `__main__` are the top."""
    wrong = {
        (module, other)
        for module, others in GRAPH.items()
        for other in others
        if package(module) != package(other) and floor(other) >= floor(module)
    }
    assert wrong == set()


def test_imports_have_no_ring():
    TopologicalSorter(GRAPH).prepare()


def test_the_longest_chain_of_imports_is_short():
    """Of imports that happen when a module is imported; a package's `__init__` is its own module."""
    chains: dict[str, tuple[str, ...]] = {}
    for module in TopologicalSorter({name: imports_at_once(name) for name in MODULES}).static_order():
        below = max((chains[other] for other in imports_at_once(module)), key=len, default=())
        chains[module] = (module, *below)
    assert [chain for chain in chains.values() if len(chain) > MAX_CHAIN] == []


def test_the_root_is_small():
    assert len([name for name in MODULES if "." not in name and MODULES[name].name != "__init__.py"]) <= 12


@pytest.mark.parametrize("name", [n for n, path in MODULES.items() if path.stem == "__init__" and n not in FACADES])
def test_interfaces_import_none_of_their_implementations(name: str):
    """No module that holds a part, and none that knows the interface; a helper such as an average of weights may be."""
    siblings = [other for other in GRAPH[name] if name and other.startswith(f"{name}.")]
    assert [other for other in siblings if other in PARTS or name in GRAPH[other]] == []


def test_the_package_itself_imports_nothing_at_once():
    assert imports_at_once("") == set()


# --- manners


def identifiers(module: str) -> Iterator[str]:
    """Every name that a module defines or uses: variables, parameters, functions, classes, attributes."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        match node:
            case ast.Name(id=name) | ast.arg(arg=name) | ast.Attribute(attr=name):
                yield name
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name


def test_names_are_names_of_things():
    riddles = {module: {n for n in identifiers(module) if n.strip("_").lower() in RIDDLES} for module in MODULES}
    assert {module: names for module, names in riddles.items() if names} == {}


def test_central_records_are_defined_once():
    trees = (ast.parse(path.read_text()) for path in MODULES.values())
    classes = [node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    assert {name: classes.count(name) for name in ("Memory", "Report", "Plan", "Estimate", "System")} == dict.fromkeys(
        ("Memory", "Report", "Plan", "Estimate", "System"), 1
    )


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


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in registry.TABLE.items() for name in names])
def test_every_name_of_the_table_resolves(kind: str, name: str):
    """It is of its kind, and its options are annotated and complete themselves with plain data."""
    target = specs.find(kind, name)
    schema = specs.options(kind, target)
    if registry.TABLE[kind][name].startswith("sana_lab"):
        assert [key for key, option in schema.items() if option.annotation is Any] == []
        assert inspect.getdoc(target)
    given = {key: stand_in(option) for key, option in schema.items() if option.required}
    resolved = specs.resolve(kind, {"name": name, **given})
    assert list(resolved) == ["name", *schema]
    assert json.loads(json.dumps(resolved)) == resolved
    assert specs.canonical(kind, resolved)["name"] == name


def stand_in(option: specs.Option) -> Any:
    """Something for an option without a default: the first part of its kind, likewise, or any text."""
    if (kind := option.kind) is None:
        return "x"
    name = next(iter(registry.TABLE[kind]))
    schema = specs.options(kind, specs.find(kind, name))
    return {"name": name, **{key: stand_in(inner) for key, inner in schema.items() if inner.required}}


def test_every_kind_is_known_by_a_class_or_by_its_first_parameters():
    assert registry.TABLE.keys() == registry.BASES.keys() | registry.LEADING.keys()
    assert registry.TABLE.keys() >= set(registry.WEIGHTED)


# --- what ships


@pytest.mark.parametrize("name", experiments.available("experiments"))
def test_every_shipped_experiment_is_right(name: str, here: Path):
    experiment = experiments.load(name)
    assert experiments.complete(experiment) == experiment
    checks.check(experiment)


@pytest.mark.parametrize("name", [n for n in experiments.available("ablations") if not plan.compares_efficiency(n)])
def test_every_shipped_ablation_is_right(name: str, here: Path):
    loaded = plan.load(name)
    ablation, trials = loaded.table, loaded.trials
    if any(trial.config["sampling"]["quantize"] != "none" for trial in loaded.examples):
        pytest.importorskip("torchao")
    for trial in loaded.examples:
        checks.check(trial.config)
    assert len(trials) == len(ablation.seeds) * len({t.label for t in trials})
    assert ablation.columns


@pytest.mark.parametrize("name", experiments.available("eval"))
def test_every_shipped_suite_is_right(name: str, here: Path):
    given = experiments.read(experiments.locate("eval", name))
    suite = experiments.load("shapes", [f"eval={name}"])["eval"]
    measures = given.pop("measures", [])
    assert {key: suite[key] for key in given} == given
    assert suite["measures"] == [specs.resolve("measure", spec) for spec in measures]


def test_recipes_are_data():
    for kind in ("experiments", "ablations", "eval"):
        assert list((ROOT.parent / kind).rglob("*.py")) == []
