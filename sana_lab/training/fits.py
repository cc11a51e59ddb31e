"""The trainings that a command would do, with their costs, against this machine's memory and disk."""

from sana_lab.bench import fit
from sana_lab.bench.fit import Training
from sana_lab.checkpoints import weights
from sana_lab.config import experiments, hashing
from sana_lab.config.memo import reusing
from sana_lab.config.schema import Config
from sana_lab.training import ranks


def training(title: str, experiment: Config, devices: int | None = None) -> Training | None:
    """A training on all devices of this machine that can share it, or of so many; None where its cost is not known."""
    from sana_lab.bench.training_cost import training_cost  # here, for a short chain of imports

    try:
        cost = training_cost(experiment, ranks.count(experiment, devices))
    except Exception:  # of a part of the user's own; a cost that is not known refuses nothing
        return None
    folder = weights.HOME / "models" / hashing.experiment_hash(experiment)
    return Training(title, cost, experiment["data"], sum(path.stat().st_size for path in folder.glob("*.ckpt")))


def trainings(experiment: Config, name: str) -> list[Training]:
    """Those of an experiment and of what it takes weights from that are not done, the last its own."""
    needed = [(title, experiments.load(title)) for title in experiments.prerequisites(experiment)]
    missing = [(title, config) for title, config in needed if weights.ready(config) is None]
    missing += [(name, experiment)] if weights.trained(experiment) is None else []
    each = [training(title, config) for title, config in missing if config["trainer"]["max_steps"]]
    return [one for one in each if one is not None]


def check(experiment: Config, name: str) -> None:
    """SpecError for an experiment that clearly does not fit, or one that it takes weights from."""
    with reusing():
        fit.check(trainings(experiment, name))


def lines(experiment: Config, name: str) -> list[str]:
    """What a dry run says of disk and memory."""
    with reusing():
        return fit.lines(trainings(experiment, name))
