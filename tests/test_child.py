"""Child processes: what they do not run, do not inherit and do not survive."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from truetune.system import child

REPORTS = """
import json, os, sys, tempfile
print(json.dumps([tempfile.__file__, dict(os.environ), sys.argv[1:]]))
"""
# One operation in C that never gives the interpreter's lock away.
COMPUTES = "print('ready', flush=True)\npow(9, 9**9)\n"


def _run(file: Path, *words: str, **how: Any) -> Any:
    with child.start(file, *words, stdout=subprocess.PIPE, **how) as process:
        return json.loads(process.communicate(timeout=60)[0])


def _script(folder: Path, text: str) -> Path:
    file = folder / "script_of_a_child.py"
    file.write_text(text)
    return file


@pytest.mark.parametrize("search", [None, "", f"{os.pathsep}/nowhere"])
def test_no_code_of_the_working_folder_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, search: str | None
) -> None:
    (tmp_path / "hostile").mkdir()
    for name in ("tempfile", "json", "sitecustomize", "truetune"):
        (tmp_path / "hostile" / f"{name}.py").write_text("raise SystemExit('taken over')")
    if search is not None:
        monkeypatch.setenv("PYTHONPATH", search)
    monkeypatch.chdir(tmp_path / "hostile")
    module, _, words = _run(_script(tmp_path, REPORTS), "a", "b c")
    assert not module.startswith(str(tmp_path))
    assert words == ["a", "b c"]


def test_secrets_stay_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = """WANDB_API_KEY AWS_SECRET_ACCESS_KEY AWS_ACCESS_KEY_ID OPENAI_API_KEY GITHUB_TOKEN
        MLFLOW_TRACKING_PASSWORD SLACK_WEBHOOK_URL GOOGLE_APPLICATION_CREDENTIALS PGPASSWORD
        AZURE_CLIENT_SECRET""".split()  # noqa: SIM905
    plain = ["HF_HOME", "TOKENIZERS_PARALLELISM", "CUDA_VISIBLE_DEVICES", "KEYBOARD", "OMP_THREADS"]
    for name in [*secrets, *plain, "HF_TOKEN"]:
        monkeypatch.setenv(name, "value")
    script = _script(tmp_path, REPORTS)
    for loads_models in (False, True):
        environment = _run(script, environment={"MORE": "1"}, loads_models=loads_models)[1]
        assert [name for name in secrets if name in environment] == []
        assert [name for name in plain if name not in environment] == []
        assert ("HF_TOKEN" in environment) is loads_models
        assert environment["MORE"] == "1"


_PARENT = """
import os, subprocess, sys, time
from pathlib import Path
from truetune.system import child
process = child.start(Path(sys.argv[1]), stdout=subprocess.PIPE, stdin=subprocess.PIPE)
process.stdout.readline()
if sys.argv[2] == "forks" and not os.fork():
    time.sleep(600)
print(process.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(os.name != "posix", reason="the kernel's signal for a closed pipe")
@pytest.mark.parametrize("parent", ["alone", "forks"])
@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_it_ends_with_its_parent_even_while_it_computes(
    tmp_path: Path, parent: str, ending: signal.Signals
) -> None:
    script = _script(tmp_path, COMPUTES)
    started = subprocess.Popen(
        [sys.executable, "-c", _PARENT, str(script), parent],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert started.stdout
    pid = int(started.stdout.readline())
    os.kill(pid, 0)
    try:
        started.send_signal(ending)
        started.wait(10)
        assert _gone(pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)


def _gone(pid: int) -> bool:
    for _ in range(200):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_it_outlives_the_thread_that_started_it(tmp_path: Path) -> None:
    script = _script(tmp_path, "print(input())")
    started: list[subprocess.Popen[bytes]] = []
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    thread = threading.Thread(target=lambda: started.append(child.start(script, **pipes)))
    thread.start()
    thread.join()
    with started[0] as process:
        assert process.communicate(b"still here\n", timeout=60)[0] == b"still here\n"


def test_a_question_and_its_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # More than a pipe holds, both ways; and nothing is written to the temporary folder.
    (tmp_path / "echoes.py").write_text("import sys\nsys.stdout.write(sys.stdin.read()[::-1])")
    (tmp_path / "fails.py").write_text("raise ValueError('no such thing')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    reply = child.ask("echoes", b"ab" * 300_000)
    assert (reply.data, reply.status) == (b"ba" * 300_000, 0)
    reply = child.ask("fails", b"")
    assert (reply.data, reply.status) == (b"", 1)
    assert reply.errors.endswith("ValueError: no such thing")
