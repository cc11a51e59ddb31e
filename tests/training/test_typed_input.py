"""Property: any value of any option is accepted or refused in one line by `train --dry-run`; nothing else happens."""

import contextlib
import io
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import tiny
import tiny_folders
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sana_lab import __main__
from sana_lab.config import options, registry, specs
from sana_lab.config.specs import SpecError
from sana_lab.config.text_files import is_unicode
from sana_lab.config.validation import bare, kind_of, plain
from sana_lab.config.yaml_text import read_value

AUTOENCODER = """
system: {name: autoencoder, autoencoder: {name: vae, widths: [8, 8], depth: 1, groups: 2}}
data: {name: shapes, size: 16, batch: 4, held_out: 4}
trainer: {max_steps: 2, accelerator: cpu}
"""
CACHED = """
base: tiny
system: {name: dit, dit: {name: sana, dim: 32, depth: 1, cross_heads: 2},
         autoencoder: {name: vae, widths: [8, 8, 8, 8], depth: 1, groups: 2}, text_encoder: {name: t5, layers: 1}}
data:
  name: features
  source: {name: latents, source: {name: shapes, size: 32, held_out: 4}, autoencoder: {name: vae, widths: [8, 8, 8, 8],
           depth: 1, groups: 2}}
  text_encoder: {name: t5, layers: 1}
"""
SECONDS = 30.0  # far above what one dry run takes, far below a hang

PLACES = [
    *(("tiny", f"system.{kind}", kind) for kind in ("dit", "autoencoder", "text_encoder", "optimizer")),
    *(("tiny", f"system.dit.{kind}", kind) for kind in ("attention", "ffn")),
    *(("tiny", "sampling.solver", "solver"), ("tiny", "data", "data"), ("tiny", "system", "system")),
    *(("vae", "system", "system"), ("vae", "system.autoencoder", "autoencoder"), ("cached", "system", "system")),
    *(("cached", "data", "data"), ("cached", "data.source", "data"), ("tiny", "eval.rfid", "extractor")),
    *((name, section, "") for name in ("tiny", "vae") for section in ("trainer", "sampling", "eval")),
    ("tiny", "", ""),
]
"""(experiment, key, kind of the part there; "" for a section)."""

ODD = [
    *("null", "-1", "0", "1", "2", "3", "7", "0.5", "-0.5", "1e9", "1000000000", "100000000", str(2**31), str(2**70)),
    *(str(-(2**70)), ".nan", ".inf", "-.inf", "1e400", "1e-400", "true", "no", "''", "x", "x" * 300, "0012", "12:30"),
    *("[]", "[0]", "[-1]", "[1, 2]", "[8, 8, 8, 8]", "[[1]]", "[null]", "[.nan, 1]", "{}", "{name: x}", "{name: 1}"),
    *("{name: ''}", "{1: 2}", "[1", "{a", "'", "*a", "&a [*a]", "!!python/object:os.system x", "${seed}", "${nowhere}"),
    *("${", "${oc.env:HOME}", "a\x00b", "\ud800", "~", "experiment:tiny", "experiment:", "os:system", "a:b:c", ":"),
    *("/", "..", "[" * 3000, "file:", "5" * 5000),
]


def places() -> st.SearchStrategy[tuple[str, list[str]]]:
    """An experiment and one to three `key=value`."""
    return st.sampled_from(PLACES).flatmap(lambda p: st.tuples(st.just(p[0]), changes(*p)))


def changes(experiment: str, key: str, kind: str) -> st.SearchStrategy[list[str]]:
    if not kind:
        return values(specs.fields(options.SECTIONS[key or "experiment"]), key)
    names = [n for n in registry.TABLE[kind] if kind != "system" or n in ("text2image", "dit", "autoencoder")]
    return st.sampled_from([None, *names]).flatmap(lambda name: part_changes(experiment, key, kind, name))


