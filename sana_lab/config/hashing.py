"""Hashes that name trained models and finished trials.

A hash is of the resolved configuration. What the configuration names enters by what it is: files and folders by
content, other experiments by their hash. A part enters by name, options and `version`, an attribute that counts changes
of its mathematics; a guest that evaluates also by its module's file, at the cost of a repeated evaluation. Hub ids
enter unchanged.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, get_args

from safetensors import safe_open

from sana_lab.config import digests, experiments, guests, specs
from sana_lab.config.memo import reuse
from sana_lab.config.schema import Config, EvaluationOptions, SamplingOptions, TrainerOptions, Trial
from sana_lab.config.specs import AsBefore, Option, Runtime
from sana_lab.config.validation import kind_of

MODEL_OPTIONS = ("weights", "model", "lpips_weights")
"""Options of systems and data that may name a folder of a model; files are recognised under any option."""

OUTPUTS = ("worst_picture",)
"""Options of `eval:` that name an output file; they enter the hash unchanged."""

ADDABLE = ("measures", "fid_weights")
"""Options of `eval:` that add a measure and change nothing of others."""

NOT_OF_POINTS = ("bench_", "worst", "noise_seeds")
"""Beginnings of the options of `eval:` that the points of a training do not depend on."""

NOT_ALONE = ("reconstruct",)
"""Whole names of such options, of which others begin with the same letters."""


def experiment_hash(config: Config) -> str:
    """The name of what an experiment trains: 16 hex digits over system, data, trainer and seed, resolved."""
    return _digest(_trained_by(config))


def trial_hash(trial: Trial) -> str:
    """The name of a finished trial: 16 hex digits over what was trained, and how it was sampled and evaluated."""
    sampling = _sampled_by(trial.config["sampling"])
    evaluation = _evaluated_by(trial.config["eval"])
    prompts = trial.config["prompts"]
    model = experiment_hash(trial.config)
    return _digest({"model": model, "sampling": sampling, "eval": evaluation, "prompts": prompts} | _implied(trial))


def core_hash(trial: Trial) -> str:
    """The name of a trial without what `measure_hashes` lists: measures may be appended to a finished trial of it."""
    options = {**trial.config["eval"], **{name: None for name in ADDABLE if name != "measures"}, "measures": []}
    return trial_hash(trial._replace(config={**trial.config, "eval": options}))


def measure_hashes(trial: Trial) -> dict[str, tuple[str, Any]]:
    """Hash of each measure that `eval:` adds to those that the data imply, to its option and the option's value."""
    options = trial.config["eval"]
    values = [("measures", spec) for spec in options["measures"]]
    values += [(k, options[k]) for k in ADDABLE if k != "measures" and options[k] is not None]
    schema = specs.fields(EvaluationOptions)
    return {_digest([name, _measured_with(schema[name], value)]): (name, value) for name, value in values}


def _implied(trial: Trial) -> Config:
    """The measure beside GenEval that the embedded world implies, so that trials finished without it are evaluated
    again; their trained models are reused."""
    data = trial.config["data"]
    shapes = data.get("source", data).get("name") == "shapes"
    return {"implied": [_spec_with("measure", {"name": "exact_shapes"})]} if shapes else {}


def points_hash(config: Config) -> str:
    """What the points of a training's curves depend on beside the training: sampling, measures, number of images."""
    evaluation = {
        k: v for k, v in _evaluated_by(config["eval"]).items() if k not in NOT_ALONE and not k.startswith(NOT_OF_POINTS)
    }
    sampling = _sampled_by(config["sampling"])
    return _digest({"sampling": sampling, "eval": evaluation, "images": config["eval"]["at_images"]})


def with_weights(key: str, path: Path) -> str:
    """The name of a trial whose weights are those of a file, by its content."""
    return _digest({"trial": key, "weights": digests.sha256(path)})


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _without_later(record: type, values: Config) -> Config:
    """Options without runtime ones, and without those added later at their as-before value, so that keys persist."""
    return reuse(("without later", record, values), lambda: _earlier(record, values))


def _earlier(record: type, values: Config) -> Config:
    schema = {k: o for k, o in specs.fields(record).items() if not o.marks(Runtime)}
    return {k: v for k, v in values.items() if k in schema and not any(m.value == v for m in schema[k].marks(AsBefore))}


# what trains


def _trained_by(config: Config) -> Config:
    return {
        "system": _part("system", config["system"]),
        "data": _part("data", config["data"]),
        "content": reuse(("digest", config["data"]), lambda: _data_digest(config["data"])),
        "trainer": _without_later(TrainerOptions, config["trainer"]),
        "seed": config["seed"],
        **_parent(config),
    }


def _parent(config: Config) -> Config:
    """The model that training begins from; nothing without one, and none in configurations before there were."""
    parent = config.get("parent") or {}
    return {"parent": with_contents(parent)} if parent.get("weights") else {}


