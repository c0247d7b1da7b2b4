"""The command line: help, spellings, the screen."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from test_recipe import VALUES
from tiny_models import tiny_tokenizer, write_model
from tiny_runs import command, lines, sums, write_rows
from truetune import __version__
from truetune.cli.screen import Screen, side_by_side
from truetune.errors import BadRows, of_the_system
from truetune.findings import Finding, visible
from truetune.recipe.settings import settings

VERBS = [
    *([], ["train"], ["chat"], ["inspect"], ["export"], ["verify"], ["quickstart"]),
    *(["lab"], ["lab", "pretrain"], ["lab", "evaluate"]),
    *(["lab", "list"], ["lab", "run"], ["lab", "all"]),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    write_model(folder / "tiny")
    write_rows(folder / "rows.jsonl", sums(12))
    return folder


def option(name: str) -> str:
    return "--" + name.replace("_", "-")


# Help.


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help(verb: list[str], flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = command(*verb, flag)
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.startswith(f"Usage: {' '.join(['truetune', *verb])} ")
    # Nothing is cut off, nothing runs over, nothing is meant for a machine.
    assert "\u2026" not in shown.out
    assert not re.search(r"\w\.\.\.$", shown.out, re.MULTILINE)
    assert max(map(len, shown.out.splitlines())) <= 80
    assert not re.search(r"<(bool|str|int|float|error)", shown.out)
    assert all(char.isprintable() or char == "\n" for char in shown.out)


def test_help_imports_nothing_heavy() -> None:
    program = """
import sys
from truetune.cli.verbs import main
for verb in ([], ["train"], ["chat"], ["inspect"], ["export"], ["verify"], ["lab", "run"]):
    for flag in ("-h", "--help"):
        try:
            main([*verb, flag])
        except SystemExit as exit:
            assert not exit.code
