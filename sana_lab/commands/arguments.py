"""Arguments of the verbs about the lab itself and of `fid`, and what runs them; modules are imported when they run."""

from argparse import ArgumentParser, Namespace
from pathlib import Path


def list_arguments(parser: ArgumentParser) -> None:
    """What is listed."""
    kinds = ("experiments", "ablations", "parts", "models", "runs")
    parser.add_argument("what", nargs="?", choices=kinds, help="what to list (how many there are of each)")


def list_verb(options: Namespace) -> None:
    """`sana-lab list`."""
    from sana_lab.commands import listing

    listing.main(options.what)


def cache_arguments(parser: ArgumentParser) -> None:
    """The experiment, and how it is encoded."""
    parser.add_argument("experiment", nargs="?", metavar="EXPERIMENT", help="name in experiments/, or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="option to change")
    parser.add_argument(
        "--processes", type=int, metavar="N", help="processes that share the work (one per GPU, else 1)"
    )
    parser.add_argument("--verify", action="store_true", help="read every shard, name broken ones, and exit")
    parser.add_argument("--repair", action="store_true", help="verify, and encode broken shards again")


def cache_verb(options: Namespace) -> int:
    """`sana-lab cache`."""
    from sana_lab.commands import cache
    from sana_lab.evaluation.points import Evaluation
    from sana_lab.training import command

    def train(name: str) -> None:
        command.main(name, [], False, Evaluation())

    how = {"processes": options.processes, "verify": options.verify, "repair": options.repair}
    return cache.main(options.experiment, options.overrides, train, **how)


def new_arguments(parser: ArgumentParser) -> None:
    """What is begun, and its name."""
    parser.add_argument("what", choices=("ablation", "experiment", "part"), help="what to begin")
    parser.add_argument("name", metavar="NAME", help="of the file, and of what is in it")
    parser.add_argument("--kind", help="kind of a part, such as solver (attention)")


def new_verb(options: Namespace) -> None:
    """`sana-lab new`."""
    from sana_lab.commands import new

    new.main(options.what, options.name, options.kind)


def doctor_verb(options: Namespace) -> int:
    """`sana-lab doctor`."""
    from sana_lab.commands import doctor

    return doctor.main()


def completion_arguments(parser: ArgumentParser) -> None:
    """The shell."""
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="shell that is to complete")


def completion_verb(options: Namespace) -> None:
    """`sana-lab completion`."""
    from sana_lab.commands import completion

    print(completion.SCRIPTS[options.shell], end="")


def check_arguments(parser: ArgumentParser) -> None:
    """The part and its options."""
    parser.add_argument("part", metavar="PART", help="your module:attribute, or a registered name")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="option of the part")
    parser.add_argument("--kind", help="kind of part such as attention (that of the class it inherits)")


def check_verb(options: Namespace) -> int:
    """`sana-lab check`."""
    from sana_lab.commands import check

    return check.main(options.part, options.overrides, options.kind)


def fid_arguments(parser: ArgumentParser) -> None:
    """Two folders and the features."""
    parser.add_argument("generated", type=Path, metavar="A", help="folder of pictures that are judged")
    parser.add_argument("real", type=Path, metavar="B", help="folder of real ones, or a file of `sana-lab stats`")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="torch-fidelity's weights of Inception (.pth)")
    parser.add_argument("--extractor", metavar="SPEC", help="other features, such as '{name: dinov2, model: FOLDER}'")
    parser.add_argument("--metrics", nargs="+", default=["fid"], metavar="NAME", help="fid, kid, precision ... (fid)")


def fid_verb(options: Namespace) -> None:
    """`sana-lab fid`."""
    from sana_lab.evaluation import folders

    folders.main(options.generated, options.real, options.extractor, options.weights, options.metrics)
