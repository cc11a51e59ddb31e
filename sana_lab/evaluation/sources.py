"""Image sources of `eval`: a trained text-to-image system or a diffusers pipeline, and held-out data."""

from typing import TYPE_CHECKING, cast

from sana_lab.config import experiments, specs
from sana_lab.diffusion.sampling import Sampling
from sana_lab.evaluation import Measure, noise_seeds
from sana_lab.evaluation.held_out import folder_data, held_out
from sana_lab.evaluation.run_measures import Generate, Source, check_captions
from sana_lab.systems import Sample
from sana_lab.types import Json

if TYPE_CHECKING:
    from sana_lab.peers.pipeline import Peer


def sampler(sample: Sample, experiment: Json, seed: int | None = None) -> Generate:
    """A system's method `sample` under its experiment, as (prompts, noise indices) -> images uint8; `seed` of the noise
    in place of `eval.seed`."""
    sampling, options = Sampling(**experiment["sampling"]), experiment["eval"]
    size, seed = experiments.image_size(experiment["data"]), options["seed"] if seed is None else seed
    return lambda prompts, indices: sample(
        prompts, size=size, sampling=sampling, seed=seed, indices=indices, batch=options["batch"]
    ).cpu()


def system_source(sample: Sample, experiment: Json) -> Source:
    """A system that generates images, under its experiment; held-out data are the experiment's, or `eval.captions`."""
    data, options = experiment["data"], experiment["eval"]
    if options["captions"] or "name" not in data:
        real = folder_data(options, experiments.image_size(data))
    else:
        real = held_out(specs.build("data", experiments.source_of(data)), options)
    first, *others = [sampler(sample, experiment, seed) for seed in noise_seeds.seeds(options)]
    return Source(first, *real, others)


def check_evaluation_captions(experiment: Json) -> None:
    """ValueError where `eval.captions` lacks captions that a measure will sample or score from; nothing is built.

    Measures of the user's own, whose prompts are known once they are built, are checked then.
    """
    options, names = experiment["eval"], list(map(specs.name_of, experiment["eval"]["measures"]))
    names += ["distances"] if options["fid_weights"] else []
    kinds = {name: cast("type[Measure]", specs.find("measure", name)) for name in names}
    users = {name: kind for name, kind in kinds.items() if kind.own_prompts is False}
    if users and options["captions"] and "dit" in experiment["system"]:
        rows = folder_data(options, experiments.image_size(experiment["data"])).captions
        for name, kind in users.items():
            check_captions(name, kind, rows)


def pipeline_source(peer: "Peer", options: Json, sampling: Json, size: int) -> Source:
    """A diffusers pipeline; steps and guidance are its own defaults where `sampling` gives none."""
    steps: Json = {k: sampling.get(k) for k in ("steps", "guidance")}

    def with_seed(seed: int) -> Generate:
        return lambda prompts, indices: peer.sample(
            prompts, size=size, seed=seed, indices=indices, batch=options["batch"], **steps
        ).cpu()

    first, *others = map(with_seed, noise_seeds.seeds(options))
    return Source(first, *folder_data(options, size), others)
