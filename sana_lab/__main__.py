"""The command line. It parses, then imports what the verb needs: `--help` answers without importing torch."""

import argparse
import logging
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sana_lab.commands import arguments as lab
from sana_lab.commands import examples, sampling
from sana_lab.training.startup import defer_torchmetrics

DESCRIPTION = """Take SANA apart, one idea at a time.

An EXPERIMENT is a name in experiments/ or a YAML file; key=value changes one of its options, such as
system.dit.attention=softmax or trainer.max_steps=500. Results are written to ./runs."""


class Verb(NamedTuple):
    """A subcommand: its line in the help, its arguments, and what runs it; the result is the exit status."""

    text: str
    arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], int | None]


# an experiment


def _experiment(parser: ArgumentParser) -> None:
    parser.add_argument("experiment", nargs="?", metavar="EXPERIMENT", help="name in experiments/, or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="option to change")


def _train_arguments(parser: ArgumentParser) -> None:
    _experiment(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the resolved experiment and exit")
    parser.add_argument("--more", type=int, metavar="N", help="go on from the trained model for N steps, as a new one")
    _force(parser)


def _train(options: Namespace) -> None:
    from sana_lab.evaluation.points import Evaluation
    from sana_lab.training import command

    command.main(options.experiment, options.overrides, options.dry_run, Evaluation(), options.more, options.force)


def _eval_arguments(parser: ArgumentParser) -> None:
    _experiment(parser)
    _json(parser)
    _html(parser)


def _eval(options: Namespace) -> None:
    from sana_lab.evaluation import command

    command.main(options.experiment, options.overrides, options.json, options.html)


def _bench_arguments(parser: ArgumentParser) -> None:
    _experiment(parser)
    parser.add_argument("--size", type=int, help="pixels a side (the training size)")
    parser.add_argument("--batch", type=int, default=1, help="images at a time for throughput (1)")
    parser.add_argument("--repeats", type=int, default=5, help="timed repeats (5)")
    parser.add_argument(
        "--sweep",
        type=int,
        metavar="N",
        help="find the best throughput: batches 1, 2, 4 ... N, or until memory is full",
    )
    parser.add_argument("--steps", type=int, help="sampling steps of a diffusers pipeline (its default)")
    parser.add_argument("--guidance", type=float, help="guidance scale of a diffusers pipeline (its default)")
    parser.add_argument(
        "--memory", action="store_true", help="compute memory by component: whole, offloaded, in int8 ..."
    )
    _html(parser)
    _json(parser)


def _bench(options: Namespace) -> None:
    """Time an experiment's untrained system, or a diffusers pipeline; with --memory compute its memory."""
    from sana_lab.bench import bench, memory_table
    from sana_lab.config import experiments, specs
    from sana_lab.pretrained import loading
    from sana_lab.training import checks

    shared: dict[str, Any] = {"size": options.size, "batch": options.batch, "json_file": options.json}
    timed: dict[str, Any] = {"repeats": options.repeats, "max_batch": options.sweep, "html_file": options.html}
    if loading.is_model(options.experiment):
        if options.memory:
            raise specs.SpecError(f"memory is computed for an experiment, and {options.experiment!r} is a model")
        if options.overrides:
            raise specs.SpecError(f"{' '.join(options.overrides)} changes an experiment, not {options.experiment!r}")
        pipeline = {"size": options.size or 1024, "steps": options.steps, "guidance": options.guidance}
        bench.main_peer(options.experiment, **{**shared, **timed, **pipeline})
        return
    for name in ("steps", "guidance"):
        if (value := getattr(options, name)) is not None:
            raise specs.SpecError(f"--{name} is for a diffusers pipeline; expected sampling.{name}={value}")
    experiment = experiments.load(options.experiment, options.overrides)
    checks.check(experiment)
    if options.memory:
        if options.html:
            raise specs.SpecError("--html is for measured costs, and --memory computes; expected --json FILE")
        memory_table.main(experiment, **shared)
    else:
        bench.main(experiment, name=options.experiment, **shared, **timed)


def _profile_arguments(parser: ArgumentParser) -> None:
    _experiment(parser)
    parser.add_argument("--sampling", action="store_true", help="profile sampling instead of training")
    parser.add_argument("--steps", type=int, metavar="N", help="timed training steps (20), or images (3)")
    parser.add_argument("--warmup", type=int, default=3, metavar="N", help="steps before timing starts (3)")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="operators to list (10)")
    _json(parser)
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write a Chrome trace of a few steps")


def _profile(options: Namespace) -> None:
    from sana_lab.profiler import profile

    profile.main(options)


def _html(parser: ArgumentParser) -> None:
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a report that a browser opens to FILE")


def _force(parser: ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="begin although memory or disk are too small by far")


def _json(parser: ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything measured to FILE")


# ablations


def _table_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("ablation", nargs="?", metavar="ABLATION", help="name in ablations/, or a YAML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="option to change in every trial; makes a separate sweep"
    )
    parser.add_argument("--scale", help="scale that the ablation offers, such as toy (full size)")
    parser.add_argument(
        "--retrain", action="store_true", help="train rows from nothing whose weights ship; a separate sweep"
    )
    parser.add_argument("--seeds", help="training seeds in place of the file's, such as 0-4 or 0,2")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for table, plots and images (runs/tables/ABLATION)"
    )


def _ablate_arguments(parser: ArgumentParser) -> None:
    _table_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="list the trials and their states, and exit")
    _force(parser)
    parser.add_argument("--workers", type=int, help="trials trained at a time (one per GPU, else two)")
    parser.add_argument(
        "--executor", metavar="SPEC", help="where trials run: local, ray, slurm or '{name: slurm, partition: gpu}'"
    )


