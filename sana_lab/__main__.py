"""The command line. It parses, then imports what the verb needs: `--help` answers without importing torch."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

DESCRIPTION = """Take SANA apart, one idea at a time.

An EXPERIMENT is a name in experiments/ or a YAML file; key=value changes it, such as
system.dit.attention=softmax or trainer.max_steps=500. Results lie in ./runs."""


def parser() -> argparse.ArgumentParser:
    """All verbs and their options."""
    top = argparse.ArgumentParser(
        "sana-lab", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    train = _experiment(verbs, "train", "train an experiment, or finish training it")
    train.add_argument("--dry-run", action="store_true", help="print the resolved experiment and stop")
    _sample(verbs)
    _evaluate(verbs)
    bench = _experiment(verbs, "bench", "measure what an image costs: parameters, MACs, latency, memory")
    bench.add_argument("--size", type=int, help="pixels a side (the experiment's own)")
    bench.add_argument("--batch", type=int, default=1, help="images at a time for throughput (1)")
    bench.add_argument("--repeats", type=int, default=5, help="timed repeats (5)")
    bench.add_argument(
        "--sweep", type=int, metavar="N", help="find the throughput: batches 1, 2, 4 ... N, or until memory is full"
    )
    bench.add_argument("--steps", type=int, help="of a diffusers pipeline (its own)")
    bench.add_argument("--guidance", type=float, help="of a diffusers pipeline (its own)")
    bench.add_argument("--memory", action="store_true", help="work out its memory by component, offloaded, in int8 ...")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write everything measured here too")
    _profile(verbs)
    _ablate(verbs)
    _exchange(verbs)
    ui = verbs.add_parser("ui", help="browse runs in MLflow, on this machine only", allow_abbrev=False)
    ui.add_argument("--port", type=int, default=5000, help="(5000)")
    return top


def _experiment(
    verbs: "argparse._SubParsersAction[argparse.ArgumentParser]", verb: str, text: str
) -> argparse.ArgumentParser:
    sub = verbs.add_parser(verb, help=text, description=text, allow_abbrev=False)
    sub.add_argument("experiment", metavar="EXPERIMENT")
    sub.add_argument("overrides", nargs="*", metavar="key=value")
    return sub


def _evaluate(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    evaluate = _experiment(
        verbs, "eval", "measure quality: of an experiment, a diffusers pipeline, a folder of pictures"
    )
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="write everything measured here too")
    text = "what two evaluations differ in, paired over the images that they share"
    compare = verbs.add_parser("compare", help=text, description=text, allow_abbrev=False)
    for which in ("first", "second"):
        compare.add_argument(which, type=Path, metavar=f"{which.upper()}.json", help="what `eval --json` wrote")
    text = "statistics of real images, for distances to compare with"
    stats = verbs.add_parser("stats", help=text, description=text, allow_abbrev=False)
    stats.add_argument("folder", type=Path, metavar="FOLDER")
    stats.add_argument("--extractor", required=True, metavar="SPEC", help="such as '{name: inception, weights: FILE}'")
    stats.add_argument("--out", type=Path, required=True, metavar="FILE", help="the .safetensors file")
    stats.add_argument("--features", action="store_true", help="keep them too, for kernel and neighbour measures")
    stats.add_argument("--layout", choices=("folder", "mjhq"), default="folder", help="mjhq: MJHQ-30K as it unpacks")
    stats.add_argument("--coco", type=Path, metavar="JSON", help="COCO's captions, FOLDER holds their images")
    stats.add_argument("--batch", type=int, default=64, help="pictures at a time (64)")


def _sample(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    sub = verbs.add_parser("sample", help="draw images from prompts", allow_abbrev=False)
    sub.add_argument("prompts", nargs="+", metavar="PROMPT")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="where DIR/*.png are written")
    sub.add_argument("--model", default="shapes_sana", metavar="EXPERIMENT", help="a trained experiment (shapes_sana)")
    sub.add_argument("--seed", type=int, default=0, help="of the noise; image i uses (seed, i) (0)")
    sub.add_argument("--size", type=int, help="pixels a side (the model's own)")
    sub.add_argument("--negative", default="", metavar="TEXT", help="what guidance leads away from")
    sub.add_argument("--variant", metavar="NAME", help="of a diffusers folder's files, such as fp16")
    sub.add_argument("--set", nargs="*", default=[], metavar="key=value", help="such as sampling.steps=50")


def _profile(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    profile = _experiment(verbs, "profile", "say where the time of a training step goes, or of an image, untrained")
    profile.add_argument("--sampling", action="store_true", help="of drawing an image instead")
    profile.add_argument("--steps", type=int, metavar="N", help="steps that are timed (20), or images (3)")
    profile.add_argument("--warmup", type=int, default=3, metavar="N", help="steps before them (3)")
    profile.add_argument("--top", type=int, default=10, metavar="N", help="operators that are listed (10)")
    profile.add_argument("--json", type=Path, metavar="FILE", help="write everything measured here too")
    profile.add_argument("--trace", type=Path, metavar="FILE", help="write a Chrome trace of a few steps")


def _ablate(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    for verb, text in (
        ("ablate", "run an ablation and write its table"),
        ("table", "write the table of what has finished"),
    ):
        sub = verbs.add_parser(verb, help=text, description=text, allow_abbrev=False)
        sub.add_argument("ablation", metavar="ABLATION")
        sub.add_argument(
            "overrides", nargs="*", metavar="key=value", help="applied to every trial, of a sweep of its own name"
        )
        sub.add_argument("--scale", help="a scale that the ablation offers, such as toy (its own)")
        sub.add_argument(
            "--out", type=Path, metavar="DIR", help="where table, plots and pictures go (runs/tables/ABLATION)"
        )
        if verb == "ablate":
            sub.add_argument("--dry-run", action="store_true", help="list the trials and which are done, and stop")
            sub.add_argument("--workers", type=int, help="trials trained at a time (one per core, at most 2)")


def _exchange(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "read released weights: NVlabs' .pth, a diffusers folder, a hub id"
    into = verbs.add_parser("import", help=text, description=text, allow_abbrev=False)
    into.add_argument("path", metavar="PATH")
    into.add_argument("--out", type=Path, metavar="FILE", help="the weights file (PATH's name and .safetensors)")
    into.add_argument("--part", choices=("dit", "autoencoder"), help="of a pipeline, this one alone")
    into.add_argument("--variant", metavar="NAME", help="of diffusers' files, such as fp16")
    into.add_argument("--raw", action="store_true", help="not the averaged weights, where there are both")
    into.add_argument("--set", nargs="*", default=[], metavar="key=value", help="such as cross_heads=16")
    text = "write a folder that diffusers runs, from a .ckpt, a weights file or a trained experiment"
    out = verbs.add_parser("export", help=text, description=text, allow_abbrev=False)
    out.add_argument("checkpoint", metavar="CHECKPOINT")
    out.add_argument("folder", type=Path, metavar="FOLDER")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; the exit status is 0, 1 for an error that a person can mend, 130 for Ctrl-C."""
    options = parse(arguments)
    _hush()
    try:
        _look_up(options)
        return _run(options) or 0
    except OSError as error:  # wherever it was raised: a file, a disk, a network
        print(f"sana-lab: {_told(error)}", file=sys.stderr)
        return 1
    except (ValueError, RuntimeError, ImportError) as error:
        if _unforeseen(error):
            raise
        print(f"sana-lab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "\nsana-lab: stopped; what had finished is kept, and the same command goes on from there", file=sys.stderr
        )
        return 130


