"""Decide when to measure vital signs: as often as their cost, measured in the same run, allows."""

from __future__ import annotations

from collections.abc import Sequence

# The share of a run's time that they may cost. Shorter runs still measure them in the middle,
# because judging replies needs three measurements.
SHARE, LEAST = 0.03, 1


def is_due(
    place: int, places: int, last: int, costs: Sequence[float], training: float, least: int = LEAST
) -> bool:
    """Whether vital signs are due at an evaluation: before the first step, after the last, and at
    as many evenly spread evaluations in between as their share of the time allows.

    Args:
        place, places: the evaluation, 0 before the first step, and the one after the last step.
        last: the evaluation at which they were last measured.
        costs: seconds of each measuring so far.
        training: seconds that all steps of the run take, as far as it is known.
        least: measurings between the first and the last, whatever they cost.
    """
    if place <= 0 or place >= places:
        return True
    # The first one chooses and draws what the others ask; and the last one is kept for the end.
    once = costs[-1] if costs else 0.0
    left = SHARE * training - sum(costs) - once
    fits = max(int(left / once) if once and left > 0 else 0, least - len(costs) + 1, 0)
    apart = (places - last) / (fits + 1)
    # To the nearest evaluation.
    return place - last >= apart - 0.5
