"""A worker process other than the first: the same training loop on other rows, without writing
files.

input   as job.py, and the group
does    what keeps step with process 0: gradients, evaluations, states for its checkpoints
output  its own RunResult, when process 0 has finished the run
"""

from __future__ import annotations

from typing import Any

from truetune.behaviour.steps import StepFacts
from truetune.engine.checkpoint import gather_states
from truetune.errors import Collapsed, Interrupted, ToldElsewhere
from truetune.findings import Finding
from truetune.run.job import Job
from truetune.run.stop import interruptible
from truetune.system.signals import Stopped, number_of


class Follower(Job):
    """A `Job` that writes no files and reports nothing."""

    def write_start(self) -> None:
        pass

    def on_step(self, facts: StepFacts) -> None:
        self.last_loss = facts.loss
        if self.is_saved_after(facts.step):
            self.save_checkpoint()

    def _judged(self, step: int, loss: float | None) -> None:  # type: ignore[override]
        """Process 0 does, by replies of which this process writes its share."""
        self.replies.help(self.loaded, self.contract)

    def _went_back(self, facts: dict[str, Any]) -> None:
        pass

    def save_checkpoint(self) -> None:
        gather_states(self.trainer)

    def follow(self) -> None:
        """Train to the end.

        Raises:
            ToldElsewhere: the run stopped; process 0 tells why.
        """
        try:
            with interruptible(self.at_work, self.group) as stop:
                self.train(stop)
        except (Collapsed, Interrupted) as error:
            raise ToldElsewhere(error.exit_code) from error
        except (KeyboardInterrupt, Stopped) as error:
            raise ToldElsewhere(128 + number_of(error)) from error

    def _rewind(self) -> None:
        pass

    def _keep_until(self, step: int) -> None:
        pass

    def _found(self, finding: Finding) -> None:
        self.findings.append(finding)
