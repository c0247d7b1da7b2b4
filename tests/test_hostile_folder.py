"""A working folder full of strangers' modules: no verb runs one of them."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import truetune
from tiny_models import write_model
from tiny_runs import sums, write_rows
from truetune.verification.fresh import VerifyError, ask

# Of Python itself, and of the libraries: each is imported by one of the processes.
NAMES = (
    "tempfile",
    "json",
    "random",
    "torch",
    "inspect",
    "typing",
    "yaml",
    "transformers",
    "jinja2",
)
SCRIPT = Path(sys.executable).with_name("truetune")


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: each module writes its name, and stops whoever imports it."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    for name in NAMES:
        (folder / f"{name}.py").write_text(
            f"open({str(folder / 'ran')!r}, 'a').write({name!r} + ' ')\nraise ImportError('ran')\n"
        )
    monkeypatch.chdir(folder)
    return folder


def ran(folder: Path) -> str:
    path = folder / "ran"
    return path.read_text() if path.exists() else ""


def verb(*words: object, through: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    started = through or (str(SCRIPT),)
    if not through and not SCRIPT.exists():
        started = (sys.executable, "-P", "-m", "truetune")
    return subprocess.run(
        [*started, *map(str, words)],
        capture_output=True,
        text=True,
        input="hello\n",
        env=environment,
        timeout=1200,  # a hang, and not a crowded machine
        check=False,
    )


def test_the_fresh_process_takes_no_module_from_the_working_folder(
    hostile: Path, tmp_path: Path
) -> None:
    with pytest.raises(VerifyError) as told:
        ask({"artifact": {"folder": str(tmp_path / "none")}, "rows": []})
    assert told.value.code == "model-not-found"
    assert ran(hostile) == ""


def test_python_dash_m_takes_none_either(hostile: Path) -> None:
    shown = verb("train", "nowhere", "none.jsonl", through=(sys.executable, "-m", "truetune"))
    assert (shown.returncode, ran(hostile)) == (2, ""), shown.stderr


def test_each_process_is_started_with_a_safe_path() -> None:
    """Every start of Python in the package has -P (or -I) as its first option, and there is one
    place that starts it."""
    starts = 0
    for path in sorted(Path(truetune.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.List) and "sys.executable" in [
                ast.unparse(entry) for entry in node.elts
            ]:
                words = [ast.unparse(entry) for entry in node.elts]
                at = words.index("sys.executable")
                assert words[at + 1] in ("'-P'", "'-I'"), f"{path}: {words}"
                starts += 1
    assert starts == 1


@pytest.mark.slow
def test_every_verb(hostile: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "tiny", dtype="bfloat16")
    data = write_rows(tmp_path / "rows.jsonl", sums(30))
    run = tmp_path / "run"
    short = ("--max-steps", 1, "--batch-size", 2)
    for words in (
        ("inspect", model),
        ("inspect", model, "--data", data),
        ("check", model, data),
        ("check", model, data, "--rehearse"),
        ("train", model, data, "--lora", "-o", run, *short),
        ("verify", run),
        ("chat", run, "--max-new-tokens", 2, "--prompt", "1+1?"),
        ("export", run, "--merge", "-o", tmp_path / "merged"),
        ("inspect", run, "--data", data, "--html", tmp_path / "rows.html"),
        ("check", run),
        ("verify", tmp_path / "merged"),
        ("chat", run, "--max-new-tokens", 2),  # a question from standard input
        ("train", "--resume", run),
        ("lab", "evaluate", "--help"),
        ("quickstart", "--help"),
        ("train", "--help"),
    ):
        shown = verb(*words)
        assert ran(hostile) == "", (words, shown.stderr)
        finished = 2 if "--resume" in words else 0
        assert shown.returncode in (finished, 1), (words, shown.stderr)
        assert "Traceback" not in shown.stderr, words
