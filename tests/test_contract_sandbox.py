"""Templates that do harm end in a named error; the process that runs them is replaced."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import psutil
import pytest

import tiny_contracts as tiny
from tiny_contracts import byte_level, chat
from truetune import PromptContract, UnfaithfulTemplate
from truetune.contract import sandbox
from truetune.contract.contract import Refused
from truetune.contract.render import Renderer, RenderJob
from truetune.data.conversation import Conversation
from truetune.errors import TruetuneError

pytestmark = pytest.mark.filterwarnings("error")

LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
ATTACKS = {
    "nested loops": LOOPS,
    "a multiplied text": "{{ ('a' ~ messages | length) * 10 ** 10 }}",
    "a text doubled again and again": "{% set ns = namespace(s='aaaaaaaa') %}"
    "{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "a wide format": "{{ '%' ~ 10 ** 10 ~ 'd' }}{{ ('%' ~ 10 ** 10 ~ 'd') % 1 }}",
    "a wide column": "{{ messages[0].content.ljust(10 ** 10) }}",
    "a power folded while compiling": "{{ 9 ** (10 ** 9) }}",
    "a text folded while compiling": "{{ 'a' * 10 ** 10 }}",
    "recursion without end": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "brackets without end": "{{ " + "(" * 200_000 + "1" + ")" * 200_000 + " }}",
}
ROWS = [Conversation(tuple(chat("Hello", f"yes {i}")), f"f:{i}") for i in range(40)]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "DEADLINE", 2.0)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_ends_in_a_named_error_and_the_next_template_works(attack: str) -> None:
    start = time.monotonic()
    errors: list[UnfaithfulTemplate] = []
    try:
        contract = PromptContract.load(byte_level(), tiny.PLAIN + ATTACKS[attack])
        errors = [r.error for r in contract.encode_all(ROWS) if isinstance(r, Refused)]
        assert len(errors) == len(ROWS)
    except UnfaithfulTemplate as error:
        errors = [error]
    # One deadline and a new process or two, and not one a row.
    assert time.monotonic() - start < 30 + 2 * sandbox.DEADLINE
    for error in errors:
        assert error.fix
        assert error.code == "template-out-of-bounds" or "recurses" in error.what
    assert PromptContract.load(byte_level()).renderer.render(ROWS[0].messages).count("yes 0") == 1


@pytest.mark.usefixtures("short")
def test_rows_before_the_one_that_hangs_are_kept_and_others_not_waited_for() -> None:
    hangs = "{% if messages | length > 1 %}" + LOOPS + "{% endif %}"
    renderer = Renderer("{{ messages[0].content }}" + hangs, {})
    jobs = [RenderJob([{"role": "user", "content": str(i)}]) for i in range(600)]
    jobs[550] = RenderJob([{"role": "user", "content": "x"}, {"role": "user", "content": "y"}])
    start = time.monotonic()
    made = renderer.render_many(jobs)
    assert made[:550] == [str(i) for i in range(550)]
    assert all(isinstance(m, UnfaithfulTemplate) for m in made[550:])
    again = renderer.render_many(jobs[:1])
    assert isinstance(again[0], UnfaithfulTemplate)
    assert "does not finish" in again[0].what
    assert time.monotonic() - start < 30


def test_answers_are_in_order_also_where_some_are_refused() -> None:
    source = "{% if messages[0].content == 'no' %}{{ raise_exception('no!') }}{% endif %}"
    renderer = Renderer(source + "{{ messages[0].content }}", {})
    jobs = [
        RenderJob([{"role": "user", "content": "no" if i % 7 == 3 else f"text {i}"}])
        for i in range(1200)
    ]
    for i, made in enumerate(renderer.render_many(jobs)):
        if i % 7 == 3:
            assert isinstance(made, UnfaithfulTemplate)
            assert made.code == "template-refuses"
            assert "no!" in made.what
        else:
            assert made == f"text {i}"


def test_threads_get_their_own_answers() -> None:
    renderer = Renderer("{{ messages[0].content }}", {})
    found: dict[int, Any] = {}

    def ask(number: int) -> None:
        jobs = [RenderJob([{"role": "user", "content": f"{number}.{i}"}]) for i in range(300)]
        found[number] = renderer.render_many(jobs)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: [f"{n}.{i}" for i in range(300)] for n in range(4)}


def test_a_worker_that_was_killed_is_replaced() -> None:
    renderer = Renderer("{{ messages[0].content }}", {})
    assert renderer.render([{"role": "user", "content": "a"}]) == "a"
    before = sandbox._worker
    assert before
    os.kill(before.process.pid, signal.SIGKILL)
    before.process.wait()
    assert renderer.render([{"role": "user", "content": "b"}]) == "b"
    assert sandbox._worker is not before


# Some tenths of a second of processor time.
SLOW = "{% for a in range(700) %}{% for b in range(2000) %}{% endfor %}{% endfor %}"


def _kill_at_work(times: int) -> threading.Thread:
    """The next workers are killed, so many, each when it is ready and has something in hand."""

    def kill() -> None:
        known = None
        for _ in range(times):
            while (worker := sandbox._worker) is known or not worker or worker._ready != ["ready"]:
                time.sleep(0.005)
            process = psutil.Process(worker.process.pid)
            idle = sum(process.cpu_times()[:2])
            while sum(process.cpu_times()[:2]) < idle + 0.05:
                time.sleep(0.005)
            worker.process.kill()
            known = worker

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    return thread


def test_a_worker_that_the_system_kills_is_no_fault_of_the_template() -> None:
    renderer = Renderer(SLOW + "{{ messages[0].content }}", {})
    jobs = [RenderJob([{"role": "user", "content": str(i)}]) for i in range(4)]
    killer = _kill_at_work(1)
    assert renderer.render_many(jobs) == ["0", "1", "2", "3"]
    killer.join()
    # It is not held against it later, either.
    assert renderer.render_many(jobs) == ["0", "1", "2", "3"]


def test_a_template_that_ends_its_process_twice_is_told() -> None:
    renderer = Renderer("{{ messages[0].content }}", {})
    renderer.render([{"role": "user", "content": "a"}])
    killer = _kill_at_work(2)
    with pytest.raises(
        UnfaithfulTemplate, match=r"unexpectedly, twice \(signal SIGKILL\)"
    ) as caught:
        # A text of its own: one that another test saw stopped is not run again.
        Renderer(LOOPS + "twice", {}).render([{"role": "user", "content": "a"}])
    killer.join()
    assert caught.value.code == "template-out-of-bounds"
    assert renderer.render([{"role": "user", "content": "b"}]) == "b"


@pytest.mark.usefixtures("short")
def test_a_crowded_machine_is_no_fault_of_the_template() -> None:
    """The deadline is processor time: a worker that waits for longer than that still answers."""
    renderer = Renderer(SLOW + "{{ messages[0].content }}", {})
    Renderer("{{ messages[0].content }}", {}).render([{"role": "user", "content": "a"}])
    worker = sandbox._worker
    assert worker
    worker.process.send_signal(signal.SIGSTOP)
    threading.Timer(sandbox.DEADLINE + 1, worker.process.send_signal, [signal.SIGCONT]).start()
    assert renderer.render([{"role": "user", "content": "late"}]) == "late"
    assert sandbox._worker is worker


def test_no_template_is_blamed_for_a_worker_that_does_not_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    renderer = Renderer("{{ messages[0].content }}!", {})
    with monkeypatch.context() as patch:
        if sandbox._worker:
            sandbox._worker.kill()
        patch.setattr("truetune.system.child.sys.executable", "/bin/false")
        with pytest.raises(TruetuneError, match="did not start: exit code 1") as caught:
            renderer.render([{"role": "user", "content": "a"}])
    assert caught.value.code == "renderer-not-started"
    assert renderer.render([{"role": "user", "content": "a"}]) == "a!"


# ------------------------------------------------------------------ in processes of their own

BEGIN = f"""
import os, signal, sys, time
from truetune.contract import sandbox
from truetune.contract.render import Renderer
# A shell that puts a job in the background has it ignore interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
good, bad = Renderer("{{{{ messages[0].content }}}}", {{}}), Renderer({LOOPS!r}, {{}})
def said(text):
    return [{{"role": "user", "content": text}}]
