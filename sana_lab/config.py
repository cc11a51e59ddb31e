"""Experiments and ablations: YAML + `base` + `key=value`, checked and completed against the parts' signatures."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sana_lab import digests, parts
from sana_lab.parts import RUNTIME, AsBefore, Spec, SpecError, nearest

Config = dict[str, Any]

REFERENCES = ("weights", "model", "lpips_weights")
"""Options that may name a file or folder of other people's; beside them, anything that says `file:PATH`."""


@dataclass
class TrainerOptions:
    """`trainer:` of an experiment. Precision, steps and clipping train the model; the rest is how it runs."""

    max_steps: int = 1000
    precision: Literal["32-true", "16-mixed", "bf16-mixed", "bf16-true", "64-true"] = "32-true"
    gradient_clip: float = 1.0
    accumulate: int = 1
    accelerator: Annotated[Literal["auto", "cpu", "gpu", "cuda", "mps"], RUNTIME] = "auto"
    devices: Annotated[int | str, RUNTIME] = "auto"
    threads: Annotated[int | None, RUNTIME] = None  # CPU threads of torch; None leaves torch's choice
    log_every: Annotated[int, RUNTIME] = 25
    validate_every: Annotated[int, RUNTIME] = 500
    checkpoint_every: Annotated[int, RUNTIME] = 250
    compile: Annotated[bool, RUNTIME] = False  # torch.compile of each block of a DiT


@dataclass
class EvaluationOptions:
    """`eval:` of an experiment: what the quality and cost columns are measured on."""

    prompts_per_task: int = 20
    images_per_prompt: int = 2
    batch: int = 64
    seed: int = 43
    reconstructions: int = 1000
    bench_size: int | None = None  # pixels a side; None is the training size
    bench_batch: int = 1
    bench_repeats: int = 5
    bench_steps: int | None = None  # denoiser evaluations that are timed; None times all of them
    fid_weights: str | None = None  # torch-fidelity's Inception .pth; without it there is no FID column
    held_out: int = 1000  # held-out pictures and captions, for measures that bring no prompts
    measures: Annotated[list[Annotated[Spec, "measure"]], AsBefore([])] = field(default_factory=list)
    captions: Annotated[str | None, AsBefore(None)] = None  # a folder of images that stands for held-out data
    lpips_weights: Annotated[str | None, AsBefore(None)] = None  # torchvision's .pth; without it there is no LPIPS
    lpips_net: Annotated[Literal["vgg", "alex"], AsBefore("alex")] = "alex"
    rfid: Annotated[Spec | None, "extractor", AsBefore(None)] = None
    reconstruction_folder: Annotated[str | None, AsBefore(None)] = None  # its images, at their own sizes
    worst: Annotated[int, AsBefore(0)] = 0  # of the worst reconstructions so many are drawn
    worst_picture: Annotated[str | None, AsBefore(None)] = None  # their .png


@dataclass
class SamplingOptions:
    """`sampling:` of an experiment; trains nothing. The same fields as `sana_lab.diffusion.sampling.Sampling`."""

    solver: Annotated[Spec, "solver"] = "dpmpp"
    steps: int = 20
    guidance: float = 4.5
    shift: float | None = None
    guidance_interval: Annotated[tuple[float, float] | None, AsBefore(None)] = None
    grid: Annotated[Literal["even", "flow_match"], AsBefore("even")] = "even"
    quantize: Annotated[Literal["none", "int8", "w8a8"], AsBefore("none")] = "none"
    offload: Annotated[bool, RUNTIME] = False
    graph: Annotated[Literal["auto", "never", "always"], RUNTIME] = "auto"


@dataclass
class Experiment:
    """One complete run: a system, its data, and how it is trained, sampled and judged."""

    system: Annotated[Spec, "system"]
    data: Annotated[Spec, "data"]
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    trainer: TrainerOptions = field(default_factory=TrainerOptions)
    eval: EvaluationOptions = field(default_factory=EvaluationOptions)
    prompts: list[str] = field(default_factory=list)  # drawn as a grid while training
    seed: int = 0


class Trial(NamedTuple):
    """One cell of an ablation: an experiment under labels."""

    labels: dict[str, str]
    seed: int
    experiment: Config

    @property
    def label(self) -> str:
        return " · ".join(self.labels.values())


@dataclass
class Expectation:
    """What others found: rows of a table, by their labels, from the best to the worst in one metric."""

    metric: str
    order: list[str]


@dataclass
class Ablation:
    """`ablations/*.yaml`: a base experiment, axes of labelled overrides, seeds, and the table's columns.

    `published` names a file of eval/published, whose numbers stand beside those measured in rows of the same label.
    `scales` holds, by name, what takes the place of the file's own keys (`--scale toy`); `stand_in` says which metric
    takes the place of one that a scale cannot measure. `baseline` is the label that other rows are tested against.
    """

    title: str
    base: str
    axes: dict[str, dict[str, Config | None]]
    seeds: list[int] = field(default_factory=lambda: [0])
    columns: list[str] = field(default_factory=list)
    common: dict[str, Any] = field(default_factory=dict)  # overrides of every row
    notes: list[str] = field(default_factory=list)
    x: str | None = None  # the axis whose labels are numbers, for a line plot
    prompts: list[str] = field(default_factory=list)
    published: str | None = None
    expect: list[Expectation] = field(default_factory=list)
    stand_in: dict[str, str] = field(default_factory=dict)
    baseline: str | None = None
    scales: dict[str, dict[str, Any]] = field(default_factory=dict)


def roots(kind: str) -> list[Path]:
    """Where recipes of a kind (`experiments`, `ablations`, `eval`) lie: here, in the checkout, in the package."""
    package = Path(__file__).parent
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
    config = _with_suite(read(locate("experiments", name)))
    base = config.pop("base", None)
    return merge(compose(base, (*seen, name)), config) if base else config


