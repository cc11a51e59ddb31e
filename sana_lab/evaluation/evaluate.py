"""The verb `eval`: every measure of a suite, of a trained system, a diffusers pipeline, or pictures in a folder."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sana_lab import api, environment
from sana_lab.bench.memory_advice import advised
from sana_lab.checkpoints import weights
from sana_lab.config import experiments, hashing, schema
from sana_lab.config.paths import check_file, check_folder
from sana_lab.config.specs import Spec, SpecError, build, complete, fields, name_of
from sana_lab.diffusion.sampling import Sampling
from sana_lab.environment import place
from sana_lab.evaluation import Measure, Report, distributed, reconstruction, sources, suite
from sana_lab.evaluation.extractors.inception import hint
from sana_lab.evaluation.geneval import rule
from sana_lab.evaluation.geneval.measure import GenEval
from sana_lab.peers.pipeline import Peer, is_pipeline
from sana_lab.pretrained import loading
from sana_lab.shapes import train_attributes, train_clip
from sana_lab.systems.autoencoder import AutoencoderSystem
from sana_lab.systems.text2image import TextToImage
from sana_lab.tracking.store import Store
from sana_lab.types import Json

sampler = sources.sampler


def evaluate(model: str | Any, overrides: Sequence[str] = ()) -> Json:
    """Every measure that `eval:` asks for, as plain data, with what it was measured with.

    `model` is an experiment's name, what `load` makes or reads, a diffusers pipeline's folder, or a folder of pictures;
    of the last two `eval.*`, `sampling.*` and `size` can be given. A text2image system of the embedded world gets
    `geneval` (tasks, overall, interval, per prompt), an autoencoder `reconstruction`; `measures` holds all others, and
    `per_image` the numbers that paired tests need. SpecError, ValueError.
    """
    began = time.perf_counter()
    found = _of_name(model, overrides) if isinstance(model, str) else _of_system(model)
    return {
        **found,
        "seconds": round(time.perf_counter() - began, 1),
        "environment": environment.environment(),
    }


def _of_name(name: str, overrides: Sequence[str]) -> Json:
    if not loading.is_model(name):
        return _of_system(api.load(name, overrides))
    given = experiments.apply({}, overrides)
    if odd := given.keys() - {"eval", "sampling", "size"}:
        raise SpecError(f"{name!r} is no experiment: eval.*, sampling.* and size can be given, not {', '.join(odd)}")
    options = complete(fields(schema.EvaluationOptions), given.get("eval", {}), "eval", "eval")
    if sources.is_pictures(Path(name)):
        measures = chosen(options, Path(name))
        skipped: dict[str, str] = {}
        found = told(sources.judge_folder(Path(name), measures, options, skipped), measures)
        return {**found, "settings": {"eval": options}, "skipped": skipped}
    if is_pipeline(name) and not _ours(Path(name)):
        return _of_peer(Peer.load(name), options, given)
    system = api.load(name, [o for o in overrides if o.startswith("sampling.")])
    if isinstance(system, TextToImage) and system.experiment is not None:
        data = {**system.experiment["data"], **({"size": given["size"]} if "size" in given else {})}
        system.experiment = {"seed": None, **system.experiment, "eval": options, "data": data}
    return _of_system(system)


def _ours(folder: Path) -> bool:
    """Whether a pipeline is one that the lab reads as its own system."""
    index = folder / "model_index.json"
    return index.is_file() and json.loads(index.read_text()).get("_class_name") == "SanaPipeline"


def _of_peer(peer: Peer, options: Json, given: Json) -> Json:
    if "size" not in given:
        raise SpecError(f"{peer.name} draws at any size; expected pixels a side, such as size=1024")
    sampling, size = given.get("sampling", {}), given["size"]
    measures, subject = chosen(options), sources.of_peer(peer, options, sampling, size)
    found = told(suite.run(measures, subject, options["batch"]), measures, subject.captions, options["seed"])
    settings = {"eval": options, "sampling": sampling, "size": size}
    return {**found, "settings": settings, "model": peer.identity()}


def _of_system(system: Any) -> Json:
    experiment = getattr(system, "experiment", None)
    if experiment is None or not isinstance(system, KINDS):
        raise SpecError(
            f"model is a {type(system).__name__}{' without' if experiment is None else ' with'} an experiment; "
            "expected the name of an experiment, a pipeline's folder, or what `load` makes of them"
        )
    if isinstance(system, TextToImage):
        system.settle(Sampling(**experiment["sampling"]), place("auto"))
    elif isinstance(system, AutoencoderSystem):
        system.to(place("auto"))
    found = _measured(system, experiment["eval"])
    settings = {k: experiment.get(k) for k in ("sampling", "eval", "seed")}
    model = hashing.experiment_hash(experiment) if "trainer" in experiment else experiment["system"]
    return {**found, "settings": settings, "model": model}


KINDS = (TextToImage, AutoencoderSystem, train_attributes.AttributesSystem, train_clip.ClipSystem)


def _measured(system: Any, options: Json) -> Json:
    match system:
        case TextToImage():
            source = system.experiment["data"].get("source", system.experiment["data"])
            measures = chosen(options, world=source.get("name") == "shapes")
            subject = sources.of_system(system, options)
            with advised(lambda: api.drawing(system, None, options["batch"], "eval.batch").tips()):
                reports = suite.run(measures, subject, options["batch"]) if measures else {}
            return told(reports, measures, subject.captions, options["seed"])
        case AutoencoderSystem():
            return {"reconstruction": _reconstruction(system, options)}
        case train_attributes.AttributesSystem():
            return told({"held_out": train_attributes.held_out(system, options["held_out"])}, {})
        case _:
            return told({"held_out": train_clip.held_out(system, options["held_out"])}, {})


def chosen(options: Json, folder: Path | None = None, world: bool = False) -> dict[str, Measure]:
    """The measures of a suite, by name: those it lists, GenEval on the embedded world, and FID where it has weights."""
    specs: list[Spec] = list(options["measures"])
    named = [name_of(spec) for spec in specs]
    if world and "geneval" not in named:
        keys = ("prompts_per_task", "images_per_prompt", "seed")
        specs.insert(0, {"name": "geneval", "detector": "shapes", **{k: options[k] for k in keys}})
    if options["fid_weights"]:
        specs.append({"name": "distances", "extractor": {"name": "inception", "weights": options["fid_weights"]}})
    if not specs and not world and folder is not None:
        raise SpecError(f"nothing to measure of {folder}; expected a suite with measures, such as eval=shapes_full")
    made: dict[str, Measure] = {}
    for spec in specs:
        name = name_of(spec)
        made[name if name not in made else f"{name}_{len(made)}"] = build("measure", spec)
    return made


def _reconstruction(system: AutoencoderSystem, options: Json) -> Json:
    from sana_lab.models.autoencoders.losses import Lpips

    lpips, rfid, picture = options["lpips_weights"], options["rfid"], options["worst_picture"]
    asked = reconstruction.Suite(
        Lpips(lpips, options["lpips_net"]) if lpips else None,
        build("extractor", rfid) if rfid else None,
        options["worst"],
        Path(picture) if picture else None,
    )
    if folder := options["reconstruction_folder"]:
        return reconstruction.evaluate_folder(system.autoencoder, folder, options["reconstructions"], asked)
    experiment: Any = system.experiment
    data = build("data", experiment["data"])
    data.setup("validate")
    batches, limit = data.val_dataloader(), options["reconstructions"]
    return reconstruction.evaluate_reconstruction(system.autoencoder, batches, limit, asked)


def told(
    reports: Mapping[str, Report],
    measures: Mapping[str, Measure],
    captions: Sequence[Json] = (),
    seed: int | None = None,
) -> Json:
    """Reports as plain data: GenEval's by tasks and prompts, values and settings of all, and numbers per image.

    Numbers of two reports can be paired where `drawn` agrees: a hash of the prompts, of how often, and of the noise.
    """
    drawn = {name: _drawn(m, captions, seed) for name, m in measures.items()} if seed is not None else {}
    found: Json = {
        "measures": {
            name: {"values": {k: v._asdict() for k, v in report.values.items()}, "settings": report.settings}
            for name, report in reports.items()
        },
        "per_image": {
            column: {"values": list(values), "drawn": drawn.get(name), "images_per_prompt": _each(measures.get(name))}
            for name, report in reports.items()
            for column, values in report.per_image.items()
        },
    }
    whole = next((m for m in measures.values() if isinstance(m, GenEval)), None)
    if whole is not None:
        outcomes = whole.outcomes()
        extra = {"images_per_prompt": whole.images_per_prompt, "outcomes": outcomes}
        found["geneval"] = {**rule.summarise(outcomes), **extra}
    return found


def _drawn(measure: Measure, captions: Sequence[Json], seed: int) -> str:
    rows = captions if measure.rows is None else measure.rows
    facts = [[row["prompt"] for row in rows], measure.images_per_prompt, seed]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _each(measure: Measure | None) -> int:
    return 1 if measure is None else measure.images_per_prompt


def flat(report: Json) -> dict[str, float]:
    """A report's headline numbers under the names of table columns."""
    found: dict[str, float] = {}
    for measure in report.get("measures", {}).values():
        for name, value in measure["values"].items():
            ends = {f"{name}_low": value["low"], f"{name}_high": value["high"]}
            found |= {name: value["value"]} | {k: v for k, v in ends.items() if v is not None}
    if "geneval" in report:
        found |= {k: report["geneval"][k] for k in ("prompts", "images")}
    if r := report.get("reconstruction"):
        for name in ("psnr", "ssim", "lpips", "rfid"):
            if name in r:
                low, high = r[f"{name}_interval"]
                found |= {name: r[name], f"{name}_low": low, f"{name}_high": high}
    return found


