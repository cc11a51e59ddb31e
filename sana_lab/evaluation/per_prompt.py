"""What measures of images with prompts share: means over images of few prompts, and which prompts have come so far."""

from collections.abc import Hashable, Sequence

import numpy as np
from scipy import stats

from sana_lab.config.specs import nearest
from sana_lab.evaluation import Value
from sana_lab.types import Json


def clustered_mean(values: Sequence[float], clusters: Sequence[Hashable]) -> Value:
    """The mean and its 95 % interval where values of one cluster (images of one prompt) depend on each other.

    Student's t with the cluster-robust error, which is the usual one where every cluster holds one value; `n` is the
    number of clusters. One cluster alone has no interval. ValueError where there is nothing.
    """
    if not values:
        raise ValueError("no images came, so there is no mean")
    x, position = np.asarray(values, np.float64), {c: i for i, c in enumerate(dict.fromkeys(clusters))}
    mean, n = x.mean(), len(position)
    if n == 1:
        return Value(float(mean), None, None, 1)
    sums = np.bincount([position[c] for c in clusters], x - mean)
    error = np.sqrt((sums**2).sum() * n / (n - 1)) / len(x)
    reach = stats.t.ppf(0.975, n - 1) * error
    return Value(float(mean), float(mean - reach), float(mean + reach), n)


class Scored:
    """Numbers about images, one for each, with their prompts: what a mean measure gathers."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.cut: dict[str, bool] = {}  # prompt -> whether the network read only its beginning
        self.prompts: list[str] = []  # of each image

    def add(self, prompts: Sequence[str], values: Sequence[float]) -> None:
        """Take in one number for each image. ValueError where one is not finite, with its prompt."""
        for prompt, value in zip(prompts, values, strict=True):
            if not np.isfinite(value):
                raise ValueError(f"the score of an image for {prompt!r} is {value}")
            self.prompts.append(prompt)
            self.values.append(float(value))

    def mean(self) -> Value:
        return clustered_mean(self.values, self.prompts)

    def share_cut(self) -> Value:
        """Percent of the distinct prompts that are in `cut` as true."""
        return Value(100 * sum(self.cut.values()) / len(self.cut), None, None, len(self.cut))

    def counts(self) -> Json:
        return {"images": len(self.values), "prompts": len(set(self.prompts))}


class Roster:
    """Which of a benchmark's rows have images, so that a part of it is never taken for the whole.

    `key` names the field that tells rows apart.
    """

    def __init__(self, rows: Sequence[Json], images_per_prompt: int, key: str = "prompt") -> None:
        if images_per_prompt < 1:
            raise ValueError(f"images_per_prompt is {images_per_prompt}, expected at least 1")
        self.rows, self.each, self.key = rows, images_per_prompt, key
        self.position = {row[key]: i for i, row in enumerate(rows)}
        self.came = [0] * len(rows)  # images of each
        if len(self.position) < len(rows):
            raise ValueError(f"two of the {len(rows)} rows have the same {key}, expected distinct ones")

    def position_of(self, row: Json) -> int:
        """The position of the row that one image was drawn for. ValueError where it is none of them."""
        given = row.get(self.key)
        if given not in self.position:
            near = nearest(str(given), map(str, self.position)) if len(self.position) < 100 else "see its file"
            raise ValueError(f"{self.key} {given!r} is none of this benchmark's {len(self.rows)}; {near}")
        return self.position[given]

    @property
    def partial(self) -> bool:
        """Whether a row has fewer images than it should, or some rows more than others."""
        return set(self.came) != {max(self.came)} or self.came[0] < self.each

    def settings(self) -> Json:
        seen = [n for n in self.came if n]
        return {
            "partial": self.partial,
            "prompts": len(seen),
            "prompts_expected": len(self.rows),
            "images": sum(seen),
            "images_expected": len(self.rows) * self.each,
            "images_per_prompt": sorted(set(seen)),
        }
