"""Quality of a trained system: GenEval on the embedded world, FID, and PSNR and SSIM of autoencoders."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sana_lab import config, draw, parts, tracking
from sana_lab.diffusion.sampling import Sampling
from sana_lab.evaluation import geneval
from sana_lab.evaluation.judge import ShapesJudge
from sana_lab.parts import SpecError
from sana_lab.systems.autoencoder import AutoencoderSystem
from sana_lab.systems.text2image import TextToImage
from sana_lab.types import Json


def evaluate(model: str | Any, overrides: Sequence[str] = ()) -> Json:
    """Every quality measure of a trained experiment (its name, or a system from `load`), as plain data.

    A text2image system: `geneval` (tasks, overall, 95 % interval, per prompt) and `fid` where `eval.fid_weights` is
    given. An autoencoder: `reconstruction` (PSNR, SSIM). Beside them what they were measured with.
    """
    system = draw.load(model, overrides) if isinstance(model, str) else model
    experiment = getattr(system, "experiment", None)
    if experiment is None or not isinstance(system, TextToImage | AutoencoderSystem):
        raise SpecError(
            f"model is a {type(system).__name__}{' without' if experiment is None else ' with'} an experiment; "
            "expected the name of a text2image or autoencoder experiment, or what `load` makes of it"
        )
    began = time.perf_counter()
    measures = _text2image(system) if isinstance(system, TextToImage) else _autoencoder(system)
    settings = {k: experiment[k] for k in ("sampling", "eval", "seed")}
    return {
        **measures,
        "settings": settings,
        "model": config.experiment_hash(experiment),
        "seconds": round(time.perf_counter() - began, 1),
        "environment": tracking.environment(),
    }


def _text2image(system: TextToImage) -> Json:
    """GenEval where the data is the embedded world, whose judge is exact; FID where its weights are given."""
    options, draw_images = system.experiment["eval"], sampler(system)
    source = system.experiment["data"].get("source", system.experiment["data"])
    found: Json = {}
    if source["name"] == "shapes":
        rows = geneval.prompts(options["prompts_per_task"], seed=options["seed"])
        repeat, batch = options["images_per_prompt"], options["batch"]
        found["geneval"] = geneval.evaluate_geneval(draw_images, rows, ShapesJudge(), repeat, batch)
    if options["fid_weights"]:
        found["fid"] = _fid(system, draw_images)
    return found


def sampler(system: TextToImage) -> Callable[[list[str], list[int]], Tensor]:
    """(prompts, image indices) -> images uint8; what `evaluation` needs of a system, so it can judge any other too."""
    sampling = Sampling(**system.experiment["sampling"])
    size, seed = config.image_size(system.experiment["data"]), system.experiment["eval"]["seed"]
    return lambda prompts, indices: system.sample(
        prompts, size=size, sampling=sampling, seed=seed, indices=indices, batch=system.experiment["eval"]["batch"]
    )


def _fid(system: TextToImage, draw_images: Callable[[list[str], list[int]], Tensor]) -> Json:
    """FID between held-out images and images drawn from their captions."""
    from sana_lab.evaluation import fidelity

    options = system.experiment["eval"]
    data = parts.build("data", system.experiment["data"].get("source", system.experiment["data"]))
    data.setup("validate")
    n = min(options["fid_images"], data.len_val)
    chunks = [list(range(i, min(i + options["batch"], n))) for i in range(0, n, options["batch"])]
    batches = [data.batch_at(chunk, "val") for chunk in chunks]
    real = (to_uint8(batch.images) for batch in batches)
    fake = (draw_images(batch.prompts, chunk) for batch, chunk in zip(batches, chunks, strict=True))
    return fidelity.fid(real, fake, weights=options["fid_weights"], batch=options["batch"])


def to_uint8(images: Tensor) -> Tensor:
    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def _autoencoder(system: Any) -> Json:
    from sana_lab.evaluation import reconstruction

    options = system.experiment["eval"]
    data = parts.build("data", system.experiment["data"])
    data.setup("validate")
    return {
        "reconstruction": reconstruction.evaluate_reconstruction(
            system.autoencoder, data.val_dataloader(), options["reconstructions"]
        )
    }


def flat(report: Json) -> dict[str, float]:
    """A report's headline numbers under the names of table columns."""
    found: dict[str, float] = {}
    if "geneval" in report:
        g = report["geneval"]
        found |= {"geneval": g["overall"], "geneval_low": g["interval"][0], "geneval_high": g["interval"][1]}
        found |= {f"geneval_{task}": t["value"] for task, t in g["tasks"].items()}
        found |= {"prompts": g["prompts"], "images": g["images"]}
    if "reconstruction" in report:
        found |= {k: report["reconstruction"][k] for k in ("psnr", "ssim")}
    return found | ({"fid": report["fid"]["value"]} if "fid" in report else {})


def main(name: str, overrides: Sequence[str], json_file: Path | None) -> None:
    """`sana-lab eval`: print the measures with their intervals, and write everything to `json_file`."""
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise ValueError(f"cannot write {json_file}: there is no folder {json_file.absolute().parent}")
    report = evaluate(name, overrides)
    print("\n".join(lines(report)))
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n")


def lines(report: Json) -> list[str]:
    """A report for a reader."""
    from sana_lab.evaluation import fidelity

    out = []
    if g := report.get("geneval"):
        low, high = g["interval"]
        counts = f"{g['prompts']} prompts, {g['images']} images"
        out += [f"GenEval-shapes overall {g['overall']:.3f}  95 % [{low:.3f}, {high:.3f}]  ({counts})"]
        out += [_line(task, t) for task, t in g["tasks"].items()]
    if r := report.get("reconstruction"):
        out += [f"PSNR {r['psnr']:.2f} dB, SSIM {r['ssim']:.4f} on {r['n']} held-out images"]
    elif f := report.get("fid"):
        out += [f"FID {f['value']:.2f} on {f['n_fake']} images"]
    else:
        out += [f"{fidelity.fid_hint()}: eval.fid_weights=FILE"]
    return out


def _line(task: str, measured: Json) -> str:
    low, high = measured["interval"]
    return f"  {task:<14}{measured['value']:.3f}  [{low:.3f}, {high:.3f}]"