def _hush() -> None:
    """Of torchao, which transformers and diffusers import where it is installed, nothing that its versions say of each
    other."""
    for name in ("torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
        logging.getLogger(name).addFilter(lambda record: not any(w in str(record.msg) for w in ("Enum", "torchao")))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options and key=value in any order, which argparse alone does not take after an option."""
    top = parser()
    options, rest = top.parse_known_args(arguments)
    if odd := [word for word in rest if word.startswith("-") or "=" not in word or not hasattr(options, "overrides")]:
        top.error(f"unrecognized arguments: {' '.join(odd)}")
    if rest:
        options.overrides += rest
    return options


def _unforeseen(error: BaseException) -> bool:
    """A bug keeps its traceback; what our own code raised on purpose needs none."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last is None or Path(__file__).parent not in Path(last.tb_frame.f_code.co_filename).parents


def _told(error: OSError) -> str:
    if error.filename is not None and error.strerror is not None:
        return f"{error.filename}: {error.strerror}"
    return next(iter(str(error).splitlines()), type(error).__name__)


def _look_up(options: argparse.Namespace) -> None:
    """Names and overrides that nobody can mean, said before torch is imported, which takes seconds."""
    from sana_lab.config import experiments

    match options.verb:
        case "ablate" | "table":
            experiments.locate("ablations", options.ablation)
        case "train" | "profile":
            experiments.apply(experiments.compose(options.experiment), options.overrides)
        case "eval" | "bench" | "sample":
            name = options.model if options.verb == "sample" else options.experiment
            if not Path(name).exists() and "/" not in name and not Path(name).suffix:  # else it may be a model
                experiments.locate("experiments", name)


def _run(options: argparse.Namespace) -> int | None:
    match options.verb:
        case "train":
            from sana_lab.training import train

            train.main(options.experiment, options.overrides, options.dry_run)
        case "sample":
            from sana_lab import api

            api.main(options)
        case "eval":
            from sana_lab.evaluation import command

            command.main(options.experiment, options.overrides, options.json)
        case "bench":
            _bench(options)
        case "profile":
            from sana_lab.profiler import profile

            profile.main(options)
        case "compare":
            from sana_lab.evaluation import compare

            return compare.main(options.first, options.second)
        case "stats":
            from sana_lab.evaluation import stats

            stats.main(options)
        case "ablate":
            from sana_lab.ablation import runner

            chosen = {"dry_run": options.dry_run, "out": options.out, "scale": options.scale}
            return runner.main(options.ablation, options.overrides, workers=options.workers, **chosen)
        case "table":
            from sana_lab.ablation import runner

            runner.write_table(options.ablation, options.overrides, options.out, options.scale)
        case "import":
            from sana_lab.pretrained import convert

            convert.main_import(options)
        case "export":
            from sana_lab.pretrained import convert

            convert.main_export(options)
        case "ui":
            from sana_lab.checkpoints.weights import HOME
            from sana_lab.tracking import server

            server.serve(HOME, port=options.port)
    return None


def _bench(options: argparse.Namespace) -> None:
    """Of an experiment's untrained system, or of a diffusers pipeline as it is."""
    from sana_lab.bench import bench, memory_table
    from sana_lab.config import experiments, specs
    from sana_lab.pretrained import loading
    from sana_lab.training import train

    how = {"batch": options.batch, "repeats": options.repeats, "json_file": options.json, "max_batch": options.sweep}
    if loading.is_model(options.experiment):
        if options.memory:
            raise specs.SpecError(f"memory is worked out for an experiment, and {options.experiment!r} is a model")
        asked = {"steps": options.steps, "guidance": options.guidance}
        bench.main_peer(options.experiment, size=options.size or 1024, **how, **asked)
    else:
        experiment = experiments.load(options.experiment, options.overrides)
        train.check(experiment)
        if options.memory:
            memory_table.main(experiment, size=options.size, batch=options.batch, json_file=options.json)
        else:
            bench.main(experiment, size=options.size, **how)


if __name__ == "__main__":
    sys.exit(main())
