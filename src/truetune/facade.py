"""The verbs of the command line as functions, with their options as keyword arguments."""

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
    from truetune.evaluation.tasks import TaskEvaluation
    from truetune.findings import Finding
    from truetune.generate import Reply, Sampling
    from truetune.listener import Listener
    from truetune.model.load import LoadedModel
    from truetune.reporting.page import Written
    from truetune.run.checkup import Checkup
    from truetune.run.export_kind import Export
    from truetune.run.pipeline import RunResult
    from truetune.run.push import Pushed
    from truetune.verification.verdict import Verdict


@contextlib.contextmanager
def _words_of_python() -> Iterator[None]:
    """Make errors name Python arguments instead of command-line options."""
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


@contextlib.contextmanager
def _on_screen(listener: Listener | None, quiet: bool) -> Iterator[Any]:
    """Yield the listener of a verb: by default the screen, or the cell's output in a notebook."""
    from truetune.listener import Listener as Silence

    screen: Any = listener or Silence()
    if listener is None and not quiet:
        from truetune.cli.verb import open_screen

        screen = open_screen()
        screen.spell = in_python
    try:
        yield screen
    finally:
        if hasattr(screen, "close"):
            screen.close()


def _path(value: Pathlike | None, name: str) -> str | None:
    return None if value is None else path_of(value, name)


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
        model: a model folder, a Hub id, `embedded`, or a recipe.yaml.
        data: a file, a folder, or a Hub dataset.
        resume: a run to continue, without other settings except `on_collapse`.
        quiet: print nothing.
        listener: receives the events of the run, in place of the screen.
        options: any setting of docs/settings.md, by name.

    Returns:
        The run: `.artifact`, `.train_loss`, `.eval_loss`, `.verdict`, `.findings`, `.plan`.

    Raises:
        TruetuneError: the run failed; the attributes `what`, `where`, `why` and `fix` describe the
            failure and the next step.
    """
    from truetune.run.pipeline import train as run

    recipe = recipe_of(model, data, resume, options, "argument")
    with _on_screen(listener, quiet) as screen:
        done = run(recipe, screen, resume=None if resume is None else os.fspath(resume))
        return dataclasses.replace(done, findings=[_respelled(f) for f in done.findings])


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
    """Check the run that `train` would start with the same arguments, without loading weights.
    Without data, check a finished model or adapter.

        found = truetune.check("Qwen/Qwen2.5-0.5B", "rows.jsonl", lora=True)
        found.ok, found.findings

    Args:
        model, data, quiet, listener, options: as in `train`.
        smoke_test: also load the model, take two real steps, and test saving and reloading.

    Returns:
        `.ok`, `.findings` (the most severe first) and `.summary`.

    Raises:
        TruetuneError: the arguments, the data or the model cannot be used at all.
    """
    from truetune.run.checkup import check as checked

    recipe = recipe_of(model, data, None, options, "argument")
    with _on_screen(listener, quiet) as screen:
        found = checked(recipe, screen, smoke_test=smoke_test)
        return dataclasses.replace(found, findings=[_respelled(f) for f in found.findings])


@dataclass
class Chat:
    """A conversation with a model: call it with a question.

        chat = truetune.chat("runs/first")
        chat("What is a river?")

    Attributes:
        messages: the conversation so far, as chat messages.
    """

    loaded: LoadedModel
    contract: PromptContract
    sampling: Sampling
    system: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Clear the conversation."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    @_words_of_python()
    def ask(self, question: str) -> Reply:
        """Ask a question, and add it and the answer to the conversation.

        Returns:
            The reply: `.text`, `.ids`, and `.stopped`, whether it ended by itself.
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
        return said or "an empty conversation: call it with a question"

    def _repr_html_(self) -> str:
        return _pre(repr(self))


