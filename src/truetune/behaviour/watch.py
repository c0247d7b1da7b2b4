"""Watch a run: judge every step and every measurement by comparing it with the earlier ones.

input   facts of steps, and a model at intervals
does    keeps the history, runs the probes, and reports each problem once
output  Findings; one of level error says that the run has collapsed
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from truetune.behaviour.measure import Measured, Prober
from truetune.behaviour.steps import Probe, StepFacts, usual_probes
from truetune.behaviour.vitals import Regime, Vitals, judge
from truetune.findings import Finding
from truetune.model.load import LoadedModel


class Watch:
    """Watches one run whose history is kept in memory.

    Args:
        prober: measures the vital signs.
        probes: the probes of the steps; None creates new ones.
        history: the vital signs measured so far.
        losses: loss and number of targets of each step since the last measurement.
        regime: how the run is trained.

    Attributes:
        history: the vital signs so far.
    """

    def __init__(
        self,
        prober: Prober,
        probes: Sequence[Probe] | None = None,
        history: Sequence[Vitals] = (),
        losses: Sequence[tuple[float, int]] = (),
        regime: Regime | None = None,
    ) -> None:
        self.prober = prober
        self.regime = regime or Regime()
        self.probes = usual_probes() if probes is None else tuple(probes)
        self.history = list(history)
        self._told: set[tuple[str, str]] = set()
        self._losses = list(losses)

    def step(self, facts: StepFacts) -> list[Finding]:
        """Return the findings of a step."""
        self.trained(facts.loss, max(facts.num_supervised, 1))
        return self.new([finding for probe in self.probes if (finding := probe(facts))])

    def trained(self, loss: float, targets: int) -> None:
        """Record the loss of a step, to be compared with the next vital signs."""
        self._losses.append((loss, targets))

    def take(
        self,
        loaded: LoadedModel,
        step: int,
        held_out_loss: float | None = None,
        before: float = 0.0,
    ) -> tuple[Measured, list[Finding]]:
        """Take the vital signs after a step, 0 before the first, and judge them.

        Args:
            held_out_loss: where it is measured elsewhere, in nats per token.
            before: seconds that choosing what is asked took.
        """
        measured = self.prober.measure(loaded, step)
        vitals = replace(
            measured.vitals,
            loop_loss=self._loop_loss(),
            seconds=round(measured.vitals.seconds + before, 4),
        )
        if held_out_loss is not None:
            vitals = replace(vitals, held_out_loss=held_out_loss)
        self._losses.clear()
        self.history.append(vitals)
        found = judge(self.history, self.regime)
        return replace(measured, vitals=vitals), [_with_rows(f, measured) for f in found]

    def new(self, findings: Sequence[Finding]) -> list[Finding]:
        """Return the findings that were not reported before."""
        return once(findings, self._told)

    def _loop_loss(self) -> float | None:
        """The mean training loss since the last measurement."""
        targets = sum(number for _, number in self._losses)
        return sum(loss * number for loss, number in self._losses) / targets if targets else None


def _with_rows(finding: Finding, measured: Measured) -> Finding:
    """A finding about a file, with the rows of the file that have the highest loss."""
    rows = measured.hardest.get(finding.where, ())
    return replace(finding, where=rows[0], rows=rows, count=len(rows)) if rows else finding


def once(findings: Sequence[Finding], reported: set[tuple[str, str]]) -> list[Finding]:
    """Findings that were not reported at this level before; they are remembered. Spikes of several
    steps are several findings."""
    new = [f for f in findings if f.code == "loss-spike" or (f.code, f.level) not in reported]
    reported.update((f.code, f.level) for f in new)
    return new


def not_taken(step: int, error: Exception) -> Finding:
    """The finding for vital signs that could not be measured; training continues."""
    return Finding(
        "probe-failed",
        "warning",
        f"the vital signs could not be measured at step {step:,}: {error}",
        why=f"{type(error).__name__} while the model answered fixed prompts",
        fix="nothing to do: training continues",
    )
