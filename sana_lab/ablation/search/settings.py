"""What a file says of its search: measure, direction, pruner, and the rungs that follow for a training."""

from sana_lab.ablation.pruners import Pruner
from sana_lab.ablation.search import Search
from sana_lab.config import specs
from sana_lab.config.limits import point_steps
from sana_lab.config.schema import Ablation, Config, EfficiencyTable
from sana_lab.report.columns import column
from sana_lab.training import VALIDATION
from sana_lab.types import Json


def search_of(table: Ablation | EfficiencyTable) -> Search | None:
    """The search of an ablation; None if it has none."""
    if not isinstance(table, Ablation) or table.search is None:
        return None
    search: Search = specs.build("search", table.search)
    return search


def direction(search: Search) -> str | None:
    """Which values of its measure are better: lower or higher; None if nobody says."""
    return search.direction or column(search.measure).better


def pruner_of(search: Search) -> Pruner | None:
    """The pruner of a search."""
    return None if search.pruner is None else specs.build("pruner", search.pruner)


def pruning_metric(search: Search) -> str | None:
    """The metric that the pruner of a search compares; None without a pruner."""
    return None if (pruner := pruner_of(search)) is None else pruner.on or search.measure


def pruning_of(table: Ablation | EfficiencyTable) -> str | None:
    """The metric that the pruner of an ablation compares; None without a search or a pruner."""
    return None if (search := search_of(table)) is None else pruning_metric(search)


def pruning_direction(search: Search) -> str | None:
    """Which values of the pruner's metric are better: as of the search if it is its measure, else as its column says;
    None if nobody says."""
    metric = pruning_metric(search)
    return direction(search) if metric is None or metric == search.measure else column(metric).better


def watched(config: Config, metric: str) -> list[int]:
    """The steps of a training at which a metric is known: validations, or points of curves."""
    if metric != VALIDATION:
        return point_steps(config)
    every, last = config["trainer"]["validate_every"], config["trainer"]["max_steps"]
    return list(range(every, last + 1, every))


def rungs_of(pruner: Pruner, config: Config, metric: str) -> list[int]:
    """The steps of the rungs of a training; empty where the metric is known only at its end."""
    steps = watched(config, metric)
    return pruner.rungs(steps[0], config["trainer"]["max_steps"]) if steps else []


def for_worker(sweep: str, table: Ablation | EfficiencyTable) -> Json | None:
    """What a worker needs to judge the trainings of a sweep, as plain data; None without a pruner."""
    search = search_of(table)
    if search is None or (metric := pruning_metric(search)) is None:
        return None
    lower = pruning_direction(search) == "lower"
    return {"sweep": sweep, "pruner": search.pruner, "metric": metric, "lower": lower}