def _ablate(options: Namespace) -> int:
    from sana_lab.ablation import runner

    places: dict[str, Any] = {"out": options.out, "scale": options.scale, "retrain": options.retrain}
    places |= {"seeds": options.seeds, "force": options.force}
    places |= {"workers": options.workers, "executor": options.executor}
    return runner.main(options.ablation, options.overrides, dry_run=options.dry_run, **places)


def _tables_arguments(parser: ArgumentParser) -> None:
    _table_arguments(parser)
    action = next(action for action in parser._actions if action.dest == "overrides")
    action.metavar = "ABLATION or key=value"
    action.help = "ablation whose rows are added, or option that was changed in every trial"


def _table(options: Namespace) -> None:
    from sana_lab.ablation import across, runner

    others = [word for word in options.overrides if "=" not in word]
    overrides = [word for word in options.overrides if "=" in word]
    if others and options.seeds:
        raise ValueError("--seeds is of one ablation; expected a table of it alone")
    if others:
        across.main([options.ablation, *others], overrides, options.scale, options.retrain, options.out)
    else:
        places: dict[str, Any] = {"out": options.out, "scale": options.scale, "retrain": options.retrain}
        runner.write_table(options.ablation, overrides, seeds=options.seeds, **places)


def _ship_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("ablation", metavar="ABLATION", help="name in ablations/, or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides that the rows were trained with")
    parser.add_argument("--scale", help="scale that the rows were trained at")
    parser.add_argument("--seeds", help="training seeds in place of the file's, as of the sweep")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write (the ablation's own `weights`)")


def _ship(options: Namespace) -> int:
    from sana_lab.ablation import shipping

    return shipping.main(options.ablation, options.overrides, options.scale, options.out, seeds=options.seeds)


def _pack_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("ablation", nargs="?", metavar="ABLATION", help="name in ablations/, or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides that the sweep was run with")
    parser.add_argument("--scale", help="scale that the sweep was run at")
    parser.add_argument("--seeds", help="training seeds in place of the file's, as of the table")
    parser.add_argument("--retrain", action="store_true", help="the sweep that trained all rows")
    parser.add_argument("--out", type=Path, metavar="FILE", help="archive to write (ABLATION.tar.gz)")


def _pack(options: Namespace) -> None:
    from sana_lab.ablation import packing

    which = (options.ablation, options.overrides, options.scale, options.out)
    packing.main(*which, retrain=options.retrain, seeds=options.seeds)


# weights of others


def _import_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="NVlabs .pth, diffusers folder or hub id")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="weights file to write (PATH's name with .safetensors)"
    )
    parser.add_argument("--part", choices=("dit", "autoencoder"), help="import one part of a pipeline")
    parser.add_argument("--variant", metavar="NAME", help="variant of diffusers' files, such as fp16")
    parser.add_argument("--raw", action="store_true", help="take the raw weights where there are averaged ones too")
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="key=value",
        help="option that the file does not hold, such as cross_heads=16",
    )