@_words_of_python()
def chat(
    model: Pathlike,
    prompt: str | None = None,
    *,
    system: str | None = None,
    chat_template: Pathlike | None = None,
    revision: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    device: str = "auto",
) -> Any:
    """Chat with a run or a model, using the prompt format that it was trained on.

        truetune.chat("runs/first", "What is a river?")     # the answer
        talk = truetune.chat("runs/first")                  # a conversation
        talk("What is a river?")

    Args:
        model: a run, a model or adapter folder, or a Hub id.
        prompt: one question; if it is None, a conversation is returned.
        system: the system message.
        chat_template: a .jinja file or built-in name; by default the model's own.
        revision: revision of a Hub model.
        max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed: settings of sampling
            (`max_new_tokens` in tokens); a temperature of 0 means greedy decoding.
        device: auto, cuda, mps or cpu.

    Returns:
        The answer as text; or, without a prompt, a `Chat` that you call with each question.

    Raises:
        TruetuneError: the model cannot be loaded, or the prompt leaves no room for an answer.
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
    opened = open_speaker(path_of(model), _path(chat_template, "chat_template"), revision, device)
    talk = Chat(opened.model, opened.contract, sampling, system)
    return talk if prompt is None else talk(prompt)


@_words_of_python()
def verify(run: Pathlike, *, base: Pathlike | None = None, device: str = "auto") -> Verdict:
    """Load what was saved in a fresh process, and compare it with what was trained.

    Args:
        run: a run, or a model or adapter folder.
        base: current location of an adapter's base, if it has moved.
        device: auto, cuda, mps or cpu.

    Returns:
        The verdict: `.passed` and `.checks`. A failed check does not raise an exception.

    Raises:
        TruetuneError: there is nothing to verify.
    """
    from truetune.verification.artifact import verify as verified

    return verified(path_of(run), base=_path(base, "base"), device=device)


@_words_of_python()
def export(
    run: Pathlike,
    output: Pathlike,
    *,
    to: str = "merged",
    quant: str | None = None,
    adapter: bool = False,
    go_template: bool = False,
    base: Pathlike | None = None,
    onto: str = "auto",
    dtype: str = "auto",
    device: str = "cpu",
    verify: bool = True,
    data: Pathlike | None = None,
    quiet: bool = False,
    listener: Listener | None = None,
) -> Export:
    """Write what a server loads: a merged model, a GGUF file, or a folder for Ollama, MLX or vLLM.

    A merged model can be loaded without peft; a fresh process compares it with the adapter before
    the folder gets its name. A GGUF file is served by llama.cpp and compared with the model.

    Args:
        run: a run, or a model or adapter folder. A complete model is copied if there is nothing to
            convert.
        output: the folder to write; it must not exist.
        to: merged, gguf, ollama (a GGUF file with a Modelfile), mlx, vllm or sglang.
        quant: the type of a GGUF file's weights: f32, f16, bf16, q8_0, q4_k_m and so on (None means
            f16); for MLX f32, f16, bf16, 8bit, 4bit and so on (None means bf16); for merged, vllm
            and sglang nf4, int8, torchao-int8, gptq-w4a16 or gptq-w8a8 (None means plain weights).
        adapter: for gguf, write only the adapter.
        go_template: for ollama, also write the template as a Go template.
        base: current location of the base, if it has moved.
        onto: original or dequantised weights; auto uses those that the adapter was trained on.
        dtype: dtype of the saved weights; auto uses the base's.
        device: the device on which to merge and compare.
        verify: compare the merged model with the adapter in a fresh process.
        data: calibration rows for GPTQ; by default the training rows of the run.
        quiet, listener: as in `train`.

    Returns:
        The export: `.folder`, `.exported` and `.verdict`; for a GGUF file `.path` and `.proof`; for
            MLX and quantised folders `.folder` and `.apart`; for vLLM and SGLang `.folder`, `.line`
            and `.reasons`.

    Raises:
        TruetuneError: the export cannot be written, or differs from the model; no files are
            left behind.
    """
    from truetune.run.export_kind import export_as

    with _on_screen(listener, quiet) as screen:
        return export_as(
            to,
            source=path_of(run),
            output=path_of(output),
            quant=quant,
            adapter=adapter,
            go_template=go_template,
            base=_path(base, "base"),
            onto=onto,
            dtype=dtype,
            device=device,
            verify=verify,
            data=_path(data, "data"),
            listener=screen,
        )


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
    base: Pathlike | None = None,
    quiet: bool = False,
    listener: Listener | None = None,
) -> Diagnosis:
    """Run the same rows through every stage between training and serving, and name the first stage
    that changes the model's behaviour.

        found = truetune.diagnose("runs/first", gguf="first-gguf/model-q8_0.gguf")
        found.first, found.findings()

    Args:
        source: a run, a model or adapter folder, or a GGUF file.
        merged, quantised: folders made from the model.
        gguf: a GGUF file made from the model.
        url: address of a server that serves the model.
        stages: names of the stages to compare; by default all.
        data: rows on which to compare the stages; by default rows of the run.
        base: current location of an adapter's base, if it has moved.
        quiet, listener: as in `train`.

    Returns:
        The diagnosis: `.first` (the first stage that differs, or None), `.stages` and
            `.findings()`.

    Raises:
        TruetuneError: the trained model cannot be loaded.
    """
    from truetune.diagnosis.diagnose import diagnose as diagnosed

    with _on_screen(listener, quiet) as screen:
        return diagnosed(
            path_of(source),
            stages=stages,
            base=_path(base, "base"),
            merged=_path(merged, "merged"),
            quantised=_path(quantised, "quantised"),
            gguf=_path(gguf, "gguf"),
            url=url,
            data=_path(data, "data"),
            on_stage=screen.stage,
        )


@_words_of_python()
def serve(source: Pathlike, *, port: int = 8420, fast: bool = False, device: str = "auto") -> None:
    """Serve a model to programs on this machine, at http://127.0.0.1:PORT/v1, until interrupted.

    Args:
        source: a run, a model or adapter folder, or a GGUF file.
        port: 0 picks a free port.
        fast: for a GGUF file, use llama.cpp's own settings, which are faster but less exact.
        device: auto, cuda, mps or cpu.

    Raises:
        TruetuneError: the model cannot be loaded, or the port is taken.
    """
    from truetune.cli.serve_screen import serve as served
    from truetune.cli.verb import open_screen

    with contextlib.suppress(KeyboardInterrupt):
        served(open_screen(), path_of(source), port, fast=fast, device=device)


class Facts(dict[str, Any]):
    """Facts by name, printed one per line."""

    def __repr__(self) -> str:
        width = max(map(len, self), default=0)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in self.items())

    def _repr_html_(self) -> str:
        return _pre(repr(self))


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows as they are used in training: served prompt, supervised tokens and stop tokens.

    Attributes:
        views: the rows, each with its `number`, `conversation`, `result` and `findings`.
        total: how many rows were read.
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
    chat_template: Pathlike | None = None,
    **options: Any,
) -> Facts | Rows:
    """Describe a model: template, stop tokens, vocabulary, head, LoRA targets, and one turn as it
    is served and supervised. With data, show rows as they are used in training. No weights are
    loaded.

        truetune.inspect("Qwen/Qwen2.5-0.5B-Instruct", "rows.jsonl", row=17)

    Args:
        model: a run, a model or adapter folder, a Hub id, or `embedded`.
        data: rows to show as they are used in training.
        row: number of the row, from 1, or its place as shown in findings; by default the first.
        ids: show token ids next to the text.
        html: a file for an HTML page with the first 50 rows, or with only the row `row`.
        revision: revision of a Hub model.
        chat_template: a .jinja file or built-in name; by default the model's own.
        options: any setting of docs/settings.md, by name, that affects how rows are read and
            used in training.

    Raises:
        TruetuneError: the model or the data cannot be read, or there is no such row.
    """
    if data is None:
        if row is not None or ids or html is not None or options:
            raise UsageError(
                "row, ids, html and settings need data",
                fix="truetune.inspect(model, data, row=1)",
                code="rows-without-data",
            )
        from truetune.cli.model_screen import model_facts

        template = _path(chat_template, "chat_template")
        return Facts(model_facts(path_of(model), revision=revision, chat_template=template))
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
    chat_template: Pathlike | None = None,
    revision: str | None = None,
    device: str = "auto",
    quiet: bool = False,
    listener: Listener | None = None,
) -> Evaluation:
    """Send the questions of a dataset to models, in the prompt format that each is served with, and
    compare the replies, as `truetune eval` does.

        found = truetune.evaluate(["Qwen/Qwen2.5-0.5B", "runs/first"], "held_out.jsonl")
        found["runs/first"].values["match"].value

    Args:
        models: one or several runs, model or adapter folders, Hub ids, GGUF files, or addresses of
            servers. The others are compared with the first.
        data: a file, a folder, or a Hub dataset, with questions and answers.
        match: exact, contains, number, regex, json or none.
        pattern: pattern for regex, in place of each row's own answer.
        limit: use only the first rows, up to this number.
        shots: how many other rows to put before each question.
        split, schema, columns: how to read the data, as in `train`.
        max_new_tokens: maximum length of a reply, in tokens.
        samples: replies per row, for pass@1 and maj@K.
        temperature: 0 means greedy decoding; by default 0 with one sample and 1 with several.
        top_p, top_k: sampling settings, used if the temperature is above 0.
        seed: random seed for shots, sampling and intervals.
        chat_template: template for all models; by default each model's own.
        revision: revision of Hub models.
        device: auto, cuda, mps or cpu.
        quiet, listener: as in `train`.

    Returns:
        The table: `.models` with `.values`, `.against_first` and `.rows`; `.left_out`; `.as_dict()`
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
        chat_template=_path(chat_template, "chat_template"),
        revision=revision,
        device=device,
    )
    with _on_screen(listener, quiet) as screen:
        return evaluated(
            [path_of(model) for model in _several(models)],
            path_of(data),
            settings,
            on_stage=screen.stage,
            on_progress=screen.progress,
        )


