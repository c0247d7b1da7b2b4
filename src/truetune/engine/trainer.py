"""The loop.

input   a model, examples (or any batcher), numbers
does    per step: fetch all micro-batches, count supervised tokens over the step, backward on
        sum / count, ask the probes, clip, step
output  history, and the facts of each step for the callbacks

One big batch and eight small ones give the same step, because the division is by the count of
the whole step.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from truetune.behaviour.steps import Probe, StepFacts, non_finite
from truetune.compute.batch import Batcher, Limits, MicroBatch, PaddedBatcher, RowOrder, TokenOrder
from truetune.compute.memory import Footprint, available_bytes, footprint, most_bytes, recomputes
from truetune.compute.packing import PackedBatcher
from truetune.compute.route import find_route, transformers_model
from truetune.contract.example import SFTExample
from truetune.engine.memory import (
    get_random_state,
    give_cached_blocks_back,
    keep_freed_pages,
    keep_gradients_apart,
    set_random_state,
)
from truetune.engine.optimizer import build_optimizer, gradient_norms, optimizer_bytes
from truetune.engine.parallel import Group
from truetune.engine.schedule import learning_rate
from truetune.errors import Collapsed, NonFiniteLoss, OutOfMemory, is_out_of_memory
from truetune.findings import Finding, counted, gib
from truetune.model.lora import enable_gradient_checkpointing
from truetune.model.mode import evaluating
from truetune.recipe.plan import Plan
from truetune.recipe.settings import Recipe
from truetune.system.lazy import torch

# Tokens per forward pass: on CPU matrix products run at full speed from about 500 rows on, and
# every further token only takes memory.
_CPU_TOKENS, _DEVICE_TOKENS = 1024, 16_384
# A tree of rows that share a beginning may be so many times larger: what it saves is worth it.
_TREE = 8
# Of the free memory, what a forward pass may take: the estimate is right within 15 %.
_ROOM = 0.85


class SFTTrainer:
    """Supervised fine-tuning of any causal model.

    Args:
        model: maps ids (B, T) to logits (B, T, V); a plain module or a Hugging Face model. Its
            parameters with `requires_grad` are trained, on the device they are on.
        examples: the training examples; their masks are used unchanged.
        max_seq_len: maximum length of an example, in tokens; at least 2.
        pad_id: id that pads short examples; never supervised.
        batch_size: examples per optimizer step; None if `settings` count tokens instead.
        max_steps: number of optimizer steps of `train`.
        max_lr, min_lr, warmup_steps: see `lr`.
        weight_decay: applied to matrices only, as usual for AdamW (not to biases and norms).
        grad_clip: maximum L2 norm of the gradient; 0 turns clipping off.
        eval_every: steps between evaluations in `train`; the last step is always evaluated.
        eval_iters: maximum number of batches per evaluation, in order; 0 for all.
        log_every: steps between entries of the history; the last step always has one.
        seed: random seed for the order of examples, and for adapter dropout in packed batches.
        settings: the rest of the recipe: how a step is split into forward passes, packing, the end
            of the data, the schedule, the optimizer. Examples are packed if a test shows that the
            model (a transformers model) supports it; any other module takes the padded reference
            path. A forward pass of packed examples has up to 1,024 tokens on CPU, where more
            would not be faster, 16,384 elsewhere, and fewer if an estimate says that they would not
            fit into free memory. A tree of examples with a shared prefix may have up to eight times
            as many, if splitting it would repeat an eighth of a forward pass or more. If the
            longest example would not fit, activations are recomputed, which is reported.
        autocast_dtype: dtype for autocast; None computes in the dtype of the parameters.
        batcher: replaces the padded reference batcher; only for a single process.
        group: the processes that train together; each takes its share of the examples of a step.
        probes: called before each optimizer step; a finding of level error stops training.
        on_step: called after each step with its facts.
        on_eval: called at each evaluation with the step and the loss of the held-out examples (None
            if there are none).
        on_finding: called with the findings of probes that are not errors.
        others: settings by name, which override those in `settings`.

    Raises:
        ValueError: there are no examples, batch_size < 1, micro_batch_size < 1, max_seq_len < 2, no
            parameter requires a gradient, an unknown optimizer or schedule, epochs that end before
            max_steps, or not exactly one of batch_size and tokens_per_step.
        TypeError: there is no such setting.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        examples: Sequence[SFTExample],
        max_seq_len: int,
        pad_id: int,
        max_steps: int,
        max_lr: float,
        batch_size: int | None = None,
        min_lr: float = 0.0,
        warmup_steps: int = 0,
        weight_decay: float = 0.0,
        grad_clip: float = 1.0,
        eval_every: int = 100,
        eval_iters: int = 20,
        log_every: int = 1,
        seed: int = 0,
        settings: Recipe | None = None,
        autocast_dtype: torch.dtype | None = None,
        batcher: Batcher | None = None,
        group: Group | None = None,
        probes: Sequence[Probe] = (non_finite,),
        on_step: Callable[[StepFacts], None] | None = None,
        on_eval: Callable[[int, float | None], None] | None = None,
        on_finding: Callable[[Finding], None] | None = None,
        **others: Any,
    ) -> None:
        settings = replace(settings or Recipe(), **others)
        tokens_per_step, micro_batch_size = settings.tokens_per_step, settings.micro_batch_size
        if not examples:
            raise ValueError("SFTTrainer needs at least one example")
        if (batch_size is None) == (tokens_per_step is None):
            raise ValueError("give batch_size or tokens_per_step")
        for name, value in (("batch_size", batch_size), ("tokens_per_step", tokens_per_step)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if max_seq_len < 2:
            raise ValueError(f"max_seq_len must be at least 2, got {max_seq_len}")
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ValueError(f"micro_batch_size must be at least 1, got {micro_batch_size}")
        self.model, self.group = model, group or Group()
        self.step = 0
        self._alike = False
        # Of a step that was packed ahead: its number and its micro-batches.
        self._ahead: tuple[int, Sequence[MicroBatch]] = (-1, ())
        self.max_steps, self.batch_size = max_steps, batch_size
        self.max_lr, self.min_lr, self.warmup_steps = max_lr, min_lr, warmup_steps
        self.settings = settings
        self.grad_clip = grad_clip
        self.eval_every, self.eval_iters, self.log_every = eval_every, eval_iters, log_every
        self.autocast_dtype = autocast_dtype
        self.probes = tuple(probes)
        self.on_step, self.on_eval, self.on_finding = on_step, on_eval, on_finding
        self.stop_requested = False
        # In an evaluation of `train`: nothing changes, so it may be broken off anywhere.
        self.evaluating = False
        self.named_trainable = [
            (name, p) for name, p in model.named_parameters() if p.requires_grad
        ]
        if not self.named_trainable:
            raise ValueError("no parameter of the model requires a gradient: nothing to train")
        if batcher is not None and self.group.size > 1:
            raise ValueError("a custom batcher cannot distribute rows to several processes")
        self.device = self.named_trainable[0][1].device
        if self.device.type == "cpu":
            keep_freed_pages()
        self.route = find_route(
            model, longest=max_seq_len, packing=settings.packing, autocast=self._autocast
        )
        self.route.seed = seed
        if batcher is None:
            epochs = settings.epochs
            order = _order(examples, batch_size, tokens_per_step, seed, epochs)
            if order.num_steps is not None and order.num_steps < max_steps:
                raise ValueError(
                    f"epochs={epochs} ends after {order.num_steps} steps, but max_steps is "
                    f"{max_steps}"
                )
            most = micro_batch_size or batch_size or len(examples)
            rows = 1 if self.route.kind == "apart" else most
            self._longest = min(max_seq_len, max(len(example.ids) for example in examples))
            limits = self._limits(rows, self._longest)
            common: dict[str, Any] = {
                "max_seq_len": max_seq_len,
                "order": order,
                "limits": limits,
                "share": (self.group.rank, self.group.size),
            }
            if self.route.kind == "padded":
                batcher = PaddedBatcher(examples, pad_id=pad_id, **common)
            else:
                batcher = PackedBatcher(examples, **common)
        self.batcher: Batcher = batcher
        for finding in self.route.findings():
            if on_finding:
                on_finding(finding)
        if self.device.type == "cpu" and recomputes(model):
            # The model outlives the trainer, and may be used by another one.
            end = keep_gradients_apart([p for _, p in self.named_trainable])
            weakref.finalize(self, end)
        self.optimizer = build_optimizer(
            settings, self.named_trainable, lr=self.lr(0), weight_decay=weight_decay
        )

    @classmethod
    def of_plan(cls, model: torch.nn.Module, plan: Plan, **others: Any) -> SFTTrainer:
        """Build the trainer of a run from its plan.

        Args:
            others: arguments of the constructor that override the plan's.
        """
        same = ("batch_size", "max_steps", "warmup_steps", "weight_decay", "seed")
        numbers = {name: getattr(plan, name) for name in same}
        numbers |= {
            "max_seq_len": max(plan.max_length, 2),
            "max_lr": plan.learning_rate,
            "grad_clip": plan.max_grad_norm,
            "eval_every": plan.eval_steps,
            "log_every": plan.logging_steps,
        }
        return cls(model, settings=plan, **(numbers | others))

    @cached_property
    def footprint(self) -> Footprint:
        """Memory that a micro-batch takes, measured when it is first asked for."""
        return footprint(self.route, self._autocast, longest=self._longest)

    @property
    def limits(self) -> Limits | None:
        """Current limits of a micro-batch; None if a custom batcher has none."""
        return getattr(self.batcher, "limits", None)

    def _limits(self, rows: int, longest: int) -> Limits:
        """Of a micro-batch: as asked, or what is fast and fits. Where the longest row would not
        fit, activations are computed twice from here on."""
        tokens = self.settings.micro_batch_tokens
        if tokens or self.route.kind == "padded":
            return Limits(rows, tokens)
        usual = _CPU_TOKENS if self.device.type == "cpu" else _DEVICE_TOKENS
        room = available_bytes(self.device)
        if not room:
            return Limits(rows, usual, usual)
        moments = optimizer_bytes(self.settings.optim, [p for _, p in self.named_trainable])
        free = int(_ROOM * room) - moments
        # No forward pass is larger than a whole step: where that surely fits, nothing is measured.
        if most_bytes(self.route, min(_TREE * usual, rows * longest), longest) <= free:
            return Limits(rows, usual, _TREE * usual)
        try:
            too_much = self.footprint.of(longest) > free
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            give_cached_blocks_back(self.device)
            return Limits(rows, usual, usual)  # the first step tells it, with its row
        if too_much and self._recompute(longest):
            del self.footprint
        fitting = self.footprint.fitting(free)
        return Limits(rows, min(usual, fitting), min(_TREE * usual, fitting))

    def _recompute(self, longest: int) -> bool:
        """Switch to computing activations twice; False where that is on, or cannot be."""
        inner = transformers_model(self.model)
        if not getattr(inner, "supports_gradient_checkpointing", False) or recomputes(inner):
            return False
        enable_gradient_checkpointing(self.model)
        if self.on_finding:
            self.on_finding(
                Finding(
                    "activations-recomputed",
                    "note",
                    f"activations are recomputed in the backward pass: an example of {longest:,} "
                    "tokens would need "
                    f"{gib(self.footprint.of(longest))} at once, more than is free",
                    why="this is an estimate of the memory for a forward and a backward pass",
                    fix="nothing to do: the results are the same, but a step takes about a third "
                    "longer; a lower --max-length, or --lora, avoids it",
                )
            )
        return True

    def lr(self, step: int | None = None) -> float:
        """Return the learning rate of a step, counted from 0; None means the next step.

        It is max_lr * (step + 1) / warmup_steps during warm-up, then falls to min_lr at max_steps.
        """
        return learning_rate(
            self.step if step is None else step,
            max_lr=self.max_lr,
            min_lr=self.min_lr,
            warmup_steps=self.warmup_steps,
            max_steps=self.max_steps,
            kind=self.settings.lr_scheduler_type,
        )

    def train_step(self) -> dict[str, float]:
        """Take one optimizer step.

        Returns:
            loss (nats per supervised token, over the whole step), lr, grad_norm (before clipping).

        Raises:
            NonFiniteLoss: loss or gradient is NaN or infinite; weights and optimizer are unchanged,
                and `.rows` lists the examples of the step.
            Collapsed: another probe found an error; weights and optimizer are unchanged.
        """
        facts = self._step()
        return {"loss": facts.loss, "lr": facts.learning_rate, "grad_norm": facts.grad_norm}

    def _step(self) -> StepFacts:
        started = time.perf_counter()
        if not self._alike:
            self.group.same_start_([p for _, p in self.named_trainable])
            self._alike = True
        lr = self.lr()
        summed, (rows, num_tokens, num_supervised) = self._fetch_and_backward()
        loss, grad_norm = self._clip(summed)

        def facts(seconds: float) -> StepFacts:
            return StepFacts(
                self.step + 1, loss, lr, grad_norm, num_tokens, num_supervised, seconds, rows
            )

        self._ask_probes(facts(0.0))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        done = facts(time.perf_counter() - started)
        self.step += 1
        if self.on_step:
            self.on_step(done)
        return done

    def _fetch_and_backward(self) -> tuple[torch.Tensor, tuple[tuple[int, ...], int, int]]:
        """This process's part of the step's loss, where the model is; rows, tokens and supervised
        tokens of all processes; gradients in place; on limits that memory allows."""
        step, batches = self._ahead
        if step != self.step:
            batches = self.batcher.micro_batches(self.step)
        counted = self._counted(batches)
        while True:
            # A second try draws the same dropout as a run that had these limits from the start.
            random_state = get_random_state()
            try:
                loss = self._backward(batches, counted[2])
                break
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                # The exception's frames hold activations that must be freed.
                failed = error.with_traceback(None)
            self.optimizer.zero_grad(set_to_none=True)
            set_random_state(random_state)
            give_cached_blocks_back(self.device)
            self._lower_limits(failed)
            batches = self.batcher.micro_batches(self.step)
        self.group.sum_gradients([p for _, p in self.named_trainable])
        if self.step + 1 < self.max_steps:
            # A device has this step's work now, and computes while the host packs the next one.
            self._ahead = self.step + 1, self.batcher.micro_batches(self.step + 1)
        return loss, counted

    def _counted(self, batches: Sequence[MicroBatch]) -> tuple[tuple[int, ...], int, int]:
        """Rows, tokens and supervised tokens of a step, over all processes."""
        own = (
            tuple(row for batch in batches for row in batch.rows),
            sum(batch.num_tokens for batch in batches),
            sum(batch.num_supervised for batch in batches),
        )
        rows, tokens, supervised = zip(*self.group.gather(own), strict=True)
        return tuple(row for taken in rows for row in taken), sum(tokens), sum(supervised)

    def _lower_limits(self, error: BaseException) -> None:
        """Halve the micro-batch and keep the batch size.

        Raises:
            OutOfMemory: a single row does not fit.
        """
        batch = self._current
        limits = self.limits
        if limits is None or not limits.halve(batch):
            raise OutOfMemory(
                f"an example of {batch.num_computed:,} tokens does not fit in memory",
                where="rows " + ", ".join(map(str, batch.rows)),
                why="its activations alone need more memory than is free",
                fix="use --gradient-checkpointing, a lower --max-length, or --lora",
                rows=batch.rows,
                code="row-too-large",
            ) from error
        if self.on_finding:
            self.on_finding(
                Finding(
                    "out-of-memory",
                    "warning",
                    f"{counted(len(batch.rows), 'example')} with {batch.num_computed:,} tokens did "
                    f"not fit in memory at once: from step {self.step + 1} on, at most "
                    f"{counted(limits.rows, 'example')}"
                    + (f", {limits.tokens:,} tokens" if limits.tokens else ""),
                    why="the batch size is unchanged; a batch is split into more forward passes",
                    fix=f"nothing to do: training continues; to avoid the failed attempt, use "
                    f"--micro-batch-size {limits.rows} or --gradient-checkpointing from the start",
                )
            )

    def _backward(self, batches: Sequence[MicroBatch], num_supervised: int) -> torch.Tensor:
        self.model.train()
        # Gradients of a backward pass outside the loop, or of a step that broke off, are no part
        # of this one.
        self.optimizer.zero_grad(set_to_none=True)
        # Without targets, divide by 1, so that loss and gradients are 0 and not NaN.
        num_supervised = max(num_supervised, 1)
        total = self._zero()
        self.route.step = self.step
        for batch in batches:
            self._current = batch
            moved = batch.to(self.device)
            with self.route.scope(moved):
                with self._autocast():
                    loss = self.route.loss_sum(moved) / num_supervised
                loss.backward()
            total += loss.detach()
        return total

    def _zero(self) -> torch.Tensor:
        """Where losses are added up: on the device, which nobody waits for, as wide as it has."""
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        return torch.zeros((), dtype=wide, device=self.device)

    def _clip(self, summed: torch.Tensor) -> tuple[float, float]:
        """The step's loss, and the norm of its gradient before clipping, in float32: the one time
        in a step that the host waits for the device.

        Args:
            summed: this process's part of the loss.
        """
        parameters = [p for _, p in self.named_trainable if p.grad is not None]
        grads = [p.grad for p in parameters if p.grad is not None]
        norms = gradient_norms(grads) if grads else [torch.zeros((), device=self.device)]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        loss, grad_norm = torch.stack([summed, norm.to(summed.dtype)]).tolist()
        # Below the limit torch would multiply by 1: a pass over all gradients for nothing. A norm
        # of NaN is not below.
        if self.grad_clip and not grad_norm + 1e-6 <= self.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.grad_clip, norm)
        return self.group.sum_numbers(loss)[0], grad_norm

    def _ask_probes(self, facts: StepFacts) -> None:
        for probe in self.probes:
            finding = probe(facts)
            if finding is None:
                continue
            if finding.level == "error":
                self.optimizer.zero_grad(set_to_none=True)
                kind = NonFiniteLoss if finding.code == NonFiniteLoss.default_code else Collapsed
                raise kind(
                    finding.what,
                    rows=facts.rows,
                    where=finding.where,
                    why=finding.why,
                    fix=finding.fix,
                    code=finding.code,
                )
            if self.on_finding:
                self.on_finding(finding)

    def evaluate(self, examples: Sequence[SFTExample]) -> float:
        """Return the mean loss in nats per supervised token, over at most `eval_iters` batches.

        Raises:
            ValueError: no examples.
        """
        if not examples:
            raise ValueError("evaluate needs at least one example")
        summed, count = self._zero(), 0.0
        with evaluating(self.model), self._autocast():
            for number, batch in enumerate(self.batcher.batches(examples)):
                if self.eval_iters and number >= self.eval_iters:
                    break
                if number % self.group.size != self.group.rank:
                    continue
                moved = batch.to(self.device)
                with self.route.scope(moved):
                    summed += self.route.loss_sum(moved)
                count += batch.num_supervised
        total, count = self.group.sum_numbers(summed.item(), count)
        return total / count if count else 0.0

    def train(self, eval_examples: Sequence[SFTExample] | None = None) -> dict[str, list[Any]]:
        """Train up to max_steps, or until `stop_requested` is set.

        Returns:
            step, train_loss, lr, grad_norm: one entry every log_every steps;
            val_step, val_loss: one entry per evaluation.
        """
        history: dict[str, list[Any]] = {
            key: [] for key in ("step", "train_loss", "lr", "grad_norm", "val_step", "val_loss")
        }
        while self.step < self.max_steps and not self.group.any(self.stop_requested):
            facts = self._step()
            last = self.step == self.max_steps
            if last or (self.log_every and self.step % self.log_every == 0):
                history["step"].append(self.step)
                history["train_loss"].append(facts.loss)
                history["lr"].append(facts.learning_rate)
                history["grad_norm"].append(facts.grad_norm)
            if last or (self.eval_every and self.step % self.eval_every == 0):
                loss = self.evaluate_now(eval_examples)
                if loss is not None:
                    history["val_step"].append(self.step)
                    history["val_loss"].append(loss)
        return history

    def evaluate_now(self, examples: Sequence[SFTExample] | None) -> float | None:
        """Evaluate the held-out examples, as `train` does, and pass the loss to `on_eval`.

        Returns:
            None if there are no examples.
        """
        self.evaluating = True
        try:
            loss = self.evaluate(examples) if examples else None
            if self.on_eval:
                self.on_eval(self.step, loss)
            return loss
        finally:
            self.evaluating = False

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)


def _order(
    examples: Sequence[SFTExample],
    batch_size: int | None,
    tokens_per_step: int | None,
    seed: int,
    epochs: float | None,
) -> RowOrder | TokenOrder:
    """Which rows a step trains."""
    if tokens_per_step is None:
        assert batch_size is not None
        return RowOrder(len(examples), batch_size, seed, epochs)
    return TokenOrder([len(e.ids) for e in examples], tokens_per_step, seed, epochs)
