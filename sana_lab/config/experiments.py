"""Experiments: YAML on a `base`, with `key=value` overrides, checked and completed against the parts' signatures."""

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from sana_lab.config import budgets, interpolation, secrets, specs, stages
from sana_lab.config.memo import reuse
from sana_lab.config.registry import WEIGHTED
from sana_lab.config.schema import Config, Experiment, SamplingOptions
from sana_lab.config.specs import SpecError, nearest
from sana_lab.config.validation import Written, opened, plain
from sana_lab.config.yaml_text import read_file, read_value


def roots(kind: str) -> list[Path]:
    """Folders of a kind of recipe (`experiments`, `ablations`, `eval`): in the working directory, checkout, package."""
    package = Path(__file__).parents[1]
    return [Path(kind), package.parent / kind, package / "recipes" / kind]


def locate(kind: str, name: str) -> Path:
    """The YAML file of a name or path, also of NAME@STAGE. SpecError with the nearest name."""
    name = stages.split(name)[0] if kind == "experiments" else name
    path = Path(name)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    for root in roots(kind):
        if (root / f"{name}.yaml").is_file():
            return root / f"{name}.yaml"
    raise SpecError(f"there is no {kind.rstrip('s')} {name!r}; {nearest(name, available(kind, str(path.parent)))}")


def available(kind: str, folder: str = ".") -> list[str]:
    """Names of the recipes in one folder of a kind, such as `paper/captions` in `paper`; not in deeper folders."""
    return sorted({(Path(folder) / p.stem).as_posix() for r in roots(kind) for p in (r / folder).glob("*.yaml")})


def weights_folder(name: str) -> Path:
    """The folder of weights of that name in `experiments/weights`, or at that path. SpecError with the nearest name."""
    parents = [root / "weights" for root in roots("experiments")]
    folder = next((path for path in (*(parent / name for parent in parents), Path(name)) if path.is_dir()), None)
    if folder is None:
        names = {path.name for parent in parents for path in parent.glob("*/")}
        raise SpecError(f"there is no folder {name!r} in experiments/weights; {nearest(name, names)}")
    return folder


def read(path: Path) -> Config:
    """A YAML mapping, interpolations unresolved and scalars `Written`. SpecError where it does not parse."""
    raw = read_file(path)
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise SpecError(f"{path} holds {type(plain(raw)).__name__}, expected a mapping")
    return raw


def load(name: str, overrides: Sequence[str] = ()) -> Config:
    """The experiment of that name: bases merged, `key=value` applied, resolved and completed. SpecError."""
    return reuse(("load", name, list(overrides)), lambda: complete(apply(compose(name), overrides), name))


def compose(name: str, ancestors: tuple[str, ...] = ()) -> Config:
    """An experiment's YAML merged onto its `base`, without defaults: of one with stages the stage that NAME@STAGE says,
    or the last. SpecError for a ring of bases."""
    title, stage = stages.split(name)
    config, changes = stages.choose(_merged(title, ancestors), title, stage)
    return cast(Config, merge(config, with_suite(changes)))


def stages_of(name: str) -> list[str]:
    """The names of an experiment's stages, each an experiment of its own: `NAME@STAGE`; [] if it has none."""
    title, _ = stages.split(name)
    return [f"{title}{stages.SIGN}{stage}" for stage in stages.names(_merged(title, ()), title)]


def _merged(name: str, ancestors: tuple[str, ...]) -> Config:
    """An experiment's YAML merged onto its `base`, with all stages unless the base is one of them."""
    if name in ancestors:
        raise SpecError(f"experiments name each other as base: {' -> '.join([*ancestors, name])}")
    config = with_suite(read(locate("experiments", name)))
    base = config.pop("base", None)
    if base is None or base == "":
        return config
    if not isinstance(base, str | Written):
        raise SpecError(f"base of {name!r} is {base!r}, expected the name of an experiment, or a path")
    _, stage = stages.split(str(base))
    inherited = _merged(str(base), (*ancestors, name)) if stage is None else compose(str(base), (*ancestors, name))
    return cast(Config, merge(inherited, config))


def complete(config: Config, title: str = "experiment") -> Config:
    """Resolve interpolations, check every option and fill in every default. SpecError, also for a secret.

    What came from the environment is stored as `interpolation.as_written` of the result.
    """
    secrets.check(plain(config), title)
    values = budgets.without_steps(interpolation.interpolated(config, title), title)
    for name in referenced(plain([values.get(key) for key in ("system", "data", "eval", "parent")])):
        _check_ring(name)
    completed = budgets.with_steps(specs.complete(specs.fields(Experiment), values, title, title, part_of), title)
    texts = [*interpolation.environment_texts(config), *_inherited_texts(plain(values))]
    return interpolation.with_written(completed, texts, title)


def _inherited_texts(values: Config) -> interpolation.Texts:
    """What came from the environment in parts that are `experiment:NAME`, unless this experiment replaces it."""
    texts: interpolation.Texts = []
    for path, text in interpolation.texts_in(values):
        place = path[:-1] if path[-1:] == ("name",) else path
        if text.startswith("experiment:") and place and place[-1] in WEIGHTED:
            given = functools.reduce(lambda inner, step: inner[step], place, cast(Any, values))
            for (_, *inner), written in _written_in(text.removeprefix("experiment:"), str(place[-1])):
                if not (inner and isinstance(given, dict) and inner[0] in given):
                    texts.append(((*place, *inner), written))
    return texts


