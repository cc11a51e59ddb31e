"""The verb `eval`: all measures of a suite, of a trained system, a diffusers pipeline, or images in a folder."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sana_lab import environment
from sana_lab.checkpoints import files
from sana_lab.config import experiments, hashing, interpolation, limits, schema
from sana_lab.config.specs import Spec, SpecError, build, check, name_of
from sana_lab.config.validation import plain
from sana_lab.costs import too_large
from sana_lab.costs.out_of_memory import advise_on_out_of_memory
from sana_lab.diffusion.sampling import Sampling
from sana_lab.environment import place
from sana_lab.evaluation import Measure, Report, image_folder, noise_seeds, reconstruction, run_measures, sources
from sana_lab.evaluation.image_files import Skipped
from sana_lab.evaluation.noise_seeds import build_measure, values_by_seed
from sana_lab.evaluation.thumbnails import Thumbnails
from sana_lab.models.autoencoders import Autoencoder
from sana_lab.models.autoencoders.losses import Lpips
from sana_lab.peers.pipeline import Peer, is_pipeline
from sana_lab.pretrained import loading
from sana_lab.systems import Sample, System
from sana_lab.types import Json


def evaluate(
    model: str | Any,
    overrides: Sequence[str] = (),
    *,
    may_be_empty: bool = False,  # accept an experiment without measures, as a trial that is measured otherwise
    thumbnails: Thumbnails | None = None,  # takes a small picture for each prompt of a system that generates images
) -> Json:
    """All measures that `eval:` names, as plain data, with everything that they depend on.

    `model` is an experiment's name, a system that `load` returned, a diffusers pipeline's folder, or a folder of
    images; for the last two `eval.*`, `sampling.*` and `size` can be overridden. The report has `measures` (values with
    intervals, settings), `per_image` (numbers for paired tests), `exact` and `geneval` (tasks, overall, per prompt) for
    a text2image system of the embedded world, and `reconstruction` for an autoencoder. SpecError, also where nothing
    is measured; ValueError.
    """
    start = time.perf_counter()
    if isinstance(model, str):
        report = _evaluate_name(model, overrides, may_be_empty, thumbnails)
    else:
        report = _evaluate_system(model, may_be_empty, thumbnails)
    return {
        **report,
        "seconds": round(time.perf_counter() - start, 1),
        "environment": environment.environment(),
    }


def _evaluate_name(
    name: str, overrides: Sequence[str], may_be_empty: bool, thumbnails: Thumbnails | None = None
) -> Json:
    if not loading.is_model(name):
        experiment = experiments.load(name, overrides)
        limits.check_evaluation(experiment["eval"])
        too_large.check_experiment(experiment)
        return _evaluate_system(loading.open_model(name, overrides), may_be_empty, thumbnails)
    given = experiments.apply({}, overrides)
    if unknown := given.keys() - {"eval", "sampling", "size"}:
        raise SpecError(
            f"{name!r} is no experiment: eval.*, sampling.* and size can be given, not {', '.join(unknown)}"
        )
    options = check(given.pop("eval", {}), schema.EvaluationOptions, "eval")
    given = plain(given)
    limits.check_evaluation(options)
    if image_folder.is_image_folder(Path(name)):
        return _evaluate_folder(Path(name), options)
    if is_pipeline(name) and not _is_sana(Path(name)):
        return _evaluate_pipeline(Peer.load(name), options, given)
    system = loading.open_model(name, [o for o in overrides if o.startswith("sampling.")])
    if isinstance(system, System) and system.experiment is not None:
        data = {**system.experiment["data"], **({"size": given["size"]} if "size" in given else {})}
        system.experiment = {"seed": None, **system.experiment, "eval": options, "data": data}
    return _evaluate_system(system, may_be_empty, thumbnails)


def _is_sana(folder: Path) -> bool:
    """Whether a pipeline is loaded as the lab's own system."""
    index = folder / "model_index.json"
    return index.is_file() and files.read_json(index).get("_class_name") == "SanaPipeline"


def _evaluate_folder(folder: Path, options: Json) -> Json:
    measures, skipped = build_measures(options), Skipped(folder)
    if not measures:
        raise SpecError(_nothing(str(folder)))
    reports, reference, pairing = image_folder.measure_folder(folder, measures, options, skipped)
    report = {**as_json(reports, measures), "settings": {"eval": options}, "skipped": skipped.reasons}
    report["per_image"] = {name: {**each, **pairing} for name, each in report["per_image"].items()}
    return {**report, "reference": reference} if reference else report


