"""Experiments and ablations: YAML + `base` + `key=value`, checked and completed against the parts' signatures."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sana_lab.config import specs
from sana_lab.config.schema import Config, Experiment, SamplingOptions
from sana_lab.config.specs import SpecError, nearest


def roots(kind: str) -> list[Path]:
    """Where recipes of a kind (`experiments`, `ablations`, `eval`) lie: here, in the checkout, in the package."""
    package = Path(__file__).parents[1]
    return [Path(kind), package.parent / kind, package / "recipes" / kind]


def locate(kind: str, name: str) -> Path:
    """The YAML that a name or path means. SpecError with the nearest name."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    for root in roots(kind):
        if (root / f"{name}.yaml").is_file():
            return root / f"{name}.yaml"
    raise SpecError(f"there is no {kind.rstrip('s')} {name!r}; {nearest(name, available(kind, str(path.parent)))}")


def available(kind: str, folder: str = ".") -> list[str]:
    """Names of recipes of a kind, such as `paper/captions` in the folder `paper`; what lies deeper is left out."""
    return sorted({(Path(folder) / p.stem).as_posix() for r in roots(kind) for p in (r / folder).glob("*.yaml")})


def read(path: Path) -> Config:
    """A YAML mapping as plain data, interpolations still in it. SpecError where it does not parse."""
    try:
        raw = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # the YAML parser's own classes are many
        raise SpecError(f"{path} cannot be read as YAML: {str(error).strip()}") from error
    if not isinstance(raw, dict):
        raise SpecError(f"{path} holds {type(raw).__name__}, expected a mapping")
    return {str(k): v for k, v in raw.items()}


def load(name: str, overrides: Sequence[str] = ()) -> Config:
    """The experiment of that name, with its bases merged, `key=value` applied, resolved and completed. SpecError."""
    return complete(apply(compose(name), overrides), name)


def compose(name: str, seen: tuple[str, ...] = ()) -> Config:
    """An experiment's YAML on top of its `base`, as written."""
    if name in seen:
        raise SpecError(f"experiments name each other as base: {' -> '.join([*seen, name])}")
    config = with_suite(read(locate("experiments", name)))
    base = config.pop("base", None)
    return merge(compose(base, (*seen, name)), config) if base else config


def complete(config: Config, title: str = "experiment") -> Config:
    """Interpolations replaced, every option checked and every default written out."""
    try:
        plain = OmegaConf.to_container(OmegaConf.create(config), resolve=True)
    except OmegaConfBaseException as error:
        raise SpecError(f"{title}: {str(error).splitlines()[0]}") from error
    assert isinstance(plain, dict)
    return specs.complete(specs.fields(Experiment), {str(k): v for k, v in plain.items()}, title, title, part_of)


def resolve(kind: str, spec: specs.Spec) -> Config:
    """A part's spec completed and checked, `experiment:NAME` replaced by what that experiment trains. SpecError."""
    return specs.resolve(kind, spec, part_of=part_of)


def apply(config: Config, overrides: Iterable[str]) -> Config:
    """`key=value` strings, applied in order; values are YAML."""
    for item in overrides:
        key, sign, _ = item.partition("=")
        if not sign or not key:
            raise SpecError(f"override {item!r} is not of the form key=value, such as trainer.max_steps=100")
        try:
            nested = OmegaConf.to_container(OmegaConf.from_dotlist([item]))
        except Exception as error:
            raise SpecError(f"override {item!r} cannot be read: {error}") from error
        assert isinstance(nested, dict)
        config = merge(config, with_suite({str(k): v for k, v in nested.items()}))
    return config


def with_suite(config: Config) -> Config:
    """`eval: NAME` replaced by what eval/NAME.yaml says."""
    suite = config.get("eval")
    return {**config, "eval": read(locate("eval", suite))} if isinstance(suite, str) else config


def nest(flat: Config) -> Config:
    """`{"a.b": 1}` -> `{"a": {"b": 1}}`, as the overrides of an ablation's label are written."""
    out: Config = {}
    for key, value in flat.items():
        head, _, rest = key.partition(".")
        inner = nest({rest: value}) if rest else value
        out = merge(out, {head: inner})
    return out


def merge(base: Any, over: Any) -> Any:
    """`over` on top of `base`. A spec whose name changes starts afresh; one without a name keeps the base's."""
    if isinstance(base, str) and isinstance(over, dict) and "name" not in over:
        base = {"name": base}
    if isinstance(base, dict) and isinstance(over, str) and "name" in base:
        return base if base["name"] == over else over
    if not isinstance(base, dict) or not isinstance(over, dict):
        return over
    if "name" in over and base.get("name", over["name"]) != over["name"]:
        return over
    return {**base, **{k: merge(base[k], v) if k in base else v for k, v in over.items()}}


def part_of(reference: str, kind: str) -> Config:
    """The spec of that kind inside `experiment:NAME`'s system. SpecError, also for a ring of experiments."""
    name = reference.removeprefix("experiment:")
    _check_ring(name)
    system = load(name)["system"]
    if not isinstance(system.get(kind), dict):
        raise SpecError(f"experiment {name!r} trains a {system['name']!r} system, which holds no {kind}")
    return {k: v for k, v in system[kind].items() if k != "weights"}


def _check_ring(name: str, seen: tuple[str, ...] = ()) -> None:
    if name in seen:
        raise SpecError(f"experiments take weights from each other: {' -> '.join([*seen, name])}")
    for other in experiments_named(compose(name)):
        _check_ring(other, (*seen, name))


def image_size(data: Config) -> int:
    """Pixels a side of what a data module yields."""
    while "source" in data:
        data = data["source"]
    return int(data["size"])


def check_sampling(given: Config) -> Config:
    """Sampling options completed and checked, as in an experiment's `sampling:`."""
    return specs.complete(specs.fields(SamplingOptions), given, "sampling", "sampling")


def experiments_named(value: Any) -> list[str]:
    """The experiments that a configuration takes weights from, in order of appearance."""
    if isinstance(value, dict):
        found = [n for v in value.values() for n in experiments_named(v)]
    else:
        found = (
            [value.removeprefix("experiment:")] if isinstance(value, str) and value.startswith("experiment:") else []
        )
    return list(dict.fromkeys(found))


def needed(experiment: Config) -> list[str]:
    """The experiments whose weights its system or data takes, and those that they take in turn; the innermost first."""
    named = [*experiments_named(experiment["system"]), *experiments_named(experiment["data"])]
    return list(dict.fromkeys(n for name in named for n in (*needed(load(name)), name)))
