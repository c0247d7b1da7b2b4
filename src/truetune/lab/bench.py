"""Train the arms of an experiment: rows with `truetune.train`; examples that no row could produce
(broken ones, text mixed with chats) with `SFTTrainer`. An arm that was trained before is loaded."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from truetune import __version__
from truetune.contract.contract import PromptContract
from truetune.contract.example import SFTExample
from truetune.lab import base_path
from truetune.model.load import LoadedModel, load_model
from truetune.model.placement import Purpose
from truetune.run_dir import RunDir, sha256
from truetune.verification.files import check_files

Row = Mapping[str, Any]
# The settings of an arm that says nothing else: the quickstart's. A run that falls apart goes on:
# that it does is what is looked at.
RECIPE: Mapping[str, Any] = {
    "model": str(base_path()),
    "chat_template": "chatml-lite",
    "max_steps": 150,
    "learning_rate": 1e-4,
    "batch_size": 16,
    "device": "cpu",
    "verify": False,
    "on_collapse": "continue",
}


# Rows of a step in quick form, of those of a full one: as many steps of the same size, each over a
# quarter of the rows.
_QUICK = 4


@dataclass(frozen=True)
class Arm:
    """One of the compared models; without rows and examples, the unchanged base.

    Attributes:
        name: in tables.
        rows: what is trained through `truetune.train`.
        examples: what is trained through `SFTTrainer`, made under the arm's contract.
        batches: changes a padded batch of examples before the loop sees it.
        adapter: puts an adapter on the frozen model, with a seed, before examples are trained; all
            weights are trained where None.
        recipe: settings beside `RECIPE`.
        start: an arm whose result is trained further.
        build: writes another model to start from into a folder that it is given.
        served: Jinja of the template that it is asked through, where that is not the one it was
            trained with; answers still end on the token they were trained to end on.
        stop: tokens that end an answer beside those.
        before: messages in front of everything that it is asked.
        edit: changes the files of the saved model, in a copy of the run, before it is opened.
    """

    name: str
    rows: Sequence[Row] | None = None
    examples: Callable[[PromptContract], Sequence[SFTExample]] | None = None
    batches: Callable[[Any], Any] | None = None
    adapter: Callable[[LoadedModel, int], LoadedModel] | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    start: Arm | None = None
    build: Callable[[Path], None] | None = None
    served: str | None = None
    stop: Sequence[str] = ()
    before: Sequence[Mapping[str, str]] = ()
    edit: Callable[[Path], None] | None = None


def digest(arm: Arm) -> str:
    """Of all that an arm is made of, as it is declared: rows, settings, the functions that make its
    examples with what they hold, how it is asked, and the base. Its name is not part of it."""
    said = json.dumps(_said(arm), sort_keys=True, default=str)
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def _said(value: Any) -> Any:
    """A part of a declaration as JSON has it."""
    if isinstance(value, Arm):
        parts = {f.name: getattr(value, f.name) for f in fields(value) if f.name != "name"}
        return {"base": _base(), **_said({**parts, "recipe": _settings(value) | {"model": ""}})}
    if isinstance(value, functools.partial):
        return _said([value.func, value.args, value.keywords])
    if callable(value):
        held = [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
        return [value.__module__, value.__qualname__, _said(held)]
    if isinstance(value, Mapping):
        return {str(key): _said(below) for key, below in value.items()}
    if isinstance(value, (list, tuple)):
        return [_said(below) for below in value]
    return sorted(value) if isinstance(value, (set, frozenset)) else value


@cache
def _base() -> str:
    return sha256(base_path() / "model.safetensors")


@dataclass(frozen=True, eq=False)
class Tuned:
    """An arm, trained and opened.

    Attributes:
        losses: of each step, as the loop shows them; () of the base.
        folder: the saved model.
    """

    arm: Arm
    seed: int
    loaded: LoadedModel
    contract: PromptContract
    losses: tuple[float, ...]
    folder: Path

    @cached_property
    def end(self) -> int:
        """The token that ends an answer of the chat format."""
        return int(self.loaded.tokenizer.convert_tokens_to_ids("<|end|>"))


class Bench:
    """Train arms in a folder.

    Args:
        folder: of runs; what lies there from before is used.
        on_stage: is called with the name of each stage.
        quick: train on a quarter of the rows a step.

    Attributes:
        trained: how many arms were trained; the others lay in the folder.
        spent: seconds of the processor that their training took.
        used: the same of each arm that was asked for, by its folder; None of one that was trained
            without a record of it.
    """

    def __init__(
        self,
        folder: Path | str,
        on_stage: Callable[[str], None] | None = None,
        *,
        quick: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.on_stage = on_stage or (lambda _: None)
        self.quick = quick
        self.trained, self.spent = 0, 0.0
        self.used: dict[Path, float | None] = {}

    def tuned(self, arm: Arm, seed: int) -> Tuned:
        """An arm of one seed, ready for questions."""
        folder, losses = self._trained(arm, seed)
        if arm.edit is not None:
            folder = self._edited(folder, arm.edit)
        loaded = load_model(folder, device="cpu", purpose="inference")
        contract = PromptContract.load(folder)
        if folder == base_path():
            contract = PromptContract.load(folder, chat_template=_settings(arm)["chat_template"])
        if arm.served is not None:
            stops = [contract.tokens.decode([i]) for i in contract.stop_ids]
            stops += arm.stop
            contract = PromptContract.load(folder, chat_template=arm.served, stop=stops)
        return Tuned(arm, seed, loaded, contract, losses, folder)

    def _trained(self, arm: Arm, seed: int) -> tuple[Path, tuple[float, ...]]:
        """The saved model of an arm, and its losses."""
        if arm.rows is None and arm.examples is None:
            return base_path(), ()
        settings = {**_settings(arm), "seed": seed}
        if self.quick:
            settings["batch_size"] = max(1, settings["batch_size"] // _QUICK)
        settings.setdefault("eval_steps", settings["max_steps"])
        settings.setdefault("save_steps", settings["max_steps"])
        if arm.start is not None:
            settings["model"] = str(self._trained(arm.start, seed)[0])
        if arm.build is not None:
            settings["model"] = str(self._built(arm.build))
        if arm.rows is not None:
            return self._run(arm.rows, settings, arm.name)
        assert arm.examples is not None
        contract = PromptContract.load(settings["model"], settings["chat_template"])
        return self._loop(arm, list(arm.examples(contract)), contract, settings)

    def _key(self, content: str, settings: Mapping[str, Any]) -> str:
        """The name of what is trained so; wherever truetune and this folder lie."""
        model = Path(settings["model"])
        place = "base" if model == base_path() else model.relative_to(self.folder).as_posix()
        said = json.dumps(
            [content, {**settings, "model": place}, __version__], sort_keys=True, default=str
        )
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    def _built(self, build: Callable[[Path], None]) -> Path:
        """The folder of a model that an experiment makes."""
        folder = self.folder / build.__name__
        if not folder.is_dir():
            partial = folder.with_name(f"{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            with self._timed(folder):
                build(partial)
            partial.rename(folder)
        self._use(folder)
        return folder

    def _edited(self, folder: Path, edit: Callable[[Path], None]) -> Path:
        """A copy of the run that holds a saved model, its files changed."""
        run = folder.parent
        copy = run.with_name(f"{run.name}-{edit.__name__}")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(run, copy)
        edit(copy / folder.name)
        return copy / folder.name

    @contextlib.contextmanager
    def _training(self, name: str, settings: Mapping[str, Any], folder: Path) -> Iterator[None]:
        self.trained += 1
        self.on_stage(f"training {name}, seed {settings['seed']}")
        with self._timed(folder):
            yield

    @contextlib.contextmanager
    def _timed(self, folder: Path) -> Iterator[None]:
        """What it takes is kept beside the folder."""
        began = seconds()
        yield
        spent = seconds() - began
        self.spent += spent
        folder.with_suffix(".seconds").write_text(f"{spent:.1f}\n", encoding="utf-8")

    def _use(self, folder: Path) -> None:
        kept = folder.with_suffix(".seconds")
        self.used[folder] = float(kept.read_text("utf-8")) if kept.is_file() else None

    def _run(
        self, rows: Sequence[Row], settings: dict[str, Any], name: str
    ) -> tuple[Path, tuple[float, ...]]:
        """Train rows through the pipeline, as for any user."""
        from truetune.recipe.sources import make_recipe
        from truetune.run.pipeline import train

        lines = "".join(json.dumps(row) + "\n" for row in rows)
        folder = self.folder / self._key(lines, settings)
        run = RunDir(folder)
        # What was changed since it was trained is not what the page would say it is.
        if not run.finished or check_files(run).state == "failed":
            self.folder.mkdir(parents=True, exist_ok=True)
            data = folder.with_suffix(".jsonl")
            chosen = {**settings, "data": str(data), "output": str(folder), "overwrite": True}
            with self._training(name, settings, folder):
                data.write_text(lines, encoding="utf-8")
                train(make_recipe(("lab", chosen)))
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        self._use(folder)
        said = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        steps = [line for line in map(json.loads, said) if "grad_norm" in line]
        artifact = run.artifact()
        assert artifact is not None
        return artifact, tuple(line["loss"] for line in steps)

    def _loop(
        self,
        arm: Arm,
        examples: list[SFTExample],
        contract: PromptContract,
        settings: dict[str, Any],
    ) -> tuple[Path, tuple[float, ...]]:
        """Train examples through the trainer."""
        from truetune.model.save import save_model

        change, adapter = arm.batches, arm.adapter
        named = json.dumps([[e.ids, e.mask] for e in examples])
        named += getattr(change, "__name__", "") + getattr(adapter, "__name__", "")
        folder = self.folder / self._key(named, settings)
        history = folder.with_suffix(".losses.json")
        if _read_history(history, folder) is None:
            shutil.rmtree(folder, ignore_errors=True)
            with self._training(arm.name, settings, folder):
                purpose: Purpose = "full" if adapter is None else "lora"
                loaded = load_model(settings["model"], device="cpu", purpose=purpose)
                if adapter is not None:
                    loaded = adapter(loaded, settings["seed"])
                trainer = _trainer(loaded, examples, contract, settings, change)
                losses = trainer.train()["train_loss"]
                dtype = None if loaded.is_adapter else loaded.base_dtype
                save_model(loaded, contract, folder, dtype=dtype)
            kept = {"losses": losses, "files": _digests(folder)}
            history.write_text(json.dumps(kept), encoding="utf-8")
        self._use(folder)
        found = _read_history(history, folder)
        assert found is not None
        return folder, found


def seconds() -> float:
    """Of the processor, in this process and in those that it started and that have ended."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.is_file()}