def _import(options: Namespace) -> None:
    from sana_lab.pretrained import convert

    convert.main_import(options)


def _export_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=".ckpt, weights file or trained experiment")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder to write")
    parser.add_argument("--part", choices=("dit", "autoencoder"), help="export one part of a text2image system")


def _export(options: Namespace) -> None:
    from sana_lab.pretrained import convert

    convert.main_export(options)


# results and references


def _compare_arguments(parser: ArgumentParser) -> None:
    for which in ("first", "second"):
        parser.add_argument(which, type=Path, metavar=f"{which.upper()}.json", help="file written by `eval --json`")


def _compare(options: Namespace) -> int:
    from sana_lab.evaluation import compare

    return compare.main(options.first, options.second)


def _stats_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of images")
    parser.add_argument("--extractor", required=True, metavar="SPEC", help="such as '{name: inception, weights: FILE}'")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=".safetensors file to write")
    parser.add_argument("--features", action="store_true", help="keep all features, for kernel and neighbour measures")
    parser.add_argument(
        "--layout", choices=("folder", "mjhq"), default="folder", help="layout of FOLDER; mjhq is MJHQ-30K as unpacked"
    )
    parser.add_argument("--coco", type=Path, metavar="JSON", help="COCO captions file, for FOLDER with COCO's images")
    parser.add_argument("--batch", type=int, default=64, help="images at a time (64)")


def _stats(options: Namespace) -> None:
    from sana_lab.evaluation import stats

    stats.main(options)


def _parts_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "kind", nargs="?", metavar="KIND", help="kind of part such as attention, or section such as trainer"
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="part, preset or your module:attribute")


def _parts(options: Namespace) -> None:
    from sana_lab.config import parts_verb

    parts_verb.main(options.kind, options.name)


def _rm_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="sweep, SWEEP:LABEL (a row), or a run's id")
    parser.add_argument("--superseded", action="store_true", help="of sweeps only runs that are no longer shown")
    parser.add_argument("--models", action="store_true", help="models that no trial and no experiment uses")
    parser.add_argument("--yes", action="store_true", help="do not ask")


def _rm(options: Namespace) -> int:
    from sana_lab.commands import disk

    return disk.remove(options.targets, models=options.models, superseded=options.superseded, yes=options.yes)


def _du(options: Namespace) -> int:
    from sana_lab.commands import disk

    return disk.usage()


def _ui_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--port", type=int, default=5000, help="(5000)")


def _ui(options: Namespace) -> None:
    from sana_lab.checkpoints.weights import HOME
    from sana_lab.tracking import server

    server.serve(HOME, port=options.port)


