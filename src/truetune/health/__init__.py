"""Live probes: plain numbers of a step in, a finding or nothing out.

A probe cannot reach the model or the optimiser. It is asked after the backward pass and before
the optimiser moves; a finding of level error stops the run there.
"""

from truetune.health.probes import Probe, StepFacts, non_finite

__all__ = ["Probe", "StepFacts", "non_finite"]
