"""GenEval's score: the mean of the six tasks' accuracies, with a cluster bootstrap over prompts within tasks."""

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence

import numpy as np

from sana_lab.intervals import cluster_bootstrap
from sana_lab.types import Json


def outcome(row: Json, verdicts: Sequence[tuple[bool, str]]) -> Json:
    """Verdicts of one row's images: {"tag", "prompt", "correct", "reasons"}."""
    return {
        "tag": row["tag"],
        "prompt": row["prompt"],
        "correct": [right for right, _ in verdicts],
        "reasons": [reason for _, reason in verdicts],
    }


def summarise(outcomes: Sequence[Json], *, exhausted: Collection[str] = (), seed: int = 0) -> Json:
    """Means per task and their unweighted mean `overall`, each with a 95 % interval over prompts within tasks.

    The prompts of `exhausted` tasks are all that exist and so no sample: there the interval is over images.
    Also the shares of correct images and of prompts with at least one correct image, as GenEval prints them, and the
    numbers of prompts and images. ValueError without outcomes.
    """
    if not outcomes:
        raise ValueError("there are no outcomes to sum up")
    tasks: dict[str, list[list[float]]] = defaultdict(list)
    for each in outcomes:
        cluster = [float(right) for right in each["correct"]]
        tasks[each["tag"]] += [[right] for right in cluster] if each["tag"] in exhausted else [cluster]
    prompts = Counter(each["tag"] for each in outcomes)
    overall = cluster_bootstrap(tasks, seed=seed)
    images = [right for clusters in tasks.values() for cluster in clusters for right in cluster]
    return {
        "overall": overall.value,
        "interval": [overall.low, overall.high],
        "tasks": {tag: {**_task(clusters, seed), "prompts": prompts[tag]} for tag, clusters in tasks.items()},
        "prompts": len(outcomes),
        "images": len(images),
        "correct_images": float(np.mean(images)),
        "correct_prompts": float(np.mean([any(each["correct"]) for each in outcomes])),
    }


def _task(clusters: list[list[float]], seed: int) -> Json:
    estimate = cluster_bootstrap({"": clusters}, seed=seed)
    return {
        "value": estimate.value,
        "interval": [estimate.low, estimate.high],
        "images": sum(map(len, clusters)),
    }


def influences(values: Sequence[float], tasks: Sequence[str], only: str | None = None) -> list[float]:
    """One number per image: their mean is the mean of the tasks' means, or that of the task `only`; their spread is its
    uncertainty."""
    x, sizes = np.asarray(values, np.float64), Counter(tasks)
    chosen = sizes if only is None else {only: sizes[only]}
    means = {task: float(np.mean([v for v, t in zip(values, tasks, strict=True) if t == task])) for task in chosen}
    mean = float(np.mean(list(means.values())))
    weights = np.array([len(x) / (len(means) * sizes[task]) if task in means else 0.0 for task in tasks])
    return (mean + weights * (x - np.array([means.get(task, 0.0) for task in tasks]))).tolist()
