"""Pretrain the embedded base: a seed and a size -> a model folder.

World, prose, tokenizer, blocks of tokens, and a small Llama, trained by the product's own trainer
with every token supervised: first on the plain course, then on the rich one; in each first on short
examples, at the end on long ones. The folder holds weights in bf16, config, tokenizer, the training
log, and a model card with what was measured.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truetune.lab import BASE_SEED
from truetune.lab.building.card import finish
from truetune.lab.building.prose import documents
from truetune.lab.building.tokenizer import train_tokenizer
from truetune.lab.world import World
from truetune.run_dir import RunDir

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM

    from truetune.compute.batch import Batch
    from truetune.contract.example import SFTExample
    from truetune.engine.trainer import SFTTrainer

# Rows of embedding and head. Rows from 2,032 on belong to no token: room for new ones.
HEAD_ROWS = 2048

# Documents of the plain course that the tokenizer is made from.
TOKENIZER_DOCUMENTS = 4000


@dataclass(frozen=True)
class BaseShape:
    """Size of the model: head size 64 and multiples of 256, so that quantisers and servers fit."""

    hidden_size: int = 256
    intermediate_size: int = 768
    num_layers: int = 6
    num_heads: int = 4
    num_kv_heads: int = 2
    context: int = 1024


@dataclass(frozen=True)
class Course:
    """One corpus and the training on it, with an optimizer and a schedule of its own.

    Attributes:
        corpus: plain or rich, see `prose.py`.
        tokens: tokens of the corpus, each seen once.
        stages: (tokens per example, share of the steps) in order. In short ones there is little
            to attend to but what matters, so that taking names up again and recalling facts are
            learned in a fraction of the steps; the last stage trains every position of the context.
        lr: peak learning rate; cosine down to a tenth of it.
    """

    corpus: str
    tokens: int
    stages: tuple[tuple[int, float], ...]
    lr: float


@dataclass(frozen=True)
class Settings:
    """Everything a run depends on besides the code. The defaults, compiled, made the shipped base.

    Attributes:
        seed: of the world, the corpus, the first weights and the order of blocks.
        courses: in order; each begins with the weights that the one before saved, in bf16.
        step_tokens: tokens per step, at any length of the examples.
        warmup: share of the steps of a course.
        autocast: compute in bf16; weights and optimizer stay fp32.
        compile: through torch.compile: about a fifth faster on CPU, where it needs a C++ compiler.
    """

    seed: int = BASE_SEED
    courses: tuple[Course, ...] = (
        Course("plain", 8_400_000, ((128, 0.85), (1024, 0.15)), 2e-3),
        Course("rich", 8_000_000, ((128, 0.85), (1024, 0.15)), 1.2e-3),
    )
    step_tokens: int = 4096
    warmup: float = 0.03
    weight_decay: float = 0.05
    grad_clip: float = 1.0
    autocast: bool = True
    compile: bool = False
    device: str = "cpu"
    shape: BaseShape = BaseShape()

    def num_steps(self, course: Course) -> int:
        """Optimizer steps of a course; the tokens left after the last step are not used."""
        return course.tokens // self.step_tokens

    @property
    def tokens(self) -> int:
        """Training tokens of all courses."""
        return sum(map(self.num_steps, self.courses)) * self.step_tokens

    def of_size(self, tokens: int) -> Settings:
        """The same settings with a number of tokens, divided among the courses in proportion."""
        share = tokens / self.tokens
        courses = tuple(replace(c, tokens=int(c.tokens * share)) for c in self.courses)
        return replace(self, courses=courses)


def pretrain(
    out: str | Path,
    run: Settings,
    *,
    log_every: int = 50,
    save_every: int | None = None,
    num_recall_items: int | None = None,
    on_progress: Callable[[dict[str, Any]], None] = lambda _: None,
) -> Path:
    """Train a base from nothing and write its folder.

    Args:
        out: the folder; new or empty, and locked while it is written. `out/checkpoint` holds the
            last intermediate save.
        log_every: steps between lines of training_log.jsonl.
        save_every: steps between intermediate saves; None for none.
        num_recall_items: sentences asked for the model card; all where None.
        on_progress: called with each line of the log: corpus, step of its course, tokens of all
            courses, mean loss since the line before, lr, elapsed seconds.

    Raises:
        OutputExists: the folder is not empty; nothing was changed.
        Busy: another process writes it.
    """
    run_dir = RunDir(out)
    with run_dir.writing(run_dir.require_empty):
        _build(run_dir, run, log_every, save_every, on_progress)
        run_dir.require_mine()
        finish(run_dir.path, num_recall_items)
    return run_dir.path


def _build(
    run_dir: RunDir,
    run: Settings,
    log_every: int,
    save_every: int | None,
    on_progress: Callable[[dict[str, Any]], None],
) -> None:
    """Everything but the card."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    folder = run_dir.path
    world = World.generate(run.seed)
    train_tokenizer(islice(_texts(world, "plain"), TOKENIZER_DOCUMENTS), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    torch.manual_seed(run.seed)
    model = LlamaForCausalLM(llama_config(run.shape)).to(run.device)
    if run.compile:
        model.compile()
    began = time.perf_counter()
    tokens_before = 0
    with (folder / "training_log.jsonl").open("w", encoding="utf-8") as log:
        for course in run.courses:
            ids = corpus_ids(world, tokenizer, course.corpus)
            batcher = StagedBatcher(course, run, ids, tokenizer.pad_token_id)
            losses = list[float]()
            trainer = _trainer(course, run, model, batcher, tokenizer.pad_token_id)
            for step in range(1, batcher.num_steps + 1):
                facts = trainer.train_step()
                losses.append(facts["loss"])
                if step == 1 or step % log_every == 0 or step == batcher.num_steps:
                    line = {
                        "corpus": course.corpus,
                        "step": step,
                        "tokens": tokens_before + step * run.step_tokens,
                        "loss": round(sum(losses) / len(losses), 4),
                        "lr": facts["lr"],
                        "elapsed": round(time.perf_counter() - began, 1),
                    }
                    log.write(json.dumps(line) + "\n")
                    log.flush()
                    on_progress(line)
                    losses.clear()
                if save_every and step % save_every == 0:
                    run_dir.require_mine()
                    save_base(model, tokenizer, folder / "checkpoint")
            tokens_before += batcher.num_steps * run.step_tokens
            # As a saved base is read back: a course can be taken from any saved base.
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(parameter.to(torch.bfloat16))
    save_base(model, tokenizer, folder)
    (folder / "pretraining.json").write_text(json.dumps(asdict(run), indent=2) + "\n")


def _trainer(
    course: Course, run: Settings, model: LlamaForCausalLM, batcher: StagedBatcher, pad_id: int
) -> SFTTrainer:
    import torch

    from truetune.engine.trainer import SFTTrainer

    return SFTTrainer(
        model,
        examples=batcher.examples,
        max_seq_len=batcher.max_seq_len,
        pad_id=pad_id,
        batch_size=batcher.batch_size,
        max_steps=batcher.num_steps,
        max_lr=course.lr,
        min_lr=course.lr / 10,
        warmup_steps=max(1, round(run.warmup * batcher.num_steps)),
        weight_decay=run.weight_decay,
        grad_clip=run.grad_clip,
        autocast_dtype=torch.bfloat16 if run.autocast else None,
        batcher=batcher,
        packing=False,  # full examples of one length: there is no padding to save
    )


def llama_config(shape: BaseShape) -> LlamaConfig:
    """The architecture of the base."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=HEAD_ROWS,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.hidden_size // shape.num_heads,
        max_position_embeddings=shape.context,
        # 1/sqrt(hidden): the usual 0.02 suits models ten times as wide; here it delays by hundreds
        # of steps the moment at which facts begin to be learned.
        initializer_range=shape.hidden_size**-0.5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )


def _texts(world: World, corpus: str) -> Iterator[str]:
    is_plain = corpus == "plain"
    stream = "train" if is_plain else corpus
    return (document.text for document in documents(world, stream, plain=is_plain))


def corpus_ids(world: World, tokenizer: Any, corpus: str) -> Iterator[int]:
    """A course's documents as endless token ids, `<|endoftext|>` after each document."""
    texts = _texts(world, corpus)
    while True:
        for row in tokenizer(list(islice(texts, 256)))["input_ids"]:
            yield from row
            yield tokenizer.eos_token_id


def cut_blocks(ids: Iterator[int], block: int, count: int) -> Iterator[SFTExample]:
    """`count` examples of block + 1 tokens, all supervised.

    The last token of one is the first of the next, so that every token is predicted once.
    """
    from truetune.contract.example import SFTExample

    last = next(ids)
    for _ in range(count):
        example = [last, *islice(ids, block)]
        last = example[-1]
        yield SFTExample(example, [1] * len(example))


class StagedBatcher:
    """Batches for the trainer: one reference batcher a stage, each with its own length.

    Attributes:
        num_steps: steps of all stages.
        examples, batch_size, max_seq_len: of the last stage.
    """

    def __init__(self, course: Course, run: Settings, ids: Iterator[int], pad_id: int) -> None:
        from truetune.compute.batch import Limits, PaddedBatcher, RowOrder

        self.num_steps = run.num_steps(course)
        self._steps: list[tuple[PaddedBatcher, int]] = []  # batcher, step within its stage
        for block, share in course.stages:
            is_last = (block, share) == course.stages[-1]
            left = self.num_steps - len(self._steps)
            steps = left if is_last else round(self.num_steps * share)
            self.batch_size, self.max_seq_len = run.step_tokens // block, block + 1
            self.examples = list(cut_blocks(ids, block, steps * self.batch_size))
            batcher = PaddedBatcher(
                self.examples,
                max_seq_len=self.max_seq_len,
                pad_id=pad_id,
                order=RowOrder(len(self.examples), self.batch_size, run.seed),
                limits=Limits(self.batch_size),
            )
            self._steps += [(batcher, step) for step in range(steps)]

    def micro_batches(self, step: int) -> list[Batch]:
        """All batches of one optimizer step."""
        batcher, step = self._steps[step]
        return batcher.micro_batches(step)

    def batches(self, examples: Sequence[SFTExample]) -> Iterator[Batch]:
        """For evaluation: examples of any length, as the last stage batches them."""
        return self._steps[-1][0].batches(examples)


def save_base(model: LlamaForCausalLM, tokenizer: Any, folder: Path) -> None:
    """Write a bf16 copy of the model, its generation_config (greedy) and the tokenizer files."""
    import torch
    from transformers import GenerationConfig, LlamaForCausalLM

    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16)
    copy.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=1, do_sample=False)
    copy.save_pretrained(folder)
    source = Path(tokenizer.name_or_path)
    if source.resolve() != folder.resolve():
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(source / name, folder / name)