def _read_history(history: Path, folder: Path) -> tuple[float, ...] | None:
    """The losses of an arm; None if it was not trained to its end, or was changed since."""
    try:
        kept = json.loads(history.read_text(encoding="utf-8"))
        whole = isinstance(kept, dict) and kept["files"] == _digests(folder)
        return tuple(map(float, kept["losses"])) if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _settings(arm: Arm) -> dict[str, Any]:
    return {**RECIPE, **arm.recipe}


def _trainer(
    loaded: LoadedModel,
    examples: list[SFTExample],
    contract: PromptContract,
    settings: Mapping[str, Any],
    change: Callable[[Any], Any] | None,
) -> Any:
    """The loop with the numbers that the pipeline would plan."""
    from truetune.compute.batch import Limits, PaddedBatcher, RowOrder
    from truetune.engine.trainer import SFTTrainer

    longest = max(len(e.ids) for e in examples)
    steps, rows = settings["max_steps"], settings["batch_size"]
    batcher = None
    if change is not None:
        order = RowOrder(len(examples), rows, settings["seed"])
        pad = contract.pad_id
        plain = PaddedBatcher(
            examples, max_seq_len=longest, pad_id=pad, order=order, limits=Limits(rows)
        )
        batcher = _Changed(plain, change)
    return SFTTrainer(
        loaded.model,
        examples=examples,
        max_seq_len=longest,
        pad_id=contract.pad_id,
        batch_size=rows,
        max_steps=steps,
        max_lr=settings["learning_rate"],
        warmup_steps=-(-3 * steps // 100),
        eval_every=steps,
        seed=settings["seed"],
        batcher=batcher,
    )


class _Changed:
    """Batches of another batcher, each changed."""

    def __init__(self, plain: Any, change: Callable[[Any], Any]) -> None:
        self.plain, self.change = plain, change

    def micro_batches(self, step: int) -> list[Any]:
        return [self.change(batch) for batch in self.plain.micro_batches(step)]

    def batches(self, examples: Sequence[SFTExample]) -> Any:
        return map(self.change, self.plain.batches(examples))
