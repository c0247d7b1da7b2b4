"""Intervals over rows, paired: every model is asked the same rows.

input   one column of numbers per measure, one number a row
does    of shares of yes and no: score intervals, which hold near 0 and 100 % and with few rows; of
        all else: draws rows with replacement, a fixed number of times from a fixed seed, the same
        sets for every model and measure
output  95 % intervals
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

RESAMPLES = 2000
_BLOCK = 2**21
# Rows that must differ before two models are called different: if neither were better, six
# would all point the same way once in 32 times (sign test, two-sided), five once in 16.
FEWEST_DIFFERENT = 6


@dataclass(frozen=True)
class Interval:
    """A 95 % interval."""

    low: float
    high: float

    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


class Bootstrap:
    """Resampled sets of rows.

    Args:
        num_rows: at least 1.
        seed: the same seed and number give the same sets.
    """

    def __init__(self, num_rows: int, seed: int = 0) -> None:
        self.num_rows, self.seed = num_rows, seed

    def _counts(self) -> Iterator[torch.Tensor]:
        """How often each row was drawn: (some of the sets, rows), float64."""
        import torch

        generator = torch.Generator().manual_seed(self.seed)
        block = max(_BLOCK // self.num_rows, 1)
        for first in range(0, RESAMPLES, block):
            shape = (min(block, RESAMPLES - first), self.num_rows)
            drawn = torch.randint(self.num_rows, shape, generator=generator)
            yield torch.zeros(shape, dtype=torch.float64).scatter_add_(
                1, drawn, torch.ones(shape, dtype=torch.float64)
            )

    def sums(self, columns_NM: torch.Tensor) -> torch.Tensor:
        """The sum of each column on each set, (R, M)."""
        import torch

        return torch.cat([counts_RN @ columns_NM.double() for counts_RN in self._counts()])

    def quantiles(self, values_NK: torch.Tensor, shares: tuple[float, ...]) -> torch.Tensor:
        """Quantiles of all values of the drawn rows, (R, shares): of n values the one in place
        n x share, counted from above 0."""
        import torch

        values, order = values_NK.flatten().double().sort(stable=True)
        row_of = order // values_NK.shape[1]
        found = []
        for counts_RN in self._counts():
            upto_RV = counts_RN[:, row_of].cumsum(1)
            wanted_RS = upto_RV[:, -1:] * torch.tensor(shares, dtype=torch.float64)
            found.append(values[torch.searchsorted(upto_RV, wanted_RS.contiguous())])
        return torch.cat(found)


def interval(drawn: torch.Tensor) -> Interval | None:
    """The middle 95 % of what a measure was on the sets; None if it was nothing at all."""
    import torch

    kept = drawn[drawn.isfinite()]
    if not len(kept):
        return None
    low, high = torch.quantile(kept, torch.tensor([0.025, 0.975], dtype=kept.dtype)).tolist()
    return Interval(low, high)


# Of the normal distribution, 95 % lie within so many standard deviations.
_Z = 1.959964


def score(yes: float, number: float) -> Interval:
    """The interval of a share (Wilson 1927).

    Args:
        yes: whole, or a mean over several runs on the same rows.
        number: at least 1.
    """
    share, z2 = yes / number, _Z * _Z
    middle = share + z2 / (2 * number)
    reach = _Z * math.sqrt(share * (1 - share) / number + z2 / (4 * number * number))
    scale = 1 + z2 / number
    # Rounding leaves the ends beside 0 and 1 where they are just these.
    low = 0.0 if not yes else (middle - reach) / scale
    high = 1.0 if yes == number else (middle + reach) / scale
    return Interval(low, high)


def score_difference(both: float, one: float, other: float, neither: float) -> Interval:
    """The interval of the difference of two shares of the same rows, one less the other (Newcombe
    1998, Statistics in Medicine 17, 2635-2650, method 10).

    Args:
        both, one, other, neither: rows on which both say yes, only the one, only the other, none.
    """
    number = both + one + other + neither
    first, second = (both + one) / number, (both + other) / number
    a, b = score(both + one, number), score(both + other, number)
    product = (both + one) * (other + neither) * (both + other) * (one + neither)
    phi = 0.0
    if product:
        above = float(both * neither - one * other)
        if above > 0:
            above = max(above - number / 2, 0.0)
        phi = above / math.sqrt(product)
    down_a, up_a = first - a.low, a.high - first
    down_b, up_b = second - b.low, b.high - second
    low = math.sqrt(max(down_a**2 - 2 * phi * down_a * up_b + up_b**2, 0.0))
    high = math.sqrt(max(up_a**2 - 2 * phi * up_a * down_b + down_b**2, 0.0))
    difference = first - second
    return Interval(difference - low, difference + high)