VERBS: dict[str, Verb] = {
    "train": Verb("train an experiment, or resume it", _train_arguments, _train),
    "cache": Verb("encode an experiment's data before training, or check them", lab.cache_arguments, lab.cache_verb),
    "sample": Verb("generate images from prompts", sampling.sample_arguments, sampling.sample_verb),
    "edit": Verb("change a picture from one prompt to another", sampling.edit_arguments, sampling.edit_verb),
    "eval": Verb(
        "measure quality of an experiment, a diffusers pipeline or a folder of images", _eval_arguments, _eval
    ),
    "bench": Verb("measure costs of an image: parameters, MACs, latency, memory", _bench_arguments, _bench),
    "profile": Verb("show where a training step, or sampling, spends its time", _profile_arguments, _profile),
    "ablate": Verb("run an ablation and write its table", _ablate_arguments, _ablate),
    "table": Verb("write the table of an ablation, or of several together", _tables_arguments, _table),
    "ship": Verb("write the weights of an ablation's trained rows, fp16 with cards", _ship_arguments, _ship),
    "pack": Verb("write an ablation's table, configurations and weights as one archive", _pack_arguments, _pack),
    "compare": Verb("compare two evaluations, paired over shared images", _compare_arguments, _compare),
    "stats": Verb("write reference statistics of real images, for FID and the like", _stats_arguments, _stats),
    "fid": Verb("measure the distance of two folders of pictures", lab.fid_arguments, lab.fid_verb),
    "import": Verb("convert released weights: NVlabs .pth, diffusers folder, hub id", _import_arguments, _import),
    "export": Verb("write a diffusers folder from a trained experiment or its weights", _export_arguments, _export),
    "parts": Verb("list parts and sections, with the options of each", _parts_arguments, _parts),
    "list": Verb("list experiments, ablations, parts, models or runs", lab.list_arguments, lab.list_verb),
    "new": Verb("write a commented ablation, experiment or part that runs", lab.new_arguments, lab.new_verb),
    "doctor": Verb("look at versions, devices, the runs and the disk", lambda parser: None, lab.doctor_verb),
    "completion": Verb("print the completion script of a shell", lab.completion_arguments, lab.completion_verb),
    "check": Verb("run the rules of a part's kind on your part, before training", lab.check_arguments, lab.check_verb),
    "du": Verb("show what runs, models and tables take on the disk", lambda parser: None, _du),
    "rm": Verb("remove runs, trials, sweeps or unused models; asks first", _rm_arguments, _rm),
    "ui": Verb("browse runs in MLflow, on this machine only", _ui_arguments, _ui),
}