@_words_of_python()
def evaluate_tasks(
    models: Pathlike | Sequence[Pathlike],
    tasks: Pathlike | Sequence[Pathlike],
    *,
    shots: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    chat_template: Pathlike | None = None,
    revision: str | None = None,
    device: str = "auto",
    quiet: bool = False,
    listener: Listener | None = None,
) -> TaskEvaluation:
    """Evaluate models on tasks of lm-evaluation-harness, with served and with raw prompts, as
    `truetune eval --tasks` does; needs the extra `eval`.

        found = truetune.evaluate_tasks(["Qwen/Qwen2.5-0.5B", "runs/first"], "arc_easy", limit=200)

    Args:
        models: one or several runs, model or adapter folders, or Hub ids. The others are compared
            with the first.
        tasks: names of the harness's tasks, or YAML files of your own.
        shots: worked examples before each question; by default as the task specifies.
        limit: use only the first documents of each task, up to this number.
        seed: random seed for shots, sampling and intervals.
        chat_template: template for all models; by default each model's own.
        revision: revision of Hub models.
        device: auto, cuda, mps or cpu.
        quiet, listener: as in `train`.

    Returns:
        The table: `.metrics`; `.models` with `.scores`; `.as_dict()` and `.rows()` for programs.

    Raises:
        TruetuneError: a model or a task cannot be used.
    """
    from truetune.evaluation.tasks import evaluate_tasks as evaluated

    with _on_screen(listener, quiet) as screen:
        return evaluated(
            [path_of(model) for model in _several(models)],
            [path_of(task) for task in _several(tasks)],
            shots=shots,
            limit=limit,
            seed=seed,
            chat_template=_path(chat_template, "chat_template"),
            revision=revision,
            device=device,
            on_stage=screen.stage,
            on_progress=screen.progress,
        )