def part_changes(experiment: str, key: str, kind: str, name: str | None) -> st.SearchStrategy[list[str]]:
    """Options of a named part, or, without a name, of the part that the experiment has."""
    present = {"tiny": {"system": "text2image"}, "vae": {"system": "autoencoder"}, "cached": {"system": "dit"}}
    default = {"dit": "sana", "autoencoder": "vae", "text_encoder": "t5", "optimizer": "adamw", "attention": "linear"}
    part = name or {**default, **present[experiment]}.get(kind, next(iter(registry.TABLE[kind])))
    head = [f"{key}={name}"] if name else []
    return values(specs.options(kind, specs.find(kind, part)), key).map(lambda rest: [*head, *rest])


def values(schema: dict[str, specs.Option], key: str) -> st.SearchStrategy[list[str]]:
    if not schema:
        return st.sampled_from(ODD).map(lambda text: [f"{key or 'seed'}={text}"])
    one = st.sampled_from(sorted(schema)).flatmap(
        lambda name: texts(schema[name].annotation).map(lambda text: f"{key}.{name}={text}".removeprefix("."))
    )
    return st.lists(one, min_size=1, max_size=2)


def texts(annotation: Any) -> st.SearchStrategy[str]:
    """What people type for an option: of its type, or not."""
    return st.one_of(typed(annotation), st.sampled_from(ODD), st.text(max_size=20))