heavy = {"torch", "transformers", "peft", "datasets", "numpy", "pyarrow", "jinja2"}
sys.exit(" ".join(sorted(heavy & set(sys.modules))) or 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_every_setting_is_an_option_with_its_help() -> None:
    shown = command("train", "--help").out
    told = " ".join(shown.split())
    for field in settings():
        assert option(field.name) in shown
        # click breaks lines at hyphens too.
        assert field.metadata["help"].replace(" ", "") in told.replace(" ", "")
        assert f"\n{field.metadata['group']}:\n" in shown
    for line in ("drop | error | truncate-prompt | split-text", "(default: 16)", "3 for a base"):
        assert line.replace(" ", "") in told.replace(" ", "")


def test_no_words_show_the_help() -> None:
    for verb in ([], ["lab"]):
        shown = command(*verb)
        assert shown.code == 2
        assert "Commands:" in shown.out + shown.err


def test_version() -> None:
    assert command("--version").out == f"truetune {__version__}\n"


# Options.


@pytest.mark.parametrize("name", [n for n in VALUES if n not in ("model", "data", "output")])
def test_each_option_reaches_the_run_and_beats_the_recipe(
    place: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe that the pipeline is given, with every option once."""
    value, text = VALUES[name]
    given: list[Any] = []
    monkeypatch.setattr(
        "truetune.run.pipeline.train", lambda recipe, *_, **__: given.append(recipe)
    )
    monkeypatch.setattr("truetune.cli.result_screen.show_result", lambda *_: None)
    monkeypatch.setattr("truetune.cli.verbs.ask_first", lambda _: None)  # whether they are there
    file = tmp_path / "r.yaml"
    base: dict[str, Any] = {"model": "m", "data": "d", "output": "o"}
    if isinstance(value, bool) and name != "no_check":
        file.write_text(yaml.safe_dump({**base, name: True}))
        for words, wanted in (([option(name)], True), ([option(f"no_{name}")], False), ([], True)):
            assert command("train", file, *words).code == 0
            assert getattr(given[-1], name) is wanted
        return
    file.write_text(yaml.safe_dump(base))
    words = [option(name)] if name == "no_check" else [option(name), text]
    assert command("train", file, *words).code == 0
    assert getattr(given[-1], name) == value
    assert given[-1].origin(name) == "command line"
    assert given[-1].origin("model") == str(file)


def test_a_recipe_runs_and_the_command_line_wins(place: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {place / 'tiny'}\ndata: nowhere.jsonl\noutput: {tmp_path / 'a'}\nlora: true\n"
        "learning_rate: 1e-3\nper_device_train_batch_size: 2\nbatch_size: 4\nepochs: 3\n"
    )
    shown = command(
        *("train", recipe, "--dataset", place / "rows.jsonl", "--output_dir", tmp_path / "b"),
        *("--no-lora", "--max_steps", "2", "--lr=1e-4"),
    )
    assert (shown.code, shown.err) == (0, "")
    assert not (tmp_path / "a").exists()
    rows = yaml.safe_load((tmp_path / "b" / "recipe.yaml").read_text())
    assert rows["lora"] == {"value": False, "origin": "command line"}
    assert rows["learning_rate"] == {"value": 1e-4, "origin": "command line"}
    assert rows["max_steps"] == {"value": 2, "origin": "command line"}
    assert rows["batch_size"] == {"value": 4, "origin": str(recipe)}
    assert rows["micro_batch_size"] == {"value": 2, "origin": str(recipe)}
    assert "4 examples per step, packed to 2 examples or 1,024 tokens per forward pass" in shown.out
    # What the run recorded is a recipe again, and makes the same run.
    again = command("train", tmp_path / "b" / "recipe.yaml", "-o", tmp_path / "c")
    assert again.code == 0
    first, second = (lines(tmp_path / name / "metrics.jsonl") for name in "bc")
    assert [line.get("loss") for line in first] == [line.get("loss") for line in second]


def test_hugging_face_spellings(place: Path, tmp_path: Path) -> None:
    shown = command(
        *("train", "--model_name_or_path", place / "tiny", "--dataset", place / "rows.jsonl"),
        *("--output_dir", tmp_path / "run", "--num_train_epochs", "1", "--learning_rate", "1e-3"),
        *("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "3"),
        *("--lr_scheduler_type", "linear", "--warmup_ratio", "0.5", "--max_seq_length", "64"),
    )
    assert (shown.code, shown.err) == (0, "")
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    rates = [line["learning_rate"] for line in metrics if "learning_rate" in line]
    assert rates == [1e-3, 1e-3]


def test_model_and_data_given_twice(place: Path) -> None:
    shown = command("train", place / "tiny", place / "rows.jsonl", "--data", "x.jsonl", "-o", "o")
    assert shown.code == 2
    assert "error[given-twice]: the data is given twice" in shown.err


def test_a_recipe_and_data(place: Path, tmp_path: Path) -> None:
    shown = command("train", "r.yaml", place / "rows.jsonl")
    assert shown.code == 2
    assert f"truetune train r.yaml --data {place / 'rows.jsonl'}" in shown.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["trian"], "Did you mean 'train'?"),
        (["train", "m", "d", "--lerning-rate", "1"], "--learning-rate"),
        (["train", "m", "d", "e"], "unexpected extra argument"),
        (["train", "m", "d", "--seed"], "--seed"),
        (["chat"], "MODEL"),
        (["chat", "m", "--max-new-tokens", "x"], "--max-new-tokens"),
        (["lab", "pretrain"], "--output"),
    ],
)
def test_words_that_make_no_command(words: list[str], told: str) -> None:
    shown = command(*words)
    assert shown.code == 2
    assert told in shown.err
    assert "Traceback" not in shown.err
    assert "Error: " in shown.err


def test_the_lines_at_the_end_can_be_pasted(place: Path, tmp_path: Path) -> None:
    import shlex

    run = tmp_path / "my first run"
    shown = command(
        *("train", place / "tiny", place / "rows.jsonl", "-o", run, "--max-steps", "1"),
        *("--lora", "--lora-r", "33"),
    )
    assert shown.code == 0
    found = {
        line.split()[0]: line.strip().partition(" ")[2].strip()
        for line in shown.out.splitlines()
        if line.startswith(("  chat ", "  serve ", "  load ", "  merge ", "  verify "))
    }
    assert shlex.split(found["verify"]) == ["truetune", "verify", str(run)]
    assert shlex.split(found["merge"])[2:] == [str(run), "--merge", "-o", f"{run}-merged"]
    assert found["merge"].endswith(f"'{run}-merged'")
    assert shlex.split(found["chat"]) == ["truetune", "chat", str(run)]
    assert command(*shlex.split(found["chat"])[1:], "--prompt", "x").code == 0
    serve = shlex.split(found["serve"])
    assert serve[:3] == ["vllm", "serve", str(place / "tiny")]
    assert serve[serve.index("--lora-modules") + 1] == f"tuned={run}/adapter"
    assert serve[serve.index("--max-lora-rank") + 1] == "64"
    assert Path(serve[serve.index("--chat-template") + 1]).is_file()
    assert found["load"] == f'AutoPeftModelForCausalLM.from_pretrained("{run}/adapter")'


# The screen.


def test_nothing_leaks_from_the_libraries(tmp_path: Path) -> None:
    """A real process, nothing caught: long rows, casts, shards, generation, an adapter, parquet."""
    import pyarrow
    import pyarrow.parquet

    model = write_model(tmp_path / "tiny", dtype="bfloat16")
    rows = [{"prompt": f"a question that is long {i}", "completion": "a"} for i in range(100)]
    data = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), data)
    train = ["train", str(model), str(data), "--max-steps", "2", "--save-steps", "1"]
    train += ["--no-verify", "-o"]
    run, adapter = str(tmp_path / "run"), str(tmp_path / "adapter")
    program = f"""
import sys
from truetune.cli.verbs import main
for words in (
    {[*train, run]},
    {[*train, adapter, "--lora", "--gradient-checkpointing"]},
    ["chat", {adapter!r}, "--prompt", "x", "--compare", "base", "--max-new-tokens", "3"],
    ["inspect", {adapter!r}],
):
    try:
        main(words)
    except SystemExit as exit:
        assert not exit.code, words
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=600, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", done.stdout)
    stage = re.compile(r" *\d+:\d\d  [a-z' ,]+")
    first = next(line for line in done.stdout.splitlines() if not stage.fullmatch(line))
    assert first.startswith(("note[", "  model"))


def test_rows_beyond_the_tokenizers_length_are_not_remarked_on(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 16
    model = write_model(tmp_path / "tiny", tokenizer=tokenizer)
    rows = [{"prompt": f"a question that is long {i}", "completion": "a"} for i in range(9)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(handler)
    try:
        assert command("train", model, data, "-o", tmp_path / "run", "--max-steps", "1").code == 0
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert told == []


def test_visible() -> None:
    assert visible("a\nb\tc") == "a\nb\tc"
    assert visible("a\nb\tc", keep_newlines=False) == r"a\nb\tc"
    assert visible("\x1b[31m\x07\x9b\u202e\u200b\ud800") == r"\x1b[31m\x07\x9b\u202e\u200b\ud800"
    assert visible("a\u2028b\u2029") == r"a\u2028b\u2029"
    assert visible("[red]ä\U0001f600漢") == "[red]ä\U0001f600漢"


def test_findings_and_tables_are_inert(capsys: pytest.CaptureFixture[str]) -> None:
    evil = "[red]x[/red]\x1b[31m:smile:"
    screen = Screen()
    screen.finding(Finding("c", "note", evil, evil, 1, evil, evil))
    screen.error(BadRows(evil, [Finding("c", "error", evil)]))
    side_by_side(screen, [evil], [[evil]])
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out + shown.err
    safe = "[red]x[/red]\\x1b[31m:smile:"
    assert shown.out.count(safe) == 6
    assert shown.err.count(safe) == 2


def test_many_findings_are_counted_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen()
    for i in range(20):
        screen.finding(Finding(f"c{i}", "note", "x"))
    out = capsys.readouterr().out
    assert out.count("note[") == 12
    assert out.count("more findings are in the run's findings.jsonl") == 1


def test_steps_on_a_screen_that_is_no_terminal(place: Path, tmp_path: Path) -> None:
    shown = command(
        *("train", place / "tiny", place / "rows.jsonl", "-o", tmp_path / "run"),
        *("--max-steps", "40", "--batch-size", "2", "--save-steps", "40"),
    )
    steps = [int(found) for found in re.findall(r"^ +(\d+)/40 ", shown.out, re.MULTILINE)]
    # The first, the last, and between them one each few seconds.
    assert steps[0] == 1
    assert steps[-1] == 40
    assert steps == sorted(set(steps))


@pytest.mark.slow
def test_a_pipe_that_is_closed_early(place: Path) -> None:
    words = [sys.executable, "-m", "truetune.cli.verbs", "inspect", str(place / "tiny"), "--json"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    process.stdout.close()
    assert process.stderr
    err = process.stderr.read()
    process.wait(timeout=60)
    assert "Traceback" not in err


def piped(*words: object, out: Any, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "truetune.cli.verbs", *map(str, words)],
        stdout=out,
        stderr=subprocess.PIPE,
        env={**os.environ, **environment},
        check=False,
        timeout=120,
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is a device of Linux")
def test_output_that_finds_no_room() -> None:
    """What fits into the buffer fails when it is written out, after the verb is done."""
    with Path("/dev/full").open("wb") as full:
        shown = piped("--help", out=full)
    assert (shown.returncode, shown.stderr) == (1, b"error[disk-full]: No space left on device\n")


@pytest.mark.parametrize(
    "words",
    [
        ["train", "embedded", "LONG", "-o", "run"],
        ["train", "LONG", "rows.jsonl", "-o", "run"],
        ["train", "embedded", "rows.jsonl", "-o", "LONG"],
        ["train", "--resume", "LONG"],
        ["chat", "LONG"],
        ["verify", "LONG"],
        ["report", "LONG"],
    ],
)
def test_a_name_that_is_too_long(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text of a row, for example, in place of a file."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", sums(2))
    shown = command(*(word.replace("LONG", "x" * 300) for word in words))
    assert shown.code == 2
    assert "error[name-too-long]" in shown.err or "error[no-run]" in shown.err
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_what_the_system_refuses_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_rows(tmp_path / "my rows.jsonl", sums(2))

    def refuse(path: Path, **_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", refuse)
        shown = command("train", "embedded", rows, "-o", tmp_path / "run")
    assert (shown.code, "error[no-permission]" in shown.err) == (2, True)
    assert of_the_system(OSError(errno.ENOENT, "No such file", "a")) is None
    refused = of_the_system(PermissionError(errno.EPERM, "", str(rows)))
    assert refused is not None
    assert (refused.where, f"ls -ld '{rows}'" in refused.fix) == (str(rows), True)


def test_a_terminal_of_ascii_gets_escapes(place: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "é漢", "completion": "ü"}), encoding="utf-8")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    shown = piped("inspect", place / "tiny", "--data", rows, out=subprocess.PIPE, **ascii_only)
    assert (shown.returncode, shown.stderr) == (0, b"")
    assert b"\\xe9\\u6f22" in shown.stdout


# Memory that is used up.


class PanicException(BaseException):
    """What a library in Rust raises: no Exception, and of a module that cannot be imported."""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 12345 bytes"),
        RuntimeError("can't start new thread"),
        OSError(12, "Cannot allocate memory"),
        SystemError("error return without exception set"),
        PanicException("The global thread pool has not been initialized.: ThreadPoolBuildError"),
    ],
    ids=lambda error: f"{type(error).__name__} {error}"[:30],
)
@pytest.mark.parametrize("stage", ["prepare", "load_start", "Job.train_and_save"])
def test_no_memory_is_an_error_in_words(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, stage: str
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(f"truetune.run.pipeline.{stage}", fails)
    shown = command("train", place / "tiny", place / "rows.jsonl", "-o", tmp_path / "run")
    assert shown.code == 1
    assert "error[out-of-memory]: " in shown.err
    assert "Traceback" not in shown.err
    # What began goes on; what did not left nothing.
    assert (tmp_path / "run").exists() == (stage == "Job.train_and_save")


def test_another_error_is_not_taken_for_memory(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("size mismatch")

    monkeypatch.setattr("truetune.run.pipeline.prepare", fails)
    with pytest.raises(RuntimeError, match="size mismatch"):
        command("train", place / "tiny", place / "rows.jsonl", "-o", tmp_path / "run")


def test_an_unknown_option_is_answered_with_names_that_are_like_it() -> None:
    shown = command("train", "--lerning-rate", "3")
    assert (shown.code, "Possible options: --learning-rate)" in shown.err) == (2, True)
    shown = command("train", "--adapter", "lora")
    assert (shown.code, "Possible" in shown.err) == (2, False)
    assert "No such option: --adapter" in shown.err


def test_ctrl_c_while_the_verbs_are_imported_prints_no_traceback() -> None:
    broken = (
        "import sys, types\n"
        "class Stop:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'truetune.cli.verbs': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Stop())\n"
        "from truetune.cli import main\n"
        "main()\n"
    )
    shown = subprocess.run([sys.executable, "-c", broken], capture_output=True, text=True)
    assert shown.stderr == "interrupted\n"