def _several(given: Pathlike | Sequence[Pathlike]) -> list[Pathlike]:
    return [given] if isinstance(given, str | os.PathLike) else list(given)


@_words_of_python()
def report(run: Pathlike, output: Pathlike | None = None) -> Written:
    """Write the report of a run, finished or not, as `truetune report` does.

        page = truetune.report("runs/first")
        page.path, page.answers

    Args:
        run: a run.
        output: the file to write; by default RUN/report.html.

    Returns:
        `.path` of the report, and `.answers` to the three questions (trained as served, saved as
        trained, behaves), each with `.word` and `.why`.

    Raises:
        TruetuneError: `run` is not a run, or the file cannot be written.
    """
    from pathlib import Path

    from truetune.reporting.page import write_report
    from truetune.run_dir import REPORT, RunDir

    opened = RunDir.open(path_of(run))
    return write_report(opened, opened.file(REPORT) if output is None else Path(path_of(output)))


@_words_of_python()
def watch(run: Pathlike, *, port: int = 8421, quiet: bool = False) -> None:
    """Serve the report of a run at http://127.0.0.1:PORT, rebuilt for each request, until
    interrupted.

    Args:
        run: a run, finished or not.
        port: 0 picks a free port.
        quiet: do not print the address.

    Raises:
        TruetuneError: `run` is not a run, or the port is taken.
    """
    from truetune.reporting.live import serving
    from truetune.run_dir import RunDir

    with serving(RunDir.open(path_of(run)), port) as server, _on_screen(None, quiet) as screen:
        screen.stage(server.address)
        with contextlib.suppress(KeyboardInterrupt):
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
    """Push a run's model, or a merged model, to the Hub in one commit, with its model card. Only
    files that were verified and have not changed since are pushed.

    Args:
        source: a run, or a model or adapter folder.
        repo: OWNER/NAME.
        public: make the repository public.
        unverified: push even if no verification has passed.
        overwrite: delete other files of the repository.
        quiet, listener: as in `train`.

    Returns:
        `.url`, `.files`, `.private` and `.verified`.

    Raises:
        TruetuneError: the files differ from what was trained, or the Hub refuses them.
    """
    from truetune.run.push import push as pushed

    with _on_screen(listener, quiet) as screen:
        return pushed(
            path_of(source),
            repo,
            public=public,
            unverified=unverified,
            overwrite=overwrite,
            listener=screen,
        )


def _pre(text: str) -> str:
    return f"<pre>{escaped(text)}</pre>"