def _written_in(name: str, kind: str) -> list[tuple[list[str | int], str]]:
    """(path from its kind on, text) of what came from the environment in a part of an experiment's system."""
    texts = load(name).get(interpolation.WRITTEN, [])
    return [(path[1:], text) for path, text in texts if path[:2] == ["system", kind]]


def from_card(config: Config, source: str) -> Config:
    """The experiment that a file brings, checked and completed; nothing in it is interpolated. SpecError."""
    interpolation.check_from_file(config.get("system"), source, "system")
    return specs.complete(specs.fields(Experiment), config, source, source, part_of)


def resolve(kind: str, spec: specs.Spec) -> Config:
    """A part's spec completed and checked, `experiment:NAME` replaced by what that experiment trains. SpecError."""
    return specs.resolve(kind, spec, part_of=part_of)


def apply(config: Config, overrides: Iterable[str]) -> Config:
    """Apply `key=value` strings in order; keys are dotted paths, values YAML, for text options text. SpecError."""
    for item in overrides:
        key, sign, text = item.partition("=")
        if not sign or not key:
            raise SpecError(f"override {item!r} is not of the form key=value, such as trainer.max_steps=100")
        config = merge(config, with_suite(nest({key: read_value(text)})))
    return config


def with_suite(config: Config) -> Config:
    """Replace `eval: NAME` by the content of eval/NAME.yaml."""
    suite = config.get("eval")
    return {**config, "eval": read(locate("eval", suite))} if isinstance(suite, str) else config


def nest(flat: Config) -> Config:
    """Unfold dotted keys, as in the overrides of an ablation: `{"a.b": 1}` -> `{"a": {"b": 1}}`."""
    out: Config = {}
    for key, value in flat.items():
        head, _, rest = key.partition(".")
        inner = nest({rest: value}) if rest else value
        out = merge(out, {head: inner})
    return out


def merge(base: Any, over: Any) -> Any:
    """Merge `over` onto `base`. A spec with another name replaces the base's; one without a name edits its options."""
    base = opened(base)
    if isinstance(over, Written) and isinstance(over.value, dict):  # on text, it is text until the type is known
        merged = merge(base, over.value)
        return merged if isinstance(base, dict) else Written(over.text, merged)
    if isinstance(base, str) and isinstance(over, dict) and "name" not in over:
        base = {"name": base}
    if isinstance(base, list) and isinstance(over, dict) and "name" not in over:
        options = ", ".join(map(str, over))
        raise SpecError(
            f"an override of {options} is for one part, where there is a list of {len(base)}; expected a list"
        )
    if isinstance(base, dict) and isinstance(over, str) and "name" in base:
        return base if base["name"] == over else over
    if not isinstance(base, dict) or not isinstance(over, dict):
        return over
    if "name" in over and base.get("name", over["name"]) != over["name"]:
        return over
    return {**base, **{k: merge(base[k], v) if k in base else v for k, v in over.items()}}


def part_of(reference: str, kind: str) -> Config:
    """The spec of a kind in the system of `experiment:NAME`. SpecError, also for a ring of experiments."""
    name = reference.removeprefix("experiment:")
    _check_ring(name)
    system = load(name)["system"]
    if not isinstance(system.get(kind), dict):
        raise SpecError(f"experiment {name!r} trains a {system['name']!r} system, which holds no {kind}")
    return {k: v for k, v in system[kind].items() if k != "weights"}


def _check_ring(name: str, ancestors: tuple[str, ...] = ()) -> None:
    if name in ancestors:
        raise SpecError(f"experiments take weights from each other: {' -> '.join([*ancestors, name])}")
    for other in referenced(compose(name)):
        _check_ring(other, (*ancestors, name))


def image_size(data: Config) -> int:
    """Pixels a side of the images of a data spec, looking through caches to their source."""
    return int(source_of(data)["size"])


def source_of(data: Config) -> Config:
    """The data spec that caches of latents and features are made of, or the spec itself."""
    while "source" in data:
        data = data["source"]
    return data


def check_sampling(options: Config) -> Config:
    """Complete and check sampling options, as in an experiment's `sampling:`. SpecError."""
    return specs.complete(specs.fields(SamplingOptions), options, "sampling", "sampling")


def referenced(value: Any) -> list[str]:
    """Names of the experiments whose weights a configuration takes (`experiment:NAME`), in order of appearance."""
    if isinstance(value, dict | list):
        inside = value.values() if isinstance(value, dict) else value
        return list(dict.fromkeys(name for inner in inside for name in referenced(inner)))
    is_reference = isinstance(value, str) and value.startswith("experiment:")
    return [value.removeprefix("experiment:")] if is_reference else []


def prerequisites(experiment: Config) -> list[str]:
    """Names of the experiments to train before this one, those that they need first."""
    names = referenced([experiment.get(key, {}) for key in ("system", "data", "parent")])
    return list(dict.fromkeys(n for name in names for n in (*prerequisites(load(name)), name)))
