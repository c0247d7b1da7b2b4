"""`truetune.HealthCallback`: truetune's probes during training with another library's trainer.

    trainer.add_callback(truetune.HealthCallback())

input   a transformers or TRL Trainer, through its callbacks
does    takes prompts and examples from its own batches (or from rows, as they are served), measures
        at step 0 and at intervals, and judges; random states and modes are left as they were, so
        that losses are the same with and without it
output  findings in the log, health.jsonl in the output folder; a run that collapses is stopped
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from transformers import TrainerCallback

from truetune.auditing.read import IGNORED, ReadRow, read_batches
from truetune.auditing.state import untouched
from truetune.auditing.subject import parts_of_loader
from truetune.behaviour.measure import PROMPTS, Prober, own_samples, text_pieces, whole
from truetune.behaviour.replies import Asked, ask
from truetune.behaviour.schedule import is_due
from truetune.behaviour.steps import StepFacts, usual_probes
from truetune.behaviour.watch import Watch, not_taken
from truetune.contract.contract import PromptContract
from truetune.contract.encoder import Refused
from truetune.contract.example import SFTExample
from truetune.contract.stops import listed_stop_ids
from truetune.data.conversation import Conversation
from truetune.data.load import load
from truetune.data.rows import evenly
from truetune.errors import TruetuneError, UsageError
from truetune.findings import Finding, visible
from truetune.model.load import LoadedModel
from truetune.system.lazy import torch

_LOG = logging.getLogger("truetune")
# Rows that are read from the trainer's own batches.
_ROWS = 64
# Measurings of a run at most, if nobody says how many.
_TIMES = 10
HEALTH = "health.jsonl"


class HealthCallback(TrainerCallback):
    """Monitor the vital signs of a transformers or TRL Trainer's run.

    Args:
        data: rows as they are served: a file, a folder or a list of conversations (each a list of
            message dicts). With them, the probes check whether what is trained is what is served.
            By default, prompts and answers come from the trainer's own batches and labels.
        every: optimizer steps between measurements; by default, at most ten times in a run, and
            only as often as 3 % of its time allows.
        keep_text: a file with text that the model must not forget; by default, text that the model
            writes before the first step.
        on_collapse: "stop" ends the run, "continue" only reports the collapse.
        seed: random seed for the text that the model writes.

    Attributes:
        findings: all findings so far, in order.
        history: the vital signs so far; see `truetune.behaviour.vitals.Vitals`.

    Raises:
        UsageError: an argument is invalid.
    """

    def __init__(
        self,
        data: str | Path | Sequence[Sequence[Mapping[str, Any]]] | None = None,
        *,
        every: int | None = None,
        keep_text: str | Path | None = None,
        on_collapse: Literal["stop", "continue"] = "stop",
        seed: int = 42,
    ) -> None:
        if on_collapse not in ("stop", "continue"):
            raise UsageError(
                f"on_collapse cannot be {on_collapse!r}",
                fix='use "stop" or "continue": only `truetune train` can return to a checkpoint',
                code="health-setting",
            )
        if every is not None and every < 1:
            raise UsageError(
                f"`every` is {every}, but it must be at least 1", code="health-setting"
            )
        self.data, self.every, self.on_collapse, self.seed = data, every, on_collapse, seed
        self.keep_text = keep_text
        self.findings: list[Finding] = []
        self._watch: Watch | None = None
        self._file: Path | None = None
        self._measured: set[int] = set()
        # Seconds of each measuring, and when training began.
        self._costs: list[float] = []
        self._since = 0.0

    @property
    def history(self) -> list[Any]:
        """The vital signs so far; empty before training begins."""
        return self._watch.history if self._watch else []

    # ------------------------------------------------------------------- what the trainer calls

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if not state.is_world_process_zero:
            return
        if _is_sharded(args):
            self._found(
                Finding(
                    "health-sharded",
                    "note",
                    "the weights are sharded over processes: replies and losses are not measured; "
                    "only the numbers that the trainer logs are checked",
                    fix="evaluate the saved model with `truetune eval`",
                )
            )
            self._watch = Watch(Prober(self._contract(given), [], []))
            return
        self._file = Path(args.output_dir) / HEALTH
        self._since = time.perf_counter()
        model, loader = given["model"], given.get("train_dataloader")
        with untouched(parts_of_loader(loader) if loader is not None else []):
            try:
                self._watch = self._begun(args, given, self._loaded(args, model, given))
            except TruetuneError as error:
                self._found(error.finding)
                return
        self._measure(args, state, control, given, self._since)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **given: Any) -> None:
        if self._watch is None or not logs or "loss" not in logs:
            return
        facts = StepFacts(
            int(state.global_step),
            float(logs["loss"]),
            float(logs.get("learning_rate", 0.0)),
            # A trainer that logs no norm says nothing about it.
            float(logs.get("grad_norm", 1.0)),
            0,
            1,
            0.0,
            (),
        )
        self._judged(self._watch.step(facts), control)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        every = self.every or max(math.ceil(state.max_steps / _TIMES), 1)
        if state.global_step % every == 0 and (self.every or self._is_due(state, every)):
            self._measure(args, state, control, given)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._measure(args, state, control, given)

    # --------------------------------------------------------------------------------- its work

    def _is_due(self, state: Any, every: int) -> bool:
        step = int(state.global_step)
        trained = time.perf_counter() - self._since - sum(self._costs)
        return is_due(
            step // every,
            math.ceil(state.max_steps / every),
            max(self._measured, default=0) // every,
            self._costs,
            trained / step * state.max_steps,
        )

    def _measure(
        self,
        args: Any,
        state: Any,
        control: Any,
        given: Mapping[str, Any],
        began: float | None = None,
    ) -> None:
        """Measure the vital signs, at most once per step.

        Args:
            began: time at which choosing the prompts began; None means now.
        """
        step = int(state.global_step)
        if self._file is None or self._watch is None or step in self._measured:
            return
        began = time.perf_counter() if began is None else began
        self._measured.add(step)
        try:
            with untouched([]):
                measured, findings = self._watch.take(
                    self._loaded(args, given["model"], given), step
                )
        except Exception as error:  # whatever a model raises that answers: training goes on
            self._found(not_taken(step, error))
            return
        finally:
            self._costs.append(time.perf_counter() - began)
        self._write({**measured.vitals.as_dict(), "samples": measured.samples})
        self._judged(self._watch.new(findings), control)

    def _judged(self, findings: Sequence[Finding], control: Any) -> None:
        for finding in findings:
            self._found(finding)
            if finding.level == "error" and self.on_collapse == "stop":
                control.should_training_stop = True

    def _found(self, finding: Finding) -> None:
        self.findings.append(finding)
        level = {"error": logging.ERROR, "warning": logging.WARNING}.get(
            finding.level, logging.INFO
        )
        _LOG.log(level, "%s", visible("\n".join(finding.lines())))
        self._write({"finding": finding.as_dict()})

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with open(self._file, "a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
        except OSError as error:
            _LOG.warning("%s cannot be written: %s", self._file, error.strerror)
            self._file = None

    # ------------------------------------------------------------------------- how it begins

    def _contract(self, given: Mapping[str, Any]) -> PromptContract:
        tokenizer = given.get("processing_class") or given.get("tokenizer")
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        if tokenizer is None:
            raise UsageError(
                "the trainer has no tokenizer",
                fix="pass the tokenizer to the trainer as its processing_class",
                code="health-no-tokenizer",
            )
        model = given.get("model")
        stops = listed_stop_ids(getattr(model, "generation_config", None)) or ()
        return PromptContract.load(tokenizer, stop=list(stops) or None)

    def _begun(self, args: Any, given: Mapping[str, Any], loaded: LoadedModel) -> Watch:
        contract = self._contract(given)
        if self.data is not None:
            contract, examples, questions = self._of_rows(contract)
        else:
            examples, questions = self._of_batches(contract, given.get("train_dataloader"))
        if not questions:
            self._found(
                Finding(
                    "no-prompts",
                    "note",
                    "no prompt could be separated from an answer: replies are not measured",
                    why="every token is a target, or no tokens precede the first target",
                    fix="pass rows: truetune.HealthCallback(ROWS) generates replies to their "
                    "prompts, as served",
                )
            )
        rows = args.train_batch_size * args.gradient_accumulation_steps * max(args.world_size, 1)
        every = max(int(getattr(args, "logging_steps", 1)), 1)
        keep = [whole(ids) for ids in self._kept(loaded, contract)]
        return Watch(
            Prober(contract, examples, questions, keep), usual_probes(rows_per_step=rows * every)
        )

    def _of_rows(
        self, contract: PromptContract
    ) -> tuple[PromptContract, list[SFTExample], list[Asked]]:
        """Return the contract that fits the rows, and their examples and prompts as served."""
        if isinstance(self.data, (str, Path)):
            chats = [c for c in load(self.data).conversations if c.messages]
        else:
            chats = [
                Conversation(tuple(dict(message) for message in chat), f"data[{at}]")
                for at, chat in enumerate(self.data or ())
            ]
        contract = contract.fit(chats)
        chosen = evenly(chats, _ROWS)
        examples = [
            example
            for result in contract.encode_all(chosen)
            if not isinstance(result, Refused)
            for example in result.examples
        ]
        return contract, examples, _questions(contract, examples, "row")

    def _of_batches(
        self, contract: PromptContract, loader: Any
    ) -> tuple[list[SFTExample], list[Asked]]:
        """Return examples as labelled by the trainer, and the prompts that its labels mask."""
        if loader is None:
            return [], []
        reading = read_batches(
            loader,
            name="train_dataset",
            pad_id=contract.tokenizer.pad_token_id,
            max_rows=_ROWS,
            ends=contract.stop_ids,
        )
        examples = [example for row in reading.rows for example in _documents(row)]
        return examples, _questions(contract, examples, "train_dataset")

    def _kept(self, loaded: LoadedModel, contract: PromptContract) -> list[list[int]]:
        if self.keep_text is None:
            return own_samples(loaded, contract, self.seed)
        return text_pieces(contract, load(self.keep_text).conversations)

    def _loaded(self, args: Any, model: Any, given: Mapping[str, Any]) -> LoadedModel:
        dtype = None
        if getattr(args, "bf16", False) or getattr(args, "fp16", False):
            dtype = torch.bfloat16 if args.bf16 else torch.float16
        return LoadedModel(
            model=model,
            tokenizer=given.get("processing_class"),
            source="the trainer's model",
            revision=None,
            base="",
            base_revision=None,
            base_dtype="",
            is_adapter=hasattr(model, "peft_config") and hasattr(model, "get_base_model"),
            device=next(model.parameters()).device,
            compute_dtype=dtype,
            choices=(),
        )


def _questions(contract: PromptContract, examples: Sequence[SFTExample], name: str) -> list[Asked]:
    asked = (ask(contract, e, f"{name} {at}") for at, e in enumerate(examples))
    found = [one for one in asked if one is not None]
    return list(evenly(found, PROMPTS))


def _documents(row: ReadRow) -> Iterator[SFTExample]:
    """The documents of a row as examples; a packed row holds several."""
    for number in range(1, int(row.real.max(initial=0)) + 1):
        mine = row.real == number
        ids, labels = row.ids[mine].tolist(), row.labels[mine].tolist()
        if len(ids) > 1:
            # The first token of a document has nothing before it that could predict it.
            yield SFTExample(ids, [0] + [int(label != IGNORED) for label in labels[1:]])


def _is_sharded(args: Any) -> bool:
    return bool(getattr(args, "fsdp", None)) or bool(getattr(args, "deepspeed", None))
