"""A run under watch: every step and every measuring of it, judged beside those before.

input   facts of steps, and a model at intervals
does    keeps the history, asks the probes, and says each thing once
output  Findings; one of level error says that the run has collapsed
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from truetune.behaviour.measure import Measured, Prober
from truetune.behaviour.steps import Probe, StepFacts, usual_probes
from truetune.behaviour.vitals import Vitals, judge
from truetune.findings import Finding
from truetune.model.load import LoadedModel


class Watch:
    """Watches one run whose history is kept in memory.

    Args:
        prober: takes the vital signs.
        probes: of the steps; new ones where None.

    Attributes:
        history: the vital signs so far.
    """

    def __init__(self, prober: Prober, probes: Sequence[Probe] | None = None) -> None:
        self.prober = prober
        self.probes = usual_probes() if probes is None else tuple(probes)
        self.history: list[Vitals] = []
        self._told: set[tuple[str, str]] = set()
        self._losses: list[tuple[float, int]] = []

    def step(self, facts: StepFacts) -> list[Finding]:
        """What a step shows."""
        self._losses.append((facts.loss, max(facts.num_supervised, 1)))
        found = [finding for probe in self.probes if (finding := probe(facts))]
        return once(found, self._told)

    def take(self, loaded: LoadedModel, step: int) -> tuple[Measured, list[Finding]]:
        """Take the vital signs after a step, 0 before the first, and judge them."""
        measured = self.prober.measure(loaded, step)
        targets = sum(number for _, number in self._losses)
        loop = sum(loss * number for loss, number in self._losses) / targets if targets else None
        self._losses.clear()
        self.history.append(replace(measured.vitals, loop_loss=loop))
        return replace(measured, vitals=self.history[-1]), once(judge(self.history), self._told)


def once(findings: Sequence[Finding], told: set[tuple[str, str]]) -> list[Finding]:
    """Findings that were not told at this level before; they are remembered. Spikes of several
    steps are several findings."""
    new = [f for f in findings if f.code == "loss-spike" or (f.code, f.level) not in told]
    told.update((f.code, f.level) for f in new)
    return new
