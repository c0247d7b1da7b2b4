"""The verbs of the command line as functions, with the options' names as keyword arguments."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect as _inspect
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from truetune.errors import TruetuneError, UsageError
from truetune.findings import escaped
from truetune.recipe.given import Pathlike, path_of, recipe_of
from truetune.recipe.settings import setting_types, settings
from truetune.recipe.spelling import in_python

if TYPE_CHECKING:
    from truetune.cli.rows_screen import RowView
    from truetune.contract.contract import PromptContract
    from truetune.diagnosis.diagnose import Diagnosis
    from truetune.evaluation.table import Evaluation
    from truetune.exporting.gguf import WrittenGGUF
    from truetune.findings import Finding
    from truetune.generate import Reply, Sampling
    from truetune.listener import Listener
    from truetune.model.load import LoadedModel
    from truetune.reporting.page import Written
    from truetune.run.checkup import Checkup
    from truetune.run.pipeline import ExportResult, RunResult
    from truetune.run.push import Pushed
    from truetune.verification.verdict import Verdict


@contextlib.contextmanager
def _words_of_python() -> Iterator[None]:
    """Errors name arguments, not options of the command line."""
    try:
        yield
    except TruetuneError as error:
        for part in ("what", "where", "why", "fix"):
            setattr(error, part, in_python(getattr(error, part)))
        if hasattr(error, "findings"):
            error.findings = [_respelled(finding) for finding in error.findings]
        raise


def _respelled(finding: Finding) -> Finding:
    return dataclasses.replace(
        finding,
        what=in_python(finding.what),
        why=in_python(finding.why),
        fix=in_python(finding.fix),
    )


def _with_settings(function: Callable[..., Any]) -> Callable[..., Any]:
    """Show the settings in the signature, in place of `**options`."""
    types = setting_types()
    own = _inspect.signature(function)
    kept = [p for p in own.parameters.values() if p.kind is not _inspect.Parameter.VAR_KEYWORD]
    named = {p.name for p in kept}
    more = [
        _inspect.Parameter(
            f.name, _inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=types[f.name]
        )
        for f in settings()
        if f.name not in named
    ]
    function.__signature__ = own.replace(parameters=[*kept, *more])  # type: ignore[attr-defined]
    return function


def _shown(listener: Listener | None, quiet: bool) -> Any:
    """Who hears what a verb tells: by default the screen, a cell's output in a notebook."""
    from truetune.listener import Listener as Silence

    if listener is not None or quiet:
        return listener or Silence()
    from truetune.cli.verb import open_screen

    screen = open_screen()
    screen.spell = in_python
    return screen


def _closed(listener: Any) -> None:
    if hasattr(listener, "close"):
        listener.close()


@_with_settings
@_words_of_python()
def train(
    model: Pathlike | None = None,
    data: Pathlike | None = None,
    *,
    resume: Pathlike | None = None,
    quiet: bool = False,
    listener: Listener | None = None,
    **options: Any,
) -> RunResult:
    """Fine-tune a model, as `truetune train` does.

        result = truetune.train("Qwen/Qwen2.5-0.5B", "rows.jsonl", lora=True, output="runs/first")
        result.eval_loss, result.artifact

    Args:
        model: a folder, a Hub id, or a recipe.yaml.
        data: a file, a folder, or a Hub dataset.
        resume: a run to continue; takes no other setting.
        quiet: show nothing while it works.
        listener: receives the events of the run, in place of the screen.
        options: every setting of docs/settings.md, by its name.

    Returns:
        the run: `.artifact`, `.train_loss`, `.eval_loss`, `.verdict`, `.findings`, `.plan`.

    Raises:
        TruetuneError: with what, where, why and fix, as the command line shows them.
    """
    from truetune.run.pipeline import train as run

    recipe = recipe_of(model, data, resume, options, "argument")
    told = _shown(listener, quiet)
    try:
        done = run(recipe, told, resume=None if resume is None else os.fspath(resume))
        return dataclasses.replace(done, findings=[_respelled(f) for f in done.findings])
    finally:
        _closed(told)


