"""What several metrics need of the pairs of generated and real features, from three passes that they share: each set
with itself, then one with the other."""

from collections.abc import Collection

import torch
from torch import Tensor

from sana_lab.evaluation.distances.mmd import Discrepancy, KernelSums, from_sums, polynomial
from sana_lab.evaluation.distances.pairs import reduce_pairs
from sana_lab.evaluation.distances.precision_recall import Membership, Neighbours

AROUND_REAL = {"precision": 3, "density": 5, "coverage": 5}
"""Neighbours of a real image out to which its ball reaches, by metric."""

AROUND_FAKE = {"recall": 3}
"""Of a generated image."""


class SharedPairs:
    """KID's sums and the memberships of precision, recall, density and coverage, as far as `metrics` names them.

    `fake` (n, D) and `real` (m, D) rows; `same`: real holds the rows of fake in any order. ValueError for too few rows.
    """

    def __init__(
        self, fake: Tensor, real: Tensor, metrics: Collection[str], *, same: bool, device: torch.device | str = "cpu"
    ) -> None:
        sums = [KernelSums(polynomial) for _ in ("fake", "real", "across")] if "kid" in metrics else []
        real_k = {AROUND_REAL[metric] for metric in metrics if metric in AROUND_REAL}
        fake_k = {AROUND_FAKE[metric] for metric in metrics if metric in AROUND_FAKE}
        near_fake, near_real = ([Neighbours(max(k))] if k else [] for k in (fake_k, real_k))
        reduce_pairs(fake, None, [*sums[:1], *near_fake], device=device)
        reduce_pairs(real, None, [*([] if same else sums[1:2]), *near_real], device=device)
        self.around_real = {k: Membership(near_real[0].squared_radii(k)) for k in real_k}
        self.around_fake = {k: Membership(near_fake[0].squared_radii(k), inside_out=True) for k in fake_k}
        inside = [*self.around_real.values(), *self.around_fake.values()]
        reduce_pairs(fake, real, [*([] if same else sums[2:]), *inside], device=device)
        self._sums, self._same = sums, same

    def kid(self) -> Discrepancy:
        """The squared discrepancy under KID's kernel."""
        own, *reference = self._sums
        return from_sums(own, None if self._same else (reference[0], reference[1]))