print(good.render(said("ready")), sandbox._worker.process.pid, flush=True)
"""


def _run(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", BEGIN + code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _gone(pid: int) -> bool:
    for _ in range(200):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def _worker_of(process: subprocess.Popen[str]) -> int:
    assert process.stdout
    ready, pid = process.stdout.readline().split()
    assert ready == "ready"
    return int(pid)


def test_an_interrupt_ends_the_wait_and_no_answer_is_taken_for_another() -> None:
    process = _run(
        "try:\n"
        "    bad.render(said('x'))\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted', good.render(said('after')), flush=True)\n"
    )
    worker = _worker_of(process)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (out, process.returncode) == ("interrupted after\n", 0), err
    assert _gone(worker)


def test_a_process_that_ends_takes_its_worker_along() -> None:
    process = _run("sys.exit(3)")
    worker = _worker_of(process)
    process.communicate(timeout=60)
    assert process.returncode == 3
    assert _gone(worker)
    # Not even where it had no time to say goodbye: its pipe is closed.
    process = _run("time.sleep(600)")
    worker = _worker_of(process)
    process.kill()
    process.communicate(timeout=60)
    assert _gone(worker)


def test_a_forked_process_has_a_worker_of_its_own() -> None:
    process = _run(
        "child = os.fork()\n"
        "if not child:\n"
        "    print('child', good.render(said('a')), sandbox._worker.owner == os.getpid(),"
        " flush=True)\n"
        "    sandbox._stop()\n"
        "    os._exit(0)\n"
        "print('parent', good.render(said('b')), os.waitpid(child, 0)[1],"
        " good.render(said('c')), flush=True)\n"
    )
    worker = _worker_of(process)
    out, err = process.communicate(timeout=120)
    assert sorted(out.splitlines()) == ["child a True", "parent b 0 c"], err
    assert _gone(worker)


@pytest.mark.parametrize(
    "reach",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ messages.append({}) }}",
        "{{ messages[0].update(a=1) }}",
        "{{ messages[0].get.__self__.keys() }}",
        "{{ cycler.__init__.__globals__ }}",
    ],
)
def test_what_the_sandbox_forbids_it_forbids_each_time(reach: str) -> None:
    allowed = "{{ messages[0].get('role') }}{{ messages[0].items() | list | length }}"
    jobs = [RenderJob([{"role": "user", "content": str(n)}]) for n in range(3)]
    for made in Renderer(allowed, {}).render_many(jobs):
        assert made == "user2"
    for made in Renderer(allowed + reach, {}).render_many(jobs):
        assert isinstance(made, UnfaithfulTemplate)
        assert "unsafe" in made.what