@_with_settings
@_words_of_python()
def check(
    model: Pathlike | None = None,
    data: Pathlike | None = None,
    *,
    smoke_test: bool = False,
    quiet: bool = False,
    listener: Listener | None = None,
    **options: Any,
) -> Checkup:
    """Prove the run that `train` with the same arguments would start, without loading weights;
    without data, look at a finished model or adapter.

        found = truetune.check("Qwen/Qwen2.5-0.5B", "rows.jsonl", lora=True)
        found.ok, found.findings

    Args:
        model, data, quiet, listener, options: as of `train`.
        smoke_test: load the model too: one real step, a dry save and reload.

    Returns:
        `.ok`, `.findings` (the most severe first) and `.summary`.

    Raises:
        TruetuneError: arguments, data or model that cannot be used at all.
    """
    from truetune.run.checkup import check as checked

    recipe = recipe_of(model, data, None, options, "argument")
    told = _shown(listener, quiet)
    try:
        found = checked(recipe, told, smoke_test=smoke_test)
        return dataclasses.replace(found, findings=[_respelled(f) for f in found.findings])
    finally:
        _closed(told)


@dataclass
class Chat:
    """A conversation with a model: call it with a question.

        chat = truetune.chat("runs/first")
        chat("What is a river?")

    Attributes:
        messages: what was said so far, as chat messages.
    """

    loaded: LoadedModel
    contract: PromptContract
    sampling: Sampling
    system: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget what was said."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    @_words_of_python()
    def ask(self, question: str) -> Reply:
        """Ask, and remember question and answer.

        Returns:
            `.text`, `.ids`, and whether it `.stopped` by itself.
        """
        from truetune.generate import replies

        asked = [*self.messages, {"role": "user", "content": question}]
        (reply,) = replies(self.loaded, self.contract, [asked], self.sampling)
        self.messages = [*asked, {"role": "assistant", "content": reply.text}]
        return reply

    def __call__(self, question: str) -> str:
        return self.ask(question).text

    def __repr__(self) -> str:
        said = "\n".join(f"{m['role']:>9}  {m['content']}" for m in self.messages)
        return said or "a conversation in which nothing was said yet: call it with a question"

    def _repr_html_(self) -> str:
        return _pre(repr(self))


@_words_of_python()
def chat(
    model: Pathlike,
    prompt: str | None = None,
    *,
    system: str | None = None,
    chat_template: str | None = None,
    revision: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    device: str = "auto",
) -> Any:
    """Talk to a run or a model, through the prompt that it was trained on.

        truetune.chat("runs/first", "What is a river?")     # the answer
        talk = truetune.chat("runs/first")                  # a conversation
        talk("What is a river?")

    Args:
        model: a run, a model or adapter folder, or a Hub id.
        prompt: one question.
        system: the system message.
        chat_template: a .jinja file or built-in name; the model's own where None.
        max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed: of the sampling; a
            temperature of 0 is greedy.
        device: auto, cuda, mps or cpu.

    Returns:
        the answer as text; without a prompt a `Chat`, which is called with questions.

    Raises:
        TruetuneError: the model cannot be opened, or the prompt leaves no room for an answer.
    """
    from truetune.generate import Sampling, open_speaker

    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    opened = open_speaker(path_of(model), chat_template, revision, device)
    talk = Chat(opened.model, opened.contract, sampling, system)
    return talk if prompt is None else talk(prompt)


@_words_of_python()
def verify(run: Pathlike, *, base: str | None = None, device: str = "auto") -> Verdict:
    """Open what was saved in a fresh process, and hold it to what was trained.

    Args:
        run: a run, or a model or adapter folder.
        base: where an adapter's base is now, if it has moved.
        device: auto, cuda, mps or cpu.

    Returns:
        `.passed` and `.checks`; a failed check is no exception.

    Raises:
        TruetuneError: there is nothing to verify.
    """
    from truetune.verification.artifact import verify as verified

    return verified(path_of(run), base=base, device=device)