def complete(config: Config, title: str = "experiment") -> Config:
    """Interpolations replaced, every option checked and every default written out."""
    try:
        plain = OmegaConf.to_container(OmegaConf.create(config), resolve=True)
    except OmegaConfBaseException as error:
        raise SpecError(f"{title}: {str(error).splitlines()[0]}") from error
    assert isinstance(plain, dict)
    return parts.complete(parts.fields(Experiment), {str(k): v for k, v in plain.items()}, title, title)


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
        config = merge(config, _with_suite({str(k): v for k, v in nested.items()}))
    return config


def _with_suite(config: Config) -> Config:
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
    return parts.complete(parts.fields(SamplingOptions), given, "sampling", "sampling")


def experiment_hash(config: Config) -> str:
    """The name of what this experiment trains: 16 hex digits over system, data, trainer and seed, resolved."""
    return _digest(_canonical(config))


def trial_hash(trial: Trial) -> str:
    """The name of a finished trial: what was trained, and how it was sampled and judged."""
    rest = {k: trial.experiment[k] for k in ("sampling", "eval", "prompts")}
    rest["sampling"] = _without_later(SamplingOptions, rest["sampling"])
    rest["eval"] = _without_later(EvaluationOptions, rest["eval"])
    return _digest({"model": experiment_hash(trial.experiment), **rest})


def _canonical(config: Config) -> Config:
    trainer = parts.fields(TrainerOptions)
    kept = {k: v for k, v in config["trainer"].items() if not trainer[k].marks(parts.Runtime)}
    system = _with_hashes(parts.canonical("system", config["system"]))
    data = _with_hashes(parts.canonical("data", config["data"]))
    return {
        "system": system,
        "data": data,
        "content": _content(config["data"]),
        "trainer": kept,
        "seed": config["seed"],
    }


def _without_later(record: type, values: Config) -> Config:
    """Without options added later at their as-before value, so that earlier trials keep their key; runtime ones too."""
    kept = {k: o for k, o in parts.fields(record).items() if not o.marks(parts.Runtime)}
    return {k: v for k, v in values.items() if k in kept and not any(m.value == v for m in kept[k].marks(AsBefore))}


def _content(data: Config) -> str | None:
    """A digest of what a data set holds, where the part offers one (`digest`); files may change under one name.

    Of data made from other data it is that of the first source: what is made of it follows, and need not be made.
    """
    while "source" in data:
        data = data["source"]
    part = parts.build("data", data)
    return part.digest() if hasattr(part, "digest") else None


def _with_hashes(value: Any, key: str = "") -> Any:
    """`experiment:NAME` replaced by that experiment's hash, files and folders by a digest of what they hold, so that
    other numbers under the same name are noticed. Hub ids stay."""
    if isinstance(value, dict):
        return {k: _with_hashes(v, k) for k, v in value.items()}
    if not isinstance(value, str):
        return value
    if value.startswith("experiment:"):
        return "experiment:" + experiment_hash(load(value.removeprefix("experiment:")))
    path = Path(value.removeprefix("file:")).expanduser()
    named = key in REFERENCES or value.startswith("file:")
    return f"content:{digests.content(path)}" if named and path.exists() else value


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


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


def load_ablation(name: str, overrides: Sequence[str] = (), scale: str | None = None) -> tuple[Ablation, list[Trial]]:
    """An ablation at a scale, and its trials, each a complete experiment; all are checked before the first runs."""
    raw = at_scale(read(locate("ablations", name)), scale, name)
    checked = parts.complete(parts.fields(Ablation), raw, f"ablation {name!r}", name)
    ablation = Ablation(**{**checked, "expect": [Expectation(**e) for e in checked["expect"]]})
    if not ablation.axes or not all(ablation.axes.values()):
        raise SpecError(
            f"ablation {name!r} has no axes with labels; expected axes: {{attention: {{softmax: ..., ...}}}}"
        )
    trials = [t for seed in ablation.seeds for t in _trials(ablation, seed, overrides)]
    check_order(ablation.expect, {t.label for t in trials}, name)
    return ablation, trials


def at_scale(raw: Config, scale: str | None, name: str) -> Config:
    """An ablation's YAML with what a scale puts in the place of its own keys. SpecError for an unknown one."""
    scales = raw.get("scales") or {}
    if scale is None or not isinstance(scales, dict):
        return raw
    if scale not in scales:
        raise SpecError(f"ablation {name!r} has no scale {scale!r}; {nearest(scale, scales)}")
    return {**raw, **scales[scale]}


def check_order(expect: Sequence[Expectation], labels: set[str], name: str) -> None:
    """SpecError where something is expected of a row that is none."""
    for label in (label for e in expect for label in e.order):
        if label not in labels:
            raise SpecError(
                f"ablation {name!r} expects something of {label!r}, which is no row; {nearest(label, labels)}"
            )


def _trials(ablation: Ablation, seed: int, overrides: Sequence[str]) -> Iterable[Trial]:
    axes = [[(axis, label, over) for label, over in labels.items()] for axis, labels in ablation.axes.items()]
    for combination in product(*axes):
        config = merge(compose(ablation.base), _with_suite(nest(ablation.common)))
        for _, _, over in combination:
            config = merge(config, _with_suite(nest(over or {})))
        if ablation.prompts:
            config["prompts"] = ablation.prompts
        labels = {axis: str(label) for axis, label, _ in combination}
        title = f"{ablation.title}: {' · '.join(labels.values())}"
        yield Trial(labels, seed, complete(apply({**config, "seed": seed}, overrides), title))
