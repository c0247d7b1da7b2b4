"""The vital signs of a run: which prompts and examples they are taken on, kept for a resumed run.

input   Prepared, the loaded model, the run directory
does    chooses held-out prompts (trained ones where those are few), and the text that must not be
        forgotten; writes each measuring to metrics.jsonl and samples.jsonl
output  Findings of the last measuring, judged beside all before it
"""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from typing import Any

from truetune.behaviour.measure import (
    EXAMPLES,
    KEEP_TOKENS,
    PROMPTS,
    REPLY_TOKENS,
    Measured,
    Prober,
    own_samples,
    spread,
    text_pieces,
    whole,
)
from truetune.behaviour.replies import MORE, ROOM, Asked, ask
from truetune.behaviour.vitals import Vitals, judge
from truetune.contract.contract import PromptContract
from truetune.contract.encoder import Refused
from truetune.contract.example import SFTExample
from truetune.data.load import load
from truetune.errors import TruetuneError
from truetune.findings import Finding
from truetune.model.load import LoadedModel
from truetune.run.prepare import Prepared
from truetune.run_dir import KEEP_TEXT, RunDir, write_json

METRICS = "metrics.jsonl"
# Room that a prompt leaves in the context for its reply, and the longest that is asked.
_REPLY_ROOM, _LONGEST_PROMPT = 16, 2048


# What vital signs may cost of a run. In tokens that go forward: a trained one counts three, a step
# of a reply (eight prompts at once) as many as a small model on a CPU computes in that time.
_SHARE, _PASSES, _STEP = 0.03, 3, 120