@_words_of_python()
def export(
    run: Pathlike,
    output: Pathlike,
    *,
    to: str = "merged",
    quant: str = "f16",
    base: str | None = None,
    onto: str = "auto",
    dtype: str = "auto",
    device: str = "cpu",
    verify: bool = True,
    quiet: bool = False,
    listener: Listener | None = None,
) -> ExportResult | WrittenGGUF:
    """Merge a run's adapter into its base: one folder that needs no peft, compared with the
    adapter by a fresh process before it gets its name. Or write a GGUF file, which llama.cpp then
    serves and is compared with the model.

    Args:
        run: a run, or an adapter folder; for a GGUF file a model folder, too.
        output: the folder of the export; must not exist.
        to: merged or gguf.
        quant: of a GGUF file: f32, f16, bf16, q8_0, q4_k_m and so on.
        base: where the base is now, if it has moved.
        onto: original weights, or dequantised ones; auto takes what the adapter was trained on.
        dtype: of the written weights; auto takes the base's.
        device: where to merge and to compare.
        verify: compare.
        quiet, listener: as of `train`.

    Returns:
        `.folder`, `.exported` and `.verdict`; of a GGUF file `.path` and `.proof`.

    Raises:
        TruetuneError: it cannot be written, or what was written is not the model; nothing is left
            behind.
    """
    from truetune.run.export_gguf import export_gguf
    from truetune.run.pipeline import export as merged

    if to not in ("merged", "gguf"):
        raise UsageError(f"unknown export {to!r}", fix="merged or gguf", code="export-what")
    if onto not in ("auto", "original", "dequantised"):
        raise UsageError(
            f"unknown weights {onto!r}",
            fix="one of auto, original, dequantised",
            code="export-onto",
        )
    told = _shown(listener, quiet)
    try:
        if to == "gguf":
            return export_gguf(
                path_of(run),
                path_of(output),
                quant=quant,
                base=base,
                onto=onto,  # type: ignore[arg-type]
                device=device,
                listener=told,
            )
        return merged(
            path_of(run),
            path_of(output),
            base=base,
            onto=onto,  # type: ignore[arg-type]
            dtype=None if dtype == "auto" else dtype,
            device=device,
            check=verify,
            listener=told,
        )
    finally:
        _closed(told)


@_words_of_python()
def diagnose(
    source: Pathlike,
    *,
    merged: Pathlike | None = None,
    quantised: Pathlike | None = None,
    gguf: Pathlike | None = None,
    url: str | None = None,
    stages: Sequence[str] = (),
    data: Pathlike | None = None,
    base: str | None = None,
    quiet: bool = False,
    listener: Listener | None = None,
) -> Diagnosis:
    """Put the same rows through every stage of a model's way to a server, and name the first one
    that changes it.

        found = truetune.diagnose("runs/first", gguf="first-gguf/model-q8_0.gguf")
        found.first, found.findings()

    Args:
        source: a run, a model or adapter folder, or a GGUF file.
        merged, quantised: folders made from it.
        gguf: a file made from it.
        url: a server that is to serve it.
        stages: those that are looked at; all where empty.
        data: rows to ask; those of the run where None.
        base: where an adapter's base is now, if it has moved.
        quiet, listener: as of `train`.

    Returns:
        `.first`, the stage that parts, or None; `.stages` and `.findings()`.

    Raises:
        TruetuneError: what was trained cannot be opened.
    """
    from truetune.diagnosis.diagnose import diagnose as diagnosed

    told = _shown(listener, quiet)
    try:
        return diagnosed(
            path_of(source),
            stages=stages,
            base=base,
            merged=None if merged is None else path_of(merged),
            quantised=None if quantised is None else path_of(quantised),
            gguf=None if gguf is None else path_of(gguf),
            url=url,
            data=None if data is None else path_of(data),
            on_stage=told.stage,
        )
    finally:
        _closed(told)


@_words_of_python()
def serve(source: Pathlike, *, port: int = 8420, fast: bool = False, device: str = "auto") -> None:
    """Serve a model to programs of this machine, at http://127.0.0.1:PORT/v1, until it is
    interrupted.

    Args:
        source: a run, a model or adapter folder, or a GGUF file.
        port: 0 takes any that is free.
        fast: of a GGUF file: llama.cpp's own, less exact settings.
        device: auto, cuda, mps or cpu.

    Raises:
        TruetuneError: it cannot be opened, or the port is taken.
    """
    from truetune.cli.serve_screen import serve as served
    from truetune.cli.verb import open_screen

    served(open_screen(), path_of(source), port, fast=fast, device=device)