def _nothing(name: str) -> str:
    return (
        f"nothing to measure of {name}; expected a suite with measures, such as eval=shapes_full, "
        "or eval.measures='[{name: ...}]' or eval.fid_weights=FILE (`sana-lab parts measure` lists them)"
    )


def _evaluate_pipeline(peer: Peer, options: Json, given: Json) -> Json:
    if "size" not in given:
        raise SpecError(f"{peer.name} generates images of any size; expected pixels a side, such as size=1024")
    sampling, size = given.get("sampling", {}), given["size"]
    measures = build_measures(options, seeds=options["noise_seeds"])
    if not measures:
        raise SpecError(_nothing(peer.name))
    source = sources.pipeline_source(peer, options, sampling, size)
    report = measure_source(measures, source, options)
    settings = {"eval": options, "sampling": sampling, "size": size}
    return {**report, "settings": settings, "model": peer.identity()}


def _evaluate_system(system: Any, may_be_empty: bool, thumbnails: Thumbnails | None = None) -> Json:
    experiment = getattr(system, "experiment", None)
    if experiment is None or not isinstance(system, System):
        raise SpecError(
            f"model is a {type(system).__name__}{' without' if experiment is None else ' with'} an experiment; "
            "expected the name of an experiment, a pipeline's folder, or what `load` makes of them"
        )
    skip = may_be_empty and not system.evaluates
    report = {} if skip else system.evaluate(Evaluator(system, may_be_empty, thumbnails))
    if not isinstance(report, dict):
        kind = type(system).__name__
        raise SpecError(f"system {kind}: evaluate returned a {type(report).__name__}, expected plain data in a dict")
    if not may_be_empty and not is_measured(report):
        raise SpecError(_nothing(f"a {type(system).__name__}"))
    stored = interpolation.as_written(experiment)
    settings = {k: stored.get(k) for k in ("sampling", "eval", "seed")}
    model = hashing.experiment_hash(experiment) if "trainer" in experiment else stored["system"]
    return {**report, "settings": settings, "model": model}


def is_measured(report: Json) -> bool:
    """Whether a report holds a number: a value of a measure, or an entry of the system's own."""
    own = [value for key, value in report.items() if key not in ("measures", "per_image")]
    return any(own) or any(measure["values"] for measure in report.get("measures", {}).values())


class Evaluator:
    """`sana_lab.systems.Evaluator` of one system."""

    def __init__(self, system: System, may_be_empty: bool = False, thumbnails: Thumbnails | None = None) -> None:
        self.system, self.experiment, self.may_be_empty = system, system.experiment, may_be_empty
        self.thumbnails = thumbnails
        self.options: Json = self.experiment["eval"]
        self.device = place("auto")

    def generated(self, sample: Sample) -> Json:
        """All measures of generated images."""
        shapes = is_shapes(self.experiment["data"])
        measures = build_measures(self.options, shapes, self.options["noise_seeds"])
        if not measures and not self.may_be_empty:
            raise SpecError(_nothing(f"a {type(self.system).__name__}"))
        if not measures:
            return as_json({}, {})
        with advise_on_out_of_memory(self._memory_advice):
            source = sources.system_source(sample, self.experiment)
            source = source if self.thumbnails is None else self.thumbnails.of(source)
            return measure_source(measures, source, self.options)

    def reconstructed(self, autoencoder: Autoencoder) -> Json:
        """Reconstruction quality on held-out images, or on `eval.reconstruction_folder`."""
        o, options = self.options, reconstruction_options(self.options)
        limit = o["reconstructions"]
        if folder := o["reconstruction_folder"]:
            return {"reconstruction": reconstruction.evaluate_folder(autoencoder, folder, limit, options)}
        data = build("data", experiments.source_of(self.experiment["data"]))
        data.setup("validate")
        report = reconstruction.evaluate_reconstruction(autoencoder, data.val_dataloader(), limit, options)
        return {"reconstruction": report}

    def reported(self, reports: Mapping[str, Report]) -> Json:
        """Reports that the system computed itself, by name."""
        return as_json(reports, {})

    def _memory_advice(self) -> list[str]:
        """Settings that need less memory."""
        from sana_lab.bench.memory_advice import SamplingPass
        from sana_lab.systems.text2image import TextToImage

        if not isinstance(self.system, TextToImage):
            return ["try eval.batch=1"]
        size, sampling = experiments.image_size(self.experiment["data"]), Sampling(**self.experiment["sampling"])
        return SamplingPass(self.system, size, min(self.options["batch"], 64), sampling, "eval.batch").advice()