def _part(kind: str, spec: Config) -> Any:
    return reuse(("part", kind, spec), lambda: with_contents(specs.canonical(kind, spec)))


def _data_digest(data: Config) -> str:
    """The digest of a data set; of derived data, that of the first source, which determines them."""
    while "source" in data:
        data = data["source"]
    return specs.build("data", data).digest()


def with_contents(value: Any, key: str = "") -> Any:
    """References in a canonical spec replaced: `experiment:NAME` by a hash, files and folders of models by a digest."""
    if isinstance(value, dict):
        return {k: with_contents(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [with_contents(v, key) if isinstance(v, dict) else v for v in value]
    if not isinstance(value, str):
        return value
    if value.startswith("experiment:"):
        return f"experiment:{experiment_hash(experiments.load(value.removeprefix('experiment:')))}"
    path = _existing(value)
    if path is None or key == "name":
        return value
    is_reference = key in MODEL_OPTIONS or value.startswith("file:") or (path.suffix and path.is_file())
    return f"content:{digests.model(path)}" if is_reference else value


def _existing(text: str) -> Path | None:
    """The file or folder of that name, or None."""
    try:
        path = Path(text.removeprefix("file:")).expanduser()
        return path if text and path.exists() else None
    except (OSError, ValueError, RuntimeError):  # text that is too long for a path, or begins with ~
        return None


# what samples and evaluates


def _sampled_by(options: Config) -> Config:
    """Sampling options, with the contents of what a measure that chooses images, or a rule of regions, names."""
    schema, hashed = specs.fields(SamplingOptions), _without_later(SamplingOptions, options)
    return {k: _measured_with(schema[k], v) if k in ("best_by", "regions") else v for k, v in hashed.items()}


def _evaluated_by(options: Config) -> Config:
    return reuse(("evaluated", options), lambda: _evaluation(options))


def _evaluation(options: Config) -> Config:
    schema = specs.fields(EvaluationOptions)
    hashed = _without_later(EvaluationOptions, options)
    return {k: v if k in OUTPUTS else _measured_with(schema[k], v) for k, v in hashed.items()}


def _measured_with(option: Option, value: Any) -> Any:
    """The value of an option with every file, folder and experiment that it names replaced, also in inner specs."""
    kind = _kind_within(option.annotation)
    if isinstance(value, list | tuple):
        return [_measured_with(option, v) for v in value]
    if kind and isinstance(value, dict):
        return _spec_with(kind, value)
    is_text = isinstance(value, str) and _admits_text(option.annotation) and not option.marks(Runtime)
    return _referenced(value) if is_text else value


def _spec_with(kind: str, spec: Config) -> Config:
    target = specs.find(kind, spec["name"])
    schema = specs.options(kind, target)
    version = getattr(target, "version", 1)
    inner = {k: _measured_with(schema[k], v) if k in schema else v for k, v in spec.items()}
    extra = {"part_version": version} if isinstance(version, int) and version != 1 else {}
    return {**inner, "name": _with_source(spec["name"]), **extra}


def _kind_within(annotation: Any) -> str | None:
    """The kind of the spec, or of the specs in a list."""
    return kind_of(annotation) or next(filter(None, map(_kind_within, get_args(annotation))), None)


def _admits_text(annotation: Any) -> bool:
    return annotation is str or any(map(_admits_text, get_args(annotation)))


def _referenced(value: str) -> str:
    """A path, a file of eval/prompts, `experiment:NAME` or `module:attribute`, by what is in it; other text stays."""
    if value.startswith("experiment:"):
        return _judge(value.removeprefix("experiment:"))
    places = [value, *(f"{root / 'prompts'}/{value}" for root in experiments.roots("eval"))]
    path = next(filter(None, map(_existing, places)), None) if value else None
    if path is None:
        return _with_source(value)
    return f"content:{digests.folder(path) if path.is_dir() else digests.sha256(path)}"


def _with_source(name: str) -> str:
    """A user's `module:attribute` with a digest of the module's file; other names and text unchanged."""
    module, colon, attribute = name.partition(":")
    words = all(word.isidentifier() for word in (*module.split("."), attribute))
    if not colon or not words or module.startswith("sana_lab."):
        return name
    source = guests.locate(module)
    file = Path(source.origin) if source and source.origin else None
    return f"{name} content:{digests.sha256(file)}" if file and file.is_file() else name


def _judge(name: str) -> str:
    """Identity of an experiment whose network is used in a measure: its name if shipped, else its hash."""
    key = experiment_hash(experiments.load(name))
    shipped = (root / "weights" / f"{name}.safetensors" for root in experiments.roots("experiments"))
    return f"experiment:{name if any(_card_hash(path) == key for path in shipped) else key}"


def _card_hash(path: Path) -> str | None:
    """The hash on the card of a weights file that ships."""
    if not path.is_file():
        return None
    with safe_open(path, "np") as file:
        return json.loads((file.metadata() or {}).get("card", "{}")).get("hash")