class Facts(dict[str, Any]):
    """Facts by name, shown a line each."""

    def __repr__(self) -> str:
        width = max(map(len, self), default=0)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in self.items())

    def _repr_html_(self) -> str:
        return _pre(repr(self))


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows as they are trained: served prompt, supervised, stop.

    Attributes:
        views: a row each, with its `number`, `conversation`, `result` and `findings`.
        total: rows that were read.
    """

    contract: PromptContract
    views: Sequence[RowView]
    total: int
    title: str
    ids: bool = False

    def __repr__(self) -> str:
        from truetune.cli.rows_screen import show_rows
        from truetune.cli.screen import Screen

        screen = Screen()
        with screen.console.capture() as shown:
            show_rows(screen, self.contract, self.views, self.total, with_ids=self.ids)
        return shown.get().rstrip("\n")

    def _repr_html_(self) -> str:
        from truetune.cli.rows_screen import rows_page

        return rows_page(self.contract, self.views, self.total, self.title)


@_words_of_python()
def inspect(
    model: Pathlike,
    data: Pathlike | None = None,
    *,
    row: int | str | None = None,
    ids: bool = False,
    html: Pathlike | None = None,
    revision: str | None = None,
    chat_template: str | None = None,
    **options: Any,
) -> Facts | Rows:
    """What a model brings: template, stop tokens, vocabulary, head, LoRA targets, one turn as it
    is served and supervised; or, with data, rows as they are trained. No weight is read.

        truetune.inspect("Qwen/Qwen2.5-0.5B-Instruct", "rows.jsonl", row=17)

    Args:
        model: a run, a model or adapter folder, a Hub id, or `embedded`.
        data: rows to show as they are trained.
        row: its number, from 1, or its place as findings name it; the first where None.
        ids: show token ids beside the text.
        html: write a page there, of 50 rows or of `row`.
        revision: of a Hub model.
        chat_template: a .jinja file or built-in name; the model's own where None.
        options: any setting of docs/settings.md, by its name, as rows are read and trained.

    Raises:
        TruetuneError: model or data cannot be opened, or there is no such row.
    """
    if data is None:
        if row is not None or ids or html is not None or options:
            raise UsageError(
                "row, ids, html and settings need data",
                fix="truetune.inspect(model, data, row=1)",
                code="rows-without-data",
            )
        from truetune.cli.model_screen import model_facts

        return Facts(model_facts(path_of(model), revision=revision, chat_template=chat_template))
    from pathlib import Path

    from truetune.cli.rows_screen import rows_page, view_rows
    from truetune.reporting.html import write_document

    given = {"revision": revision, "chat_template": chat_template, **options}
    recipe = recipe_of(model, data, None, given, "python")
    named = None if row is None else str(row)
    most = 50 if html is not None else 1
    found = view_rows(recipe, named, most)
    rows = Rows(*found, f"{path_of(data)} for {path_of(model)}", ids)
    if html is not None:
        write_document(Path(path_of(html)), rows_page(*found, rows.title))
    return rows


@_words_of_python()
def evaluate(
    models: Pathlike | Sequence[Pathlike],
    data: Pathlike,
    *,
    match: str = "exact",
    pattern: str | None = None,
    limit: int | None = None,
    shots: int = 0,
    split: str | None = None,
    schema: str = "auto",
    columns: str | None = None,
    max_new_tokens: int = 256,
    samples: int = 1,
    temperature: float | None = None,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    chat_template: str | None = None,
    revision: str | None = None,
    device: str = "auto",
    quiet: bool = False,
    listener: Listener | None = None,
) -> Evaluation:
    """Ask models the rows of a data source, each as it is served, and compare, as `truetune eval`
    does.

        found = truetune.evaluate(["Qwen/Qwen2.5-0.5B", "runs/first"], "held_out.jsonl")
        found["runs/first"].values["match"].value

    Args:
        models: one or several: runs, model or adapter folders, or Hub ids. The others are held to
            the first.
        data: a file, a folder, or a Hub dataset; rows of question and answer.
        match: exact, contains, number, regex, json or none.
        pattern: of regex, in place of each row's own answer.
        limit: the first so many rows.
        shots: other rows put before each question.
        split, schema, columns: of the data, as of `train`.
        max_new_tokens: of a reply.
        samples: replies a row: pass@1 and maj@K.
        temperature: 0 is greedy; where None, 0 of one sample and 1 of several.
        top_p, top_k: of the sampling.
        seed: of shots, sampling and intervals.
        chat_template: for every model; its own where None.
        revision: of models on the Hub.
        device: auto, cuda, mps or cpu.
        quiet, listener: as of `train`.

    Returns:
        the table: `.models` with `.values`, `.against_first` and `.rows`; `.left_out`; `.as_dict()`
        and `.rows()` for programs.

    Raises:
        TruetuneError: a model or the data cannot be used.
    """
    from truetune.evaluation.evaluate import Settings
    from truetune.evaluation.evaluate import evaluate as evaluated

    settings = Settings.of(
        match=match,
        pattern=pattern,
        limit=limit,
        shots=shots,
        split=split,
        schema=schema,
        columns=columns,
        max_new_tokens=max_new_tokens,
        samples=samples,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        chat_template=chat_template,
        revision=revision,
        device=device,
    )
    several = [models] if isinstance(models, str | os.PathLike) else list(models)
    told = _shown(listener, quiet)
    try:
        return evaluated(
            [path_of(model) for model in several],
            path_of(data),
            settings,
            on_stage=told.stage,
            on_progress=told.progress,
        )
    finally:
        _closed(told)


@_words_of_python()
def report(run: Pathlike, output: Pathlike | None = None) -> Written:
    """Write the page of a run, finished or not, as `truetune report` does.

        page = truetune.report("runs/first")
        page.path, page.answers

    Args:
        run: a run.
        output: the file; RUN/report.html where None.

    Returns:
        `.path` of the page, and `.answers`: trained as served, saved as trained, behaves, each with
        `.word` and `.why`.

    Raises:
        TruetuneError: it is no run, or the file cannot be written.
    """
    from pathlib import Path

    from truetune.reporting.page import write_report
    from truetune.run_dir import REPORT, RunDir

    opened = RunDir.open(path_of(run))
    return write_report(opened, opened.file(REPORT) if output is None else Path(path_of(output)))


@_words_of_python()
def watch(run: Pathlike, *, port: int = 8421, quiet: bool = False) -> None:
    """Serve the page of a run at http://127.0.0.1:PORT, made anew for each request, until it is
    interrupted.

    Args:
        run: a run, finished or not.
        port: 0 takes any that is free.
        quiet: do not show the address.

    Raises:
        TruetuneError: it is no run, or the port is taken.
    """
    from truetune.reporting.live import serving
    from truetune.run_dir import RunDir

    with serving(RunDir.open(path_of(run)), port) as server:
        _shown(None, quiet).stage(server.address)
        server.run()


@_words_of_python()
def push(
    source: Pathlike,
    repo: str,
    *,
    public: bool = False,
    unverified: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    listener: Listener | None = None,
) -> Pushed:
    """Push what a run saved, or a merged model, to the Hub in one commit, with its model card; only
    what was verified, and is as it was then.

    Args:
        source: a run, or a model or adapter folder.
        repo: OWNER/NAME.
        public: everybody may read it.
        unverified: push what no verification has passed, too.
        overwrite: take other files of the repository away.
        quiet, listener: as of `train`.

    Returns:
        `.url`, `.files`, `.private` and `.verified`.

    Raises:
        TruetuneError: it is not what was trained, or the Hub refuses it.
    """
    from truetune.run.push import push as pushed

    told = _shown(listener, quiet)
    try:
        return pushed(
            path_of(source),
            repo,
            public=public,
            unverified=unverified,
            overwrite=overwrite,
            listener=told,
        )
    finally:
        _closed(told)


def _pre(text: str) -> str:
    return f"<pre>{escaped(text)}</pre>"
