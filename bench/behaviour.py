"""Runs driven into collapse on purpose, and healthy ones: which probe stops which, and when.

    python -m bench.behaviour                    all tables on the screen
    python -m bench.behaviour --only collapse    twelve ways to break a run
    python -m bench.behaviour --only files       runs over several files, one of them poisoned
    python -m bench.behaviour --only healthy     healthy runs, which must raise no warnings
    ... --rows alpaca=FILE gsm8k=FILE            more data for the healthy ones
    ... --write                                  and the tables of docs/behaviour.md

Every run trains the embedded base in the ordinary loop under the ordinary probes. A broken run
differs from a healthy one in its examples, its batches or its learning rate alone: the probes see
what is served, as `truetune train` and `truetune.HealthCallback` give it to them.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import json
import math
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.page import put

from truetune.behaviour.measure import PROMPTS, Prober, own_samples, whole
from truetune.behaviour.replies import ask
from truetune.behaviour.steps import StepFacts
from truetune.behaviour.vitals import Regime, Vitals
from truetune.behaviour.watch import Watch
from truetune.compute.batch import Limits, PaddedBatcher, RowOrder
from truetune.contract.contract import PromptContract
from truetune.contract.example import SFTExample
from truetune.data.load import load
from truetune.data.rows import file_of
from truetune.engine.trainer import SFTTrainer
from truetune.errors import Collapsed
from truetune.findings import Finding
from truetune.lab import base_path
from truetune.lab.evaluate import held_out_documents, load_instructions
from truetune.lab.reasoning import TEMPLATE, problems, rows
from truetune.lab.world import World
from truetune.model.load import LoadedModel, load_model
from truetune.model.lora import LoraSettings, add_lora

PAGE = Path(__file__).resolve().parent.parent / "docs" / "behaviour.md"
STEPS, BATCH, EVERY = 100, 8, 10
# The defaults for a model of this size: full fine-tuning, and LoRA.
FULL, LORA = 3e-4, 3e-3


@dataclass(frozen=True)
class Task:
    """Rows as they are served.

    Attributes:
        name: of the rows.
        contract: their template.
        train, held_out: examples.
        rows: the place of each trained example, where they come from several files.
    """

    name: str
    contract: PromptContract
    train: list[SFTExample]
    held_out: list[SFTExample]
    rows: tuple[str, ...] = ()


def task(name: str, chats: Sequence[Any], template: str | None, held_out: int = 24) -> Task:
    """Encode conversations, shortest rows kept short enough for the base."""
    contract = PromptContract.load(str(base_path()), template).fit(chats)
    examples = [e for chat in chats for e in contract.encode(chat) if len(e.ids) <= 512]
    return Task(name, contract, examples[held_out:], examples[:held_out])


def own_tasks() -> dict[str, Task]:
    """Tasks that the package itself holds."""
    world = World.generate()
    found = {}
    for name, reasoning, template in (("facts", False, None), ("reasoning", True, TEMPLATE)):
        made = rows(
            problems(world, num_sums=250, num_places=250, seed=0, held_out=False),
            reasoning=reasoning,
        )
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
            found[name] = task(name, load(file).conversations, template)
    found["instructions"] = task("instructions", load_instructions(), None, held_out=8)
    return found


@dataclass
class Run:
    """How one run differs from the ordinary one.

    Attributes:
        name: what is done to it.
        task: the rows as served.
        examples: what is trained; the task's own where None.
        lora: an adapter instead of all weights.
        rate: peak learning rate.
        seed: of the row order and the adapter.
        batcher: makes the batches from the examples; the loop's own where None.
        touch: changes the model before the first step.
        halfway: changes the model in the middle of the run.
        onset: step at which it is broken.
        steps, every: its length, and the steps between two measurings.
        expected: codes of the probes, any of which names it.
    """

    name: str
    task: Task
    examples: list[SFTExample] | None = None
    lora: bool = False
    rate: float = FULL
    seed: int = 0
    batcher: Callable[[list[SFTExample], int], Any] | None = None
    touch: Callable[[Any], None] | None = None
    halfway: Callable[[Any], None] | None = None
    onset: int = 0
    steps: int = STEPS
    every: int = EVERY
    expected: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Attributes:
        error: what stopped it; None where nothing did.
        step: at which it was stopped, or its last.
        findings: all that was found.
        history: its vital signs.
        falling: whether the training loss was lower in the last interval than in the first.
        seconds, probing: that the run took, and its vital signs.
    """

    error: Finding | None
    step: int
    findings: list[Finding]
    history: list[Vitals]
    falling: bool
    seconds: float
    probing: float

    @property
    def intervals(self) -> float:
        return self.step / EVERY