def main(name: str, overrides: Sequence[str], json_file: Path | None) -> None:
    """`sana-lab eval`: print the measures with their intervals, and write everything to `json_file`."""
    check_file(json_file)
    check_folder(weights.HOME)
    with distributed.joined() as reports:
        report = evaluate(name, overrides)
        if not reports:
            return
    print("\n".join(lines(report)))
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n")
    record(name, report)


def record(name: str, report: Json) -> None:
    """The report on a finished run of MLflow's experiment `evaluation`: numbers, settings, versions, all of it."""
    store = Store(weights.HOME)
    run = store.start_run("evaluation", name, {"sana.kind": "evaluation", **report["environment"]})
    store.log_params(run, {"model": report["model"] if isinstance(report.get("model"), str) else name})
    store.log_metrics(run, {k: v for k, v in flat(report).items() if v is not None})
    store.log_dict(run, report, "report.json")
    store.finish(run)


def lines(report: Json) -> list[str]:
    """A report for a reader."""
    out = []
    if g := report.get("geneval"):
        title = report["measures"]["geneval"]["settings"]["title"]
        low, high = g["interval"]
        counts = f"{g['prompts']} prompts, {g['images']} images"
        name = "GenEval-shapes" if "shapes" in title else title
        out += [f"{name} overall {g['overall']:.3f}  95 % [{low:.3f}, {high:.3f}]  ({counts})"]
        out += [_line(task, t["value"], *t["interval"]) for task, t in g["tasks"].items()]
    for name, measure in report.get("measures", {}).items():
        shown = {k: v for k, v in measure["values"].items() if name != "geneval" or "correct" in k or "partial" in k}
        out += [_line(k, v["value"], v["low"], v["high"], v["n"]) for k, v in shown.items()]
    out += [f"skipped {name}: {why}" for name, why in report.get("skipped", {}).items()]
    if r := report.get("reconstruction"):
        out += reconstruction.lines(r)
    elif "fid" not in flat(report) and "held_out" not in report.get("measures", {}):
        out += [f"{hint()}: eval.fid_weights=FILE"]
    return out


def _line(name: str, value: float, low: float | None, high: float | None, n: int | None = None) -> str:
    interval = f"  [{low:.3f}, {high:.3f}]" if low is not None and high is not None else ""
    return f"  {name:<24}{value:.3f}{interval}{f'  n {n}' if n else ''}"