def parser() -> ArgumentParser:
    """The parser of all verbs and their options."""
    top = ArgumentParser(
        "sana-lab", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    top.add_argument("--version", action=Version, nargs=0, help="print the version and exit")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        about: dict[str, Any] = {"help": verb.text, "description": verb.text, "epilog": examples.epilog(name)}
        raw = argparse.RawDescriptionHelpFormatter
        verb.arguments(verbs.add_parser(name, allow_abbrev=False, formatter_class=raw, **about))
    return top


class Version(argparse.Action):
    """Print the version, which takes a while to look up, and exit."""

    def __call__(self, parser: ArgumentParser, *_: Any) -> None:
        import importlib.metadata

        print(f"sana-lab {importlib.metadata.version('sana_lab')}")
        parser.exit()


def parse(arguments: Sequence[str] | None) -> Namespace:
    """Options and key=value in any order, which argparse alone does not accept after an option."""
    top = parser()
    options, rest = top.parse_known_args(arguments)
    for key in ("experiment", "ablation"):  # argparse takes an optional one for missing where it follows an option
        if getattr(options, key, "") is None and rest and not rest[0].startswith("-") and "=" not in rest[0]:
            setattr(options, key, rest.pop(0))
    several = options.verb == "table"
    overrides = hasattr(options, "overrides")
    if odd := [w for w in rest if w.startswith("-") or not overrides or ("=" not in w and not several)]:
        top.error(f"unrecognized arguments: {' '.join(odd)}")
    if rest:
        options.overrides += rest
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; the exit status is 0, 1 for an error that the user can fix, 130 for Ctrl-C, 143 for a training or
    a sweep that SIGTERM ended."""
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["complete"]:
        return _complete(words[1:])
    options = parse(arguments)
    if (missing := _missing_recipe(options)) is not None:
        return _print_usage(options.verb, missing)
    _silence_torchao()
    defer_torchmetrics()
    try:
        _check_numbers(options)
        _check_names(options)
        return _run(options) or 0
    except OSError as error:  # wherever it was raised: a file, a disk, a network
        print(f"sana-lab: {_one_line(error)}", file=sys.stderr)
        return 1
    except (ValueError, RuntimeError, ImportError) as error:
        if _is_bug(error):
            raise
        print(f"sana-lab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print("\nsana-lab: stopped; finished work is kept, and the same command goes on from there", file=sys.stderr)
        return getattr(error, "status", 130)
    except Exception as error:
        if not _is_of_mlflow(error):
            raise
        print(f"sana-lab: MLflow's database: {next(iter(str(error).splitlines()), error)}", file=sys.stderr)
        return 1


def _complete(words: Sequence[str]) -> int:
    """The words that a shell offers next, a line each."""
    from sana_lab.commands import completion

    print("\n".join(completion.complete(parser(), [word for word in words if word != "--"])))
    return 0


def _missing_recipe(options: Namespace) -> str | None:
    """The kind of recipe that a verb lacks; None if it has one or takes none."""
    kinds = {"experiment": "experiments", "ablation": "ablations"}
    return next((kinds[key] for key in kinds if getattr(options, key, "") is None), None)


def _print_usage(verb: str, kind: str) -> int:
    """What there is for a verb without its recipe; exit status 2, as for other missing arguments."""
    from sana_lab.commands import listing

    print("\n".join(listing.usage(verb, kind)))
    return 2


def _is_of_mlflow(error: BaseException) -> bool:
    """Whether MLflow raised it, or the library through which it reads its database: a damaged or busy file."""
    return type(error).__module__.partition(".")[0] in ("mlflow", "sqlalchemy")


def _run(options: Namespace) -> int | None:
    return VERBS[options.verb].run(options)


def _check_numbers(options: Namespace) -> None:
    """SpecError for a number out of range, with the nearest in it."""
    from sana_lab.config import ranges
    from sana_lab.config.validation import validate

    limits: dict[str, Any] = {
        **{"size": ranges.Pixels, "batch": ranges.BatchSize, "sweep": ranges.BatchSize, "seed": ranges.Seed},
        **{"repeats": ranges.Count, "steps": ranges.Count, "warmup": ranges.Number, "top": ranges.Count},
        **{"workers": ranges.Threads, "guidance": ranges.Real},
    }
    for name, annotation in limits.items():
        if (value := getattr(options, name, None)) is not None:
            validate(value, annotation, f"--{name}")


def _check_names(options: Namespace) -> None:
    """SpecError for unknown names and malformed overrides before torch is imported, which takes seconds."""
    from sana_lab.config import experiments

    match options.verb:
        case "ablate" | "table" | "ship" | "pack":
            others = [word for word in options.overrides if "=" not in word] if options.verb == "table" else []
            for name in (options.ablation, *others):
                experiments.locate("ablations", name)
        case "train" | "profile":
            experiments.apply(experiments.compose(options.experiment), options.overrides)
        case "eval" | "bench" | "sample" | "edit":
            name = options.model if options.verb in ("sample", "edit") else options.experiment
            if not Path(name).exists() and "/" not in name and not Path(name).suffix:  # else it may be a model
                experiments.locate("experiments", name)


def _silence_torchao() -> None:
    """Filter the warnings about each other's versions that torchao, transformers and diffusers log on import."""
    for name in ("torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
        logging.getLogger(name).addFilter(lambda record: not any(w in str(record.msg) for w in ("Enum", "torchao")))


def _is_bug(error: BaseException) -> bool:
    """Whether the error was raised outside this package, and so keeps its traceback."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last is None or Path(__file__).parent not in Path(last.tb_frame.f_code.co_filename).parents


def _one_line(error: OSError) -> str:
    if error.filename is not None and error.strerror is not None:
        return f"{error.filename}: {error.strerror}"
    return next(iter(str(error).splitlines()), type(error).__name__)


if __name__ == "__main__":
    sys.exit(main())