def measure_source(measures: dict[str, Measure], source: run_measures.Source, options: Json) -> Json:
    """All measures of a generator's images as plain data."""
    reports = run_measures.run(measures, source, options["batch"])
    report = as_json(reports, measures, source.captions, noise_seeds.seeds(options))
    return {**report, "reference": source.reference} if any(m.needs_reference for m in measures.values()) else report


def reconstruction_options(o: Json) -> reconstruction.Options:
    """The metrics and worst cases that `eval:` names."""
    return reconstruction.Options(
        Lpips(o["lpips_weights"], o["lpips_net"]) if o["lpips_weights"] else None,
        build("extractor", o["rfid"]) if o["rfid"] else None,
        o["worst"],
        Path(o["worst_picture"]) if o["worst_picture"] else None,
    )


def is_shapes(data: Json) -> bool:
    """Whether the images of a data spec, or those behind its latents, are of the embedded world."""
    return bool(experiments.source_of(data).get("name") == "shapes")


def measure_specs(options: Json, shapes: bool = False) -> list[Spec]:
    """The specs of the measures of a suite, in the order of their reports."""
    listed: list[Spec] = list(options["measures"])
    keys = ("prompts_per_task", "images_per_prompt", "seed", "fill_tasks")
    rows = {key: options[key] for key in keys if key in options}
    implied = [{"name": "exact_shapes", **rows}, {"name": "geneval", "detector": "shapes", **rows}] if shapes else []
    specs = [spec for spec in implied if spec["name"] not in map(name_of, listed)] + listed
    if options["fid_weights"]:
        specs.append({"name": "distances", "extractor": {"name": "inception", "weights": options["fid_weights"]}})
    return specs


def build_measures(options: Json, shapes: bool = False, seeds: int = 1) -> dict[str, Measure]:
    """The measures of a suite by name: those it lists, FID with `eval.fid_weights`, for the embedded world also its
    exact score and GenEval.

    With several seeds of noise, each expects so many times its images per prompt.
    """
    measures: dict[str, Measure] = {}
    for spec in measure_specs(options, shapes):
        name = name_of(spec)
        measures[name if name not in measures else f"{name}_{len(measures)}"] = build_measure(spec, seeds)
    return measures


def as_json(
    reports: Mapping[str, Report],
    measures: dict[str, Measure],
    captions: Sequence[Json] = (),
    seeds: Sequence[int] = (),  # of the noise
) -> Json:
    """Reports as plain data: values and settings of all measures, numbers per image, and the measures' details.

    Numbers per image of two reports can be paired where `drawn` agrees: a hash of prompts, images per prompt and seeds.
    Of several seeds of noise, `by_noise_seed` has the values on the images of each.
    """
    hashes = {name: prompts_hash(m, captions, seeds) for name, m in measures.items()} if seeds else {}
    counts = {name: m.images_per_prompt for name, m in measures.items()}
    report: Json = {
        "measures": {
            name: {"values": {k: v._asdict() for k, v in each.values.items()}, "settings": each.settings}
            for name, each in reports.items()
        },
        "per_image": {
            column: {"values": list(values), "drawn": hashes.get(name), "images_per_prompt": counts.get(name, 1)}
            for name, each in reports.items()
            for column, values in each.per_image.items()
        },
    }
    if len(seeds) > 1:
        report["by_noise_seed"] = {"seeds": list(seeds), "values": _values_by_seed(reports, measures, len(seeds))}
    for measure in reversed(measures.values()):  # of two with the same details, the first one's count
        report |= measure.details()
    return report


def _values_by_seed(reports: Mapping[str, Report], measures: Mapping[str, Measure], count: int) -> Json:
    """Values on the images of each seed, without distances, which are of all images together."""
    ones = {name: (reports[name], m.images_per_prompt) for name, m in measures.items() if not m.needs_reference}
    return {k: v for report, images in ones.values() for k, v in values_by_seed(report, images, count).items()}


def prompts_hash(measure: Measure, captions: Sequence[Json], seeds: Sequence[int]) -> str:
    """Hash of all prompts of a measure, its images per prompt and the seeds of their noise."""
    rows = captions if measure.rows is None else measure.rows
    facts = [[row["prompt"] for row in rows], measure.images_per_prompt, seeds[0] if len(seeds) == 1 else list(seeds)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
