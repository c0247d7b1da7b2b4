"""Bootstrap intervals over rows, paired: every model and measure sees the same resampled rows.

input   one column of numbers per measure, one number a row
does    draws rows with replacement, a fixed number of times from a fixed seed
output  what each measure is on each of the drawn sets, and the middle 95 % of that
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

RESAMPLES = 2000
_BLOCK = 2**21
# Rows that must differ between two models before they are told apart: were neither better, six
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
    """The middle 95 % of what a measure was on the sets; None where it was nothing at all."""
    import torch

    kept = drawn[drawn.isfinite()]
    if not len(kept):
        return None
    low, high = torch.quantile(kept, torch.tensor([0.025, 0.975], dtype=kept.dtype)).tolist()
    return Interval(low, high)


def unanimous(value: float, num_rows: int) -> Interval:
    """The exact interval of a share of 0 or 1, where every resampled set is the same: rows that are
    all alike do not show that all rows are."""
    reach = 1 - 0.025 ** (1 / num_rows)
    return Interval(1 - reach, 1.0) if value else Interval(0.0, reach)