def typed(annotation: Any) -> st.SearchStrategy[str]:
    if kind := kind_of(annotation):
        return st.sampled_from([*registry.TABLE[kind], *specs.presets(kind)])
    annotation = bare(annotation)
    scalars = {
        int: st.integers(-2, 2**17).map(str),
        float: st.floats().map(lambda x: f".{x}" if math.isnan(x) else str(x)),
        str: st.text(max_size=20),
        bool: st.sampled_from(["true", "false"]),
    }
    if annotation in scalars:
        return scalars[annotation]
    inner = [a for a in get_args(annotation) if a is not Ellipsis]
    if get_origin(annotation) in (list, tuple):
        return st.lists(typed(inner[0]), max_size=4).map(lambda items: f"[{', '.join(items)}]")
    literals = [json.dumps(a) for a in inner if isinstance(a, str | int | bool)]
    return st.sampled_from(literals) if literals else st.one_of(*map(typed, inner)) if inner else st.just("null")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory, with three experiments."""
    home = tmp_path_factory.mktemp("typed")
    for name, text in (("tiny", tiny.EXPERIMENT), ("vae", AUTOENCODER), ("cached", CACHED)):
        tiny.write(home, f"experiments/{name}.yaml", text)
    with contextlib.chdir(home):
        yield home


def dry_run(name: str, overrides: list[str]) -> None:
    """AssertionError where a dry run is neither accepted nor refused in one line; any exception is one too."""
    out, err, start = io.StringIO(), io.StringIO(), time.perf_counter()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = __main__.main(["train", name, *overrides, "--dry-run"])
    said = [line for line in err.getvalue().splitlines() if line.startswith("sana-lab: ")]
    assert time.perf_counter() - start < SECONDS
    assert "trained: no" in out.getvalue() if status == 0 else (status == 1 and len(said) == 1), err.getvalue()
    assert {path.name for path in Path().iterdir()} <= {"experiments", "runs"}


def quick(examples: int) -> Callable[[Any], Any]:
    """The same examples in each run."""
    return settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@given(places())
@quick(200)
def test_any_value_is_accepted_or_one_line(folder: Path, case: tuple[str, list[str]]):
    dry_run(*case)


@pytest.mark.slow
@given(places())
@settings(max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_value_is_accepted_or_one_line_in_many_examples(folder: Path, case: tuple[str, list[str]]):
    dry_run(*case)


def probes() -> st.SearchStrategy[dict[str, Any]]:
    def of(name: str) -> st.SearchStrategy[dict[str, Any]]:
        schema = specs.options("probe", specs.find("probe", name))
        odd = st.one_of(st.none(), st.booleans(), st.integers(-2, 2**70), st.floats(), st.text(max_size=9), st.just([]))
        return st.dictionaries(st.sampled_from(sorted(schema)), odd, max_size=2).map(lambda d: {"name": name, **d})

    return st.sampled_from(sorted(registry.TABLE["probe"])).flatmap(of)


@given(probes())
@quick(60)
def test_any_probe_is_accepted_or_one_line(folder: Path, spec: dict[str, Any]):
    with contextlib.suppress(SpecError):
        specs.build("probe", spec)


EVALUATION = ("extractor", "detector", "vqa", "measure")
"""Kinds of parts that an evaluation builds; the working directory has a tiny model for each."""


@pytest.fixture(scope="module")
def networks(folder: Path) -> Path:
    tiny_folders.clip(folder / "clip")
    tiny_folders.mask2former(folder / "mask2former", ["person", "dog"])
    tiny_folders.owlv2(folder / "owlv2")
    tiny_folders.blip(folder / "blip")
    tiny.write(folder, "features.py", "def means(images):\n    return images.float().mean((2, 3))\n")
    tiny.write(
        folder, "rows.jsonl", '{"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a dog"}\n'
    )
    return folder


def evaluation_parts(kind: str) -> st.SearchStrategy[Any]:
    """Specs of a kind: any options, of their types or not."""
    return st.sampled_from(sorted(registry.TABLE[kind])).flatmap(lambda name: part_specs(kind, name))


def part_specs(kind: str, name: str) -> st.SearchStrategy[dict[str, Any]]:
    schema = specs.options(kind, specs.find(kind, name))
    required = {key: option_values(option) for key, option in schema.items() if option.required}
    others = {key: option_values(option) for key, option in schema.items() if not option.required}
    optional = st.lists(st.sampled_from(sorted(others)), max_size=2, unique=True) if others else st.just([])
    return optional.flatmap(
        lambda keys: st.fixed_dictionaries({"name": st.just(name), **required, **{key: others[key] for key in keys}})
    )


def option_values(option: specs.Option) -> st.SearchStrategy[Any]:
    """Values of an option as YAML reads them; an inner part of the kind that belongs there, more often than not."""
    odd = texts(option.annotation).filter(is_unicode).map(read_value).map(plain)
    if option.kind:
        return st.one_of(evaluation_parts(option.kind), evaluation_parts(option.kind), odd)
    if bare(option.annotation) is str or option.required:
        files = ["clip", "mask2former", "owlv2", "blip", "features:means", "features:none", "rows.jsonl", "features.py"]
        return st.one_of(st.sampled_from(files), st.sampled_from(files), odd)
    return odd


def build_one(kind: str, spec: dict[str, Any]) -> None:
    """AssertionError where a part is neither built nor refused in one line, as `main` prints it."""
    start, problem = time.perf_counter(), None
    try:
        specs.build(kind, spec)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        problem = error
    if problem is not None:
        assert isinstance(problem, OSError) or not __main__._is_bug(problem), (spec, problem)
        assert len(str(problem).splitlines()) <= 1, (spec, problem)
    assert time.perf_counter() - start < SECONDS


@given(st.sampled_from(EVALUATION).flatmap(lambda kind: st.tuples(st.just(kind), evaluation_parts(kind))))
@quick(80)
def test_any_part_of_an_evaluation_is_built_or_one_line(networks: Path, case: tuple[str, dict[str, Any]]):
    build_one(*case)


@pytest.mark.slow
@given(st.sampled_from(EVALUATION).flatmap(lambda kind: st.tuples(st.just(kind), evaluation_parts(kind))))
@settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_part_of_an_evaluation_in_many_examples(networks: Path, case: tuple[str, dict[str, Any]]):
    build_one(*case)