class VitalSigns:
    """Takes and judges the vital signs of a run.

    Args:
        prepared: with the plan, which names the text to keep.
        contract: as served.
    """

    def __init__(self, run: RunDir, prepared: Prepared, contract: PromptContract) -> None:
        self.run, self.prepared, self.contract = run, prepared, contract
        self.findings: list[Finding] = []
        self.prober: Prober | None = None

    def _chosen(self, loaded: LoadedModel, *, at_start: bool) -> Prober:
        """The same for a run that is resumed.

        Args:
            at_start: nothing was trained yet.
        """
        prompts = [] if self.prepared.is_text else self._prompts()
        keep = [whole(ids) for ids in self._kept_ids(loaded, at_start=at_start)]
        return Prober(self.contract, self.prepared.examples, prompts, keep)

    def history(self) -> list[Vitals]:
        """All that were taken."""
        return [Vitals.of_line(v) for v in self.run.lines(METRICS) if v.get("probe")]

    def due(self, step: int) -> bool:
        """Whether they are taken at the evaluation of a step: before the first, after the last, and
        at as many between as cost little beside the training."""
        plan = self.prepared.plan
        if not step or step >= plan.max_steps:
            return True
        return step // plan.eval_steps % self.evaluations_apart == 0

    @functools.cached_property
    def evaluations_apart(self) -> int:
        """Every which evaluation takes them: from the tokens of the run alone, so that a resumed
        run does as one that was never stopped."""
        plan, examples = self.prepared.plan, self.prepared.examples
        lengths = [len(example.ids) for example in examples]
        mean = sum(lengths) / max(len(lengths), 1)
        per_step = plan.tokens_per_step or (plan.batch_size or 1) * mean
        trained = _PASSES * plan.max_steps * per_step
        replies = max((min(_room(e), REPLY_TOKENS) for e in examples), default=0)
        once = 2 * EXAMPLES * mean + KEEP_TOKENS + (0 if self.prepared.is_text else replies * _STEP)
        evaluations = max(plan.max_steps // plan.eval_steps, 1)
        for apart in range(1, evaluations):
            if (evaluations / apart + 1) * once <= _SHARE * trained:
                return apart
        # Twice on the way, whatever it costs.
        return max(evaluations // 3, 1)

    def measure(self, loaded: LoadedModel, step: int) -> Measured:
        """Take them; the prompts are chosen when it is done first, before the first step or when
        a run is resumed."""
        if self.prober is None:
            self.prober = self._chosen(loaded, at_start=not step)
        return self.prober.measure(loaded, step)

    def judged(
        self, measured: Measured, held_out: float | None
    ) -> tuple[dict[str, Any], list[Finding]]:
        """The line of metrics.jsonl, and what it says beside those before it."""
        step = measured.vitals.step
        vitals = replace(measured.vitals, held_out_loss=held_out, loop_loss=self._loop_loss(step))
        return vitals.as_dict(), judge([*self.history(), vitals])

    def noticed(self) -> list[Finding]:
        """What choosing the prompts and the text had to tell, once."""
        found, self.findings = self.findings, []
        return found

    def _loop_loss(self, step: int) -> float | None:
        """The loop's own loss since the vital signs were taken last."""
        last = max((v.step for v in self.history()), default=0)
        lines = [v for v in self.run.lines(METRICS) if "loss" in v and last < v["step"] <= step]
        targets = sum(line["supervised_tokens"] for line in lines)
        if not targets:
            return None
        return float(sum(v["loss"] * v["supervised_tokens"] for v in lines) / targets)

    def _prompts(self) -> list[Asked]:
        """Held-out prompts, spread over the rows; trained ones where those are fewer than asked."""
        chats = [c for c in self.prepared.eval_conversations if c.messages]
        chosen = [chats[at] for at in spread(len(chats), PROMPTS)]
        asked: list[Asked] = []
        encoded = self.contract.encode_all(chosen, loss_on="last") if chosen else []
        for chat, result in zip(chosen, encoded, strict=True):
            if isinstance(result, Refused):
                continue
            turn = max(i for i, m in enumerate(chat.messages) if m["role"] == "assistant")
            for example in result.examples:
                if one := ask(self.contract, example, chat.where, chat.messages[:turn]):
                    asked.append(replace(one, held_out=True))
        examples, rows = self.prepared.examples, self.prepared.rows
        for at in spread(len(examples), PROMPTS - len(asked)) if len(asked) < PROMPTS else []:
            if one := ask(self.contract, examples[at], rows[at]):
                asked.append(one)
        context = self.prepared.model.context_length or _LONGEST_PROMPT
        longest = min(context - _REPLY_ROOM, _LONGEST_PROMPT)
        return [one for one in asked if len(one.ids) <= longest][:PROMPTS]

    # -------------------------------------------------------------- text that must not be forgotten

    def _kept_ids(self, loaded: LoadedModel, *, at_start: bool) -> list[list[int]]:
        path = self.run.file(KEEP_TEXT)
        if path.is_file():
            kept: list[list[int]] = json.loads(path.read_text(encoding="utf-8"))["ids"]
            return kept
        source = self.prepared.plan.keep_text
        if not source and not at_start:
            # What a trained model writes says nothing about what it knew.
            return []
        try:
            ids = (
                self._text_ids(source)
                if source
                else own_samples(loaded, self.contract, self.prepared.plan.seed)
            )
        except (TruetuneError, OSError, ValueError) as error:
            self._unreadable(str(source or ""), error)
            ids = []
        if ids:
            facts = {"source": source or "written by the model before the first step", "ids": ids}
            write_json(path, facts)
        return ids

    def _unreadable(self, source: str, error: Exception) -> None:
        self.findings.append(
            Finding(
                "keep-text-unreadable",
                "warning",
                f"the text that must not be forgotten is not watched: {error}",
                where=source,
                why="training does not need it, and goes on",
                fix="--keep-text takes a text file, or rows in any format that is trained",
            )
        )

    def _text_ids(self, source: str) -> list[list[int]]:
        """Pieces of a text, or of the texts of rows.

        Raises:
            ValueError: there is no text.
        """
        pieces = text_pieces(self.contract, load(source).conversations)
        if not pieces:
            raise ValueError("it holds no text")
        return pieces


def _room(example: SFTExample) -> int:
    """New tokens that a reply to an example's prompt is given."""
    return ROOM * example.num_supervised + MORE
