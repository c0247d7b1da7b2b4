"""The vital signs of a run: which prompts and examples they are taken on, kept for a resumed run.

input   Prepared, the loaded model, the run directory
does    chooses held-out prompts (trained ones where those are few), and the text that must not be
        forgotten; takes them, and goes on where the files of a resumed run end
output  what was measured, and Findings, judged beside all before it
"""

from __future__ import annotations

import functools
import json
import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from truetune.behaviour.measure import (
    EXAMPLES,
    PIECE_TOKENS,
    PIECES,
    PROMPTS,
    REPLY_TOKENS,
    Measured,
    Prober,
    Replies,
    own_samples,
    text_pieces,
    whole,
)
from truetune.behaviour.replies import Asked, ask
from truetune.behaviour.schedule import LEAST, is_due
from truetune.behaviour.vitals import FEWEST_EXAMPLES, Regime, Vitals, is_suspect, judge
from truetune.behaviour.watch import Watch
from truetune.contract.contract import PromptContract
from truetune.contract.encoder import Refused
from truetune.data.load import load
from truetune.data.rows import evenly
from truetune.errors import TruetuneError
from truetune.findings import Finding
from truetune.model.load import LoadedModel
from truetune.recipe.plan import suggested_rate
from truetune.run.prepare import Prepared
from truetune.run_dir import KEEP_TEXT, RunDir, write_json

METRICS = "metrics.jsonl"
# Room that a prompt leaves in the context for its reply, and the longest that is asked.
_REPLY_ROOM, _LONGEST_PROMPT = 16, 2048


# What one reply may cost of a short run, in tokens that go forward, and the tokens it has all the
# same: a trained token counts three, a step of a reply (eight prompts at once) as many as a small
# model on a CPU computes in that time.
_SHORT_SHARE, _FEWEST_TOKENS, _PASSES, _STEP = 0.01, 20, 3, 120
# Measurings between the first and the last of a run whose --eval-steps somebody chose, or that
# goes back to one of them.
_CHOSEN = 10