def drive(run: Run) -> Ended:
    """Train under the probes until one stops the run, or to the end."""
    began = time.perf_counter()
    purpose = "lora" if run.lora else "full"
    loaded: LoadedModel = load_model(str(base_path()), device="cpu", purpose=purpose)  # type: ignore[arg-type]
    if run.lora:
        loaded = add_lora(loaded, LoraSettings(), run.seed)
    if run.touch:
        run.touch(loaded.model)
    contract, good = run.task.contract, run.task.train
    questions = [ask(contract, e, f"held-out {i}") for i, e in enumerate(run.task.held_out)]
    prompts = [q for q in questions if q][:PROMPTS]
    keep = [whole(ids) for ids in own_samples(loaded, contract, run.seed)]
    prober = Prober(contract, good, prompts, keep, run.task.held_out, rows=run.task.rows)
    watch = Watch(prober, regime=Regime(guessing=math.log(len(contract.tokenizer))))
    findings: list[Finding] = []
    losses: list[float] = []

    def judged(found: list[Finding], rows: Sequence[int] = ()) -> None:
        findings.extend(found)
        worst = next((f for f in found if f.level == "error"), None)
        if worst:
            raise Collapsed(worst.what, rows=rows, why=worst.why, code=worst.code)

    def probe(facts: StepFacts) -> None:
        losses.append(facts.loss)
        judged(watch.step(facts), facts.rows)

    def take(step: int, _: float | None) -> None:
        if run.halfway and step == run.onset:
            run.halfway(trainer.model)
        judged(watch.new(watch.take(loaded, step)[1]))

    examples = good if run.examples is None else run.examples
    trainer = SFTTrainer(
        loaded.model,
        examples=examples,
        max_seq_len=max(len(e.ids) for e in examples),
        pad_id=contract.pad_id,
        batch_size=BATCH,
        max_steps=run.steps,
        max_lr=run.rate,
        warmup_steps=3,
        eval_every=run.every,
        seed=run.seed,
        batcher=run.batcher(examples, contract.pad_id) if run.batcher else None,
        probes=[probe],
        on_eval=take,
        autocast_dtype=loaded.compute_dtype,
    )
    error = None
    try:
        trainer.evaluate_now(None)
        trainer.train()
    except Collapsed as stopped:
        error = stopped.finding
    tenth = max(len(losses) // 10, 1)
    after = losses[run.onset :] or losses
    return Ended(
        error,
        trainer.step + (0 if error is None or len(losses) == trainer.step else 1),
        findings,
        watch.history,
        sum(after[-tenth:]) < sum(after[:tenth]),
        time.perf_counter() - began,
        sum(v.seconds for v in watch.history),
    )


# ------------------------------------------------------------------------- ways to break a run


def _changed(
    examples: Sequence[SFTExample], change: Callable[[SFTExample], SFTExample]
) -> list[SFTExample]:
    return [change(example) for example in examples]


def without_stop(example: SFTExample) -> SFTExample:
    """The end token is masked, as a collator does that masks every pad token."""
    mask = list(example.mask)
    mask[max(at for at, on in enumerate(mask) if on)] = 0
    return SFTExample(example.ids, mask)


def cut(example: SFTExample) -> SFTExample:
    """Only the first 40 % of the answer, without an end."""
    first = example.mask.index(1)
    end = first + max(2 * (len(example.ids) - first) // 5, 1)
    return SFTExample(example.ids[:end], example.mask[:end])


def noise(rng: random.Random, vocabulary: int) -> Callable[[SFTExample], SFTExample]:
    """Every target is some token."""

    def change(example: SFTExample) -> SFTExample:
        ids = [
            rng.randrange(vocabulary) if on else i
            for i, on in zip(example.ids, example.mask, strict=True)
        ]
        return SFTExample(ids, example.mask)

    return change


def padded(pad: int) -> Callable[[SFTExample], SFTExample]:
    """Sixty pad tokens behind the row, all of them targets."""
    return lambda e: SFTExample([*e.ids, *[pad] * 60], [*e.mask, *[1] * 60])


def with_next_turn(task: Task) -> list[SFTExample]:
    """Every answer goes on with the next question, and its answer, before it ends."""
    contract = task.contract
    header = contract.behaviour().answer_end[1]
    for stop in contract.stop_ids:
        header = header.replace(contract.tokens.decode([stop]), "")
    made = []
    for example, other in zip(task.train, [*task.train[1:], task.train[0]], strict=True):
        first = other.mask.index(1)
        question = contract.tokens.decode(other.ids[:first]).split(header.strip())[-1]
        (more,) = contract.tokens.encode([f"{header}{question.strip()}"])
        ids = [*example.ids[:-1], *more, example.ids[-1]]
        made.append(SFTExample(ids, [*example.mask[:-1], *[1] * len(more), 1]))
    return made


def other_template(task: Task, template: str, chats: Sequence[Any]) -> list[SFTExample]:
    """The same rows, rendered by a template that does not serve them."""
    contract = PromptContract.load(str(base_path()), template).fit(chats)
    return [example for chat in chats for example in contract.encode(chat)]


class Shifted(PaddedBatcher):
    """Targets shifted once too often."""

    def _collate(self, examples: Sequence[SFTExample], rows: tuple[int, ...]) -> Any:
        batch = super()._collate(examples, rows)
        return dataclasses.replace(batch, targets_BT=torch.roll(batch.targets_BT, -1, dims=1))


class Sharded(RowOrder):
    """Rows in order, not shuffled, as a stream of shards gives them."""

    def rows(self, step: int) -> list[int]:
        start = step * self.batch_size
        return [place % self.num_rows for place in range(start, start + self.batch_size)]


def shifted(examples: list[SFTExample], pad: int) -> Any:
    return _padded(Shifted, RowOrder, examples, pad)


def sharded(examples: list[SFTExample], pad: int) -> Any:
    return _padded(PaddedBatcher, Sharded, examples, pad)


def _padded(
    batcher: type[PaddedBatcher], order: type[RowOrder], examples: list[SFTExample], pad: int
) -> PaddedBatcher:
    return batcher(
        examples,
        max_seq_len=max(len(e.ids) for e in examples),
        pad_id=pad,
        order=order(len(examples), BATCH, 0),
        limits=Limits(BATCH),
    )


def to_two_bits(model: Any) -> None:
    """Every matrix rounded to four values, as a merge into too few bits leaves it: 4 bits leave
    this base whole (loss on its prose 0.750, then 0.764 nats a token; 3 bits 0.966, 2 bits 8.3)."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                scale = parameter.abs().amax(dim=1, keepdim=True)
                parameter.copy_((parameter / scale).round().clamp(-2, 1) * scale)


def frozen(model: Any) -> None:
    """The half of an adapter that starts at zero is not trained."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.requires_grad_(False)


def collapses(tasks: dict[str, Task]) -> list[Run]:
    """Twelve ways to break a run, and the probes that name each."""
    facts, thinking = tasks["facts"], tasks["reasoning"]
    rng = random.Random(0)
    vocabulary = len(facts.contract.tokenizer)
    garbage = noise(rng, vocabulary)
    onset = STEPS // 2
    half = facts.train[: onset * BATCH]
    poisoned = [*half, *_changed(half, garbage)]
    few = dataclasses.replace(facts, train=facts.train[:12])
    diverged = ("loss-diverged", "worse-than-untrained", "forgetting", "unlearned")
    again = [_messages(facts, example) for example in facts.train]
    return [
        Run("learning rate x 30", facts, rate=30 * FULL, expected=diverged),
        Run("learning rate x 100", facts, rate=100 * FULL, expected=diverged),
        Run(
            "stop token masked",
            facts,
            examples=_changed(facts.train, without_stop),
            expected=("stop-not-learned", "stops-lost"),
        ),
        Run(
            "truncated thinking",
            thinking,
            examples=_changed(thinking.train, cut),
            expected=("thinking-open", "stop-not-learned"),
        ),
        Run(
            "noise as labels",
            facts,
            examples=_changed(facts.train, garbage),
            expected=("worse-than-untrained", "forgetting"),
        ),
        Run(
            "labels shifted",
            facts,
            batcher=shifted,
            expected=("loss-not-of-answers", "worse-than-untrained"),
        ),
        Run(
            "padding as target",
            facts,
            examples=_changed(facts.train, padded(facts.contract.stop_ids[0])),
            expected=("loss-not-of-answers",),
        ),
        Run("next turn in answers", facts, examples=with_next_turn(facts), expected=("role-leak",)),
        Run(
            "one poisoned shard",
            facts,
            examples=poisoned,
            batcher=sharded,
            onset=onset,
            expected=("loss-diverged", "unlearned"),
        ),
        Run(
            "twelve rows many times",
            few,
            rate=3 * FULL,
            # Until here the twelve rows teach what the others would.
            onset=EVERY,
            expected=("memorising",),
        ),
        Run(
            "merged into 2 bits",
            facts,
            halfway=to_two_bits,
            onset=onset,
            expected=("worse-than-untrained", "unlearned", "forgetting"),
        ),
        Run("adapter frozen", facts, lora=True, rate=LORA, touch=frozen, expected=("no-gradient",)),
        Run(
            "another template",
            facts,
            examples=other_template(facts, "chatml-lite", again),
            expected=("loss-not-of-answers", "worse-than-untrained"),
        ),
    ]


def _messages(task: Task, example: SFTExample) -> list[dict[str, str]]:
    """A row of one question and one answer, read back from its example."""
    first = example.mask.index(1)
    decode = task.contract.tokens.decode
    text = task.contract.prompt_text([{"role": "user", "content": "\u0000"}])
    before, _, after = text.partition("\u0000")
    question = decode(example.ids[:first]).removeprefix(before).removesuffix(after)
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": decode(example.ids[first:-1])},
    ]


def healthy(tasks: dict[str, Task], number: int) -> list[Run]:
    """Runs as anybody starts them: methods, rates and seeds over all rows."""
    kinds = [
        ("full fine-tuning", False, FULL),
        ("LoRA", True, LORA),
        ("full fine-tuning, 1e-4", False, FULL / 3),
        ("LoRA, 1e-3", True, LORA / 3),
    ]
    found: list[Run] = []
    for seed in range(number):
        for name, each in tasks.items():
            label, lora, rate = kinds[(seed + len(found)) % len(kinds)]
            found.append(Run(f"{name}, {label}", each, lora=lora, rate=rate, seed=seed))
    return found[:number]


# --------------------------------------------------------------------------- several files

# What one file of several may be: its rows, or what is done to them.
_CYRILLIC = str.maketrans("abcdefghijklmnopqrstuvwxyz", "абцдефгхийклмнопщрстувшжыз")
Chat = list[dict[str, str]]


def _pairs(chats: Sequence[Any]) -> list[Chat]:
    """Rows of one question and one answer in words."""
    plain = [m for c in chats if len(m := getattr(c, "messages", c)) == 2]
    return [[dict(m) for m in messages] for messages in plain if messages[1]["content"]]


def _said_otherwise(chats: Sequence[Chat], change: Callable[[str], str]) -> list[Chat]:
    return [
        [question, {**answer, "content": change(answer["content"])}] for question, answer in chats
    ]


def files_of(more: Mapping[str, Sequence[Any]]) -> dict[str, list[Chat]]:
    """Rows of many kinds: of the package, as another language would be, and those of the user."""
    world = World.generate()
    made = rows(
        problems(world, num_sums=250, num_places=250, seed=0, held_out=False), reasoning=False
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
        facts = _pairs(load(file).conversations)
    prose = [
        [{"role": "user", "content": "Tell me more."}, {"role": "assistant", "content": text}]
        for text in held_out_documents(world, 120)
    ]
    foreign = [
        [{**m, "content": m["content"].lower().translate(_CYRILLIC)} for m in chat]
        for chat in facts
    ]
    return {
        "facts": facts,
        "instructions": _pairs(load_instructions()),
        "prose": prose,
        "another script": foreign,
        **{name: _pairs(chats) for name, chats in more.items()},
    }


def _shuffled(chats: Sequence[Chat], rng: random.Random) -> list[Chat]:
    answers = [chat[1] for chat in chats]
    rng.shuffle(answers)
    return [[chat[0], answer] for chat, answer in zip(chats, answers, strict=True)]


def _letters(rng: random.Random) -> Callable[[str], str]:
    return lambda text: "".join(chr(rng.randrange(33, 127)) for _ in text[:200])


POISONS: dict[str, Callable[[list[Chat], random.Random], list[Chat]]] = {
    "random characters": lambda chats, rng: _said_otherwise(chats, _letters(rng)),
    "answers in base64": lambda chats, _: _said_otherwise(
        chats, lambda text: base64.b64encode(text.encode()[:150]).decode()
    ),
    "answers of other rows": _shuffled,
}


# Tokens of the longest row of a mix: of half of GSM8K's rows, and of 200 characters of base64.
_LONGEST = 256


def mix(files: dict[str, list[Chat]], seed: int, poison: str = "") -> Run:
    """A run over two to four files, shuffled; one of them poisoned, or of random tokens."""
    rng = random.Random(f"{seed} {poison}")
    names = rng.sample(sorted(files), rng.randrange(2, 5))
    chosen = {name: list(files[name]) for name in names}
    bad = rng.choice(names) if poison else ""
    if poison in POISONS:
        chosen[bad] = POISONS[poison](chosen[bad], rng)
    contract = PromptContract.load(str(base_path())).fit([c for cs in chosen.values() for c in cs])
    made: list[tuple[str, SFTExample]] = []
    for name, chats in chosen.items():
        some = rng.sample(chats, min(len(chats), rng.randrange(60, 240)))
        examples = [e for chat in some for e in contract.encode(chat) if len(e.ids) <= _LONGEST]
        if not examples:
            raise SystemExit(f"{name}: no row of at most {_LONGEST} tokens (seed {seed}, {poison})")
        if name == bad and poison == "random tokens":
            examples = _changed(examples, noise(rng, len(contract.tokenizer)))
        made += [(f"{name}.jsonl:{at}", e) for at, e in enumerate(examples, start=1)]
    order = rng.sample(range(len(made)), len(made))
    held, kept = order[:24], sorted(order[24:])
    lora = seed % 2 == 1
    rate = (LORA if lora else FULL) / (1, 3)[seed // 2 % 2]
    title = " + ".join(sorted(names))
    where = tuple(made[at][0] for at in kept)
    named = Task(title, contract, [made[at][1] for at in kept], [made[at][1] for at in held], where)
    return Run(
        title,
        named,
        lora=lora,
        rate=rate,
        seed=seed,
        # As few measurings as a short run has.
        steps=40,
        every=20,
        expected=(bad,) if bad else (),
    )


def files_table(files: dict[str, list[Chat]], number: int) -> tuple[str, bool]:
    """Markdown, and whether random characters were named, and no whole file in a warning."""
    lines = [
        "| one file of several | runs | named | by a warning | another named | other warnings |",
        "|---|---|---|---|---|---|",
    ]
    good = True
    for poison, runs in (("", number), ("random tokens", 3), *((name, 3) for name in POISONS)):
        named = warned = wrong = above = 0
        for seed in range(runs):
            run = mix(files, seed, poison)
            ended = drive(run)
            found = [f for f in ended.findings if f.code == "file-not-learned"]
            mine = [
                f for f in found if run.expected and file_of(f.where) == f"{run.expected[0]}.jsonl"
            ]
            named += bool(mine)
            warned += any(f.level == "warning" for f in mine)
            wrong += any(f not in mine for f in found)
            others = [f for f in ended.findings if f.level != "note" and f not in mine]
            above += bool(others)
            good &= not (any(f not in mine and f.level != "note" for f in found))
            print(f"{poison or 'whole'}, seed {seed}, {run.name}: {run.expected}", flush=True)
            for finding in [*found, *others]:
                print("   ", finding.level, finding.code, finding.what[:200], flush=True)
            for vitals in (ended.history[0], ended.history[-1]):
                print("       ", dict(vitals.file_losses or {}), flush=True)
        if not poison:
            good &= not above
        if poison == "random characters":
            good &= warned == runs
        lines.append(
            f"| {poison or 'none is damaged'} | {runs} | {named} | {warned} | {wrong} | {above} |"
        )
        print(lines[-1], flush=True)
    return "\n".join(lines), good


# ------------------------------------------------------------------------------------- tables


def collapse_table(runs: Sequence[Run]) -> tuple[str, bool]:
    """Markdown, and whether every run was stopped in time by a probe that names it."""
    lines = [
        "| run | stopped by | at step | intervals after it broke | training loss | in time |",
        "|---|---|---|---|---|---|",
    ]
    all_good = True
    for run in runs:
        ended = drive(run)
        code = ended.error.code if ended.error else "nothing"
        late = (ended.step - run.onset) / EVERY
        good = code in run.expected and late <= 2
        all_good &= good
        direction = "falls" if ended.falling else "rises or stays flat"
        lines.append(
            f"| {run.name} | {code} | {ended.step} | {late:.1f} | {direction} | "
            f"{'yes' if good else '**no**'} |"
        )
        print(lines[-1], flush=True)
        if not good:
            for vitals in ended.history:
                print("   ", {k: round(v, 2) for k, v in vitals.as_dict().items()}, flush=True)
        for finding in ended.findings:
            print("   ", finding.level, finding.code, finding.what[:150], flush=True)
    return "\n".join(lines), all_good


def healthy_table(runs: Sequence[Run]) -> tuple[str, bool]:
    """Markdown, and whether none raised a warning or an error."""
    counts: dict[str, list[int]] = {}
    alarms = []
    seconds = probing = 0.0
    for run in runs:
        ended = drive(run)
        above = [f for f in ended.findings if f.level != "note"]
        row = counts.setdefault(run.name, [0, 0, 0])
        row[0] += 1
        row[1] += bool(above)
        row[2] += len(ended.findings) - len(above)
        seconds, probing = seconds + ended.seconds, probing + ended.probing
        alarms += [f"{run.name}, seed {run.seed}: {f.level} {f.code}: {f.what}" for f in above]
        notes = ", ".join(f.code for f in ended.findings)
        print(f"{run.name}, seed {run.seed}: {ended.step} steps {notes}", flush=True)
        for alarm in above:
            print("   ", alarm.level, alarm.code, alarm.what, flush=True)
            for vitals in ended.history:
                print("       ", {k: round(v, 2) for k, v in vitals.as_dict().items()}, flush=True)
    lines = ["| rows and method | runs | with a warning or an error | notes |", "|---|---|---|---|"]
    lines += [f"| {name} | {n} | {bad} | {notes} |" for name, (n, bad, notes) in counts.items()]
    total = len(runs)
    lines += [
        f"| all | {total} | {sum(c[1] for c in counts.values())} | "
        f"{sum(c[2] for c in counts.values())} |"
    ]
    print(f"vital signs took {100 * probing / seconds:.1f} % of the time")
    return "\n".join([*lines, *(f"\n* {alarm}" for alarm in alarms)]), not alarms


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", choices=("collapse", "files", "healthy"))
    parser.add_argument("--number", type=int, default=50, help="healthy runs")
    parser.add_argument("--mixes", type=int, default=24, help="healthy runs over several files")
    parser.add_argument("--rows", nargs="*", default=[], metavar="NAME=FILE")
    parser.add_argument("--match", default="", help="only runs whose name matches")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    tasks = own_tasks()
    good = True
    given = {
        name: load(file).conversations[:600]
        for name, _, file in (pair.partition("=") for pair in options.rows)
    }
    if options.only in (None, "collapse"):
        runs = [r for r in collapses(tasks) if re.search(options.match, r.name)]
        table, good = collapse_table(runs)
        if options.write:
            put(table, "<!-- collapse -->", "<!-- /collapse -->", PAGE)
    if options.only in (None, "files"):
        table, named = files_table(files_of(given), options.mixes)
        good &= named
        if options.write:
            put(table, "<!-- files -->", "<!-- /files -->", PAGE)
    if options.only in (None, "healthy"):
        more = {**tasks, **{name: task(name, chats, None) for name, chats in given.items()}}
        runs = [r for r in healthy(more, options.number) if re.search(options.match, r.name)]
        table, quiet = healthy_table(runs)
        good &= quiet
        if options.write:
            put(table, "<!-- healthy -->", "<!-- /healthy -->", PAGE)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