class VitalSigns:
    """Measures and judges the vital signs of a run.

    Args:
        prepared: with the plan, which names the text to keep.
        contract: as served.
        replies: writes the replies.
    """

    def __init__(
        self, run: RunDir, prepared: Prepared, contract: PromptContract, replies: Replies
    ) -> None:
        self.replies = replies
        self.run, self.prepared, self.contract = run, prepared, contract
        self.findings: list[Finding] = []
        self.prober: Prober | None = None
        self.watch: Watch | None = None

    def _chosen(self, loaded: LoadedModel, *, at_start: bool) -> Prober:
        """The same for a run that is resumed.

        Args:
            at_start: nothing was trained yet.
        """
        prompts = [] if self.prepared.is_text else self._prompts()
        keep = [whole(ids) for ids in self._kept_ids(loaded, at_start=at_start)]
        return Prober(
            self.contract,
            self.prepared.examples,
            prompts,
            keep,
            reply_tokens=self.reply_tokens,
            examples=max(self._shortened(EXAMPLES), FEWEST_EXAMPLES),
            rows=self.prepared.rows,
            replies=self.replies,
        )

    def healthy_step(self) -> int:
        """The last step whose vital signs showed nothing worse than a note; 0 before the first."""
        return max(self._healthy(), default=0)

    def best(self) -> tuple[int, float] | None:
        """The evaluation with the lowest held-out loss of those that found the replies healthy:
        its step, and the loss in nats per token."""
        healthy = set(self._healthy())
        losses = [
            (line["eval_loss"], line["step"])
            for line in self.run.lines(METRICS)
            if line.get("eval_loss") is not None
        ]
        found = min((pair for pair in losses if pair[1] in healthy and pair[1]), default=None)
        return None if found is None else (found[1], found[0])

    def _held_out_losses(self) -> list[float]:
        lines = self.run.lines(METRICS)
        return [line["eval_loss"] for line in lines if line.get("eval_loss") is not None]

    def waited(self) -> int:
        """Evaluations since the best one."""
        best = self.best()
        steps = [v["step"] for v in self.run.lines(METRICS) if v.get("eval_loss") is not None]
        return sum(step > best[0] for step in steps) if best else 0

    def due(self, step: int, loss: float | None) -> bool:
        """Whether they are taken at the evaluation of a step: where the step may be the one that is
        saved, where the held-out loss alone is reason to look closer, and where `is_due` says
        so."""
        plan = self.prepared.plan
        if loss is not None and is_suspect([*self._held_out_losses(), loss]):
            return True
        if plan.patience and loss is not None:
            best = self.best()
            if best is None or loss < best[1]:
                return True
        # Who goes back loses what came after the last healthy step.
        is_chosen = plan.on_collapse == "rewind" or not plan.origin("eval_steps").startswith(
            "default"
        )
        places = math.ceil(plan.max_steps / plan.eval_steps)
        place = places if step >= plan.max_steps else step // plan.eval_steps
        history = self._history()
        steps = [line["seconds"] for line in self.run.lines(METRICS) if "loss" in line]
        return is_due(
            place,
            places,
            history[-1].step // plan.eval_steps if history else 0,
            [vitals.seconds for vitals in history],
            plan.max_steps * statistics.median(steps) if steps else 0.0,
            _CHOSEN if is_chosen else LEAST,
        )

    @functools.cached_property
    def reply_tokens(self) -> int:
        """The longest reply that is asked, from the tokens of the run alone: a run of a few steps
        is not to wait longer for replies than for its steps."""
        plan = self.prepared.plan
        lengths = [len(example.ids) for example in self.prepared.examples]
        mean = sum(lengths) / max(len(lengths), 1)
        trained = plan.max_steps * (plan.tokens_per_step or (plan.batch_size or 1) * mean)
        fits = int(_SHORT_SHARE * _PASSES * trained / _STEP)
        return max(min(fits, REPLY_TOKENS), _FEWEST_TOKENS)

    def _shortened(self, number: int) -> int:
        """Of a measuring, what a run that is short has of it."""
        return number * self.reply_tokens // REPLY_TOKENS

    def take(
        self, loaded: LoadedModel, step: int, held_out_loss: float | None
    ) -> tuple[Measured, list[Finding]]:
        """Take and judge them; the prompts are chosen when it is done first, before the first step
        or when a run is resumed."""
        began = time.perf_counter()
        if self.prober is None:
            self.prober = self._chosen(loaded, at_start=not step)
        if self.watch is None:
            self.watch = self._begun()
        return self.watch.take(loaded, step, held_out_loss, time.perf_counter() - began)

    def trained(self, line: Mapping[str, Any]) -> None:
        """A step that is written to metrics.jsonl."""
        if self.watch:
            self.watch.trained(line["loss"], line["supervised_tokens"])

    def went_back(self) -> None:
        """Read the history again after the run went back to an earlier step."""
        self.watch = None

    def _begun(self) -> Watch:
        """Goes on where the files of the run end."""
        assert self.prober is not None
        history = self._history()
        last = history[-1].step if history else 0
        losses = [
            (line["loss"], line["supervised_tokens"])
            for line in self.run.lines(METRICS)
            if "loss" in line and line["step"] > last
        ]
        plan = self.prepared.plan
        usual = suggested_rate(plan, self.prepared.model)
        guessing = math.log(max(len(self.contract.tokenizer), 2))
        regime = Regime(plan.lora, plan.learning_rate, usual, guessing)
        return Watch(self.prober, (), history, losses, regime)

    def _healthy(self) -> list[int]:
        history = self._history()
        return [
            vitals.step
            for number, vitals in enumerate(history, start=1)
            if all(finding.level == "note" for finding in judge(history[:number]))
        ]

    def _history(self) -> list[Vitals]:
        return [Vitals.of_line(v) for v in self.run.lines(METRICS) if v.get("probe")]

    def noticed(self) -> list[Finding]:
        """Return the findings from choosing the prompts and the text, once."""
        found, self.findings = self.findings, []
        return found

    def _prompts(self) -> list[Asked]:
        """Held-out prompts, spread over the rows; trained ones where those are fewer than asked."""
        chats = [c for c in self.prepared.eval_conversations if c.messages]
        chosen = evenly(chats, PROMPTS)
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
        for at in evenly(range(len(examples)), max(PROMPTS - len(asked), 0)):
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
                else own_samples(
                    loaded,
                    self.contract,
                    self.prepared.plan.seed,
                    self._shortened(PIECE_TOKENS),
                    max(self._shortened(PIECES), FEWEST_EXAMPLES),
                    self.replies,
                )
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
                f"the text of --keep-text cannot be measured: {error}",
                where=source,
                why="training continues without it",
                fix="pass a text file, or rows in any supported format, to --keep-text",
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
