"""The page of a run, live: one page, for browsers of this machine, and nothing else."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from run_folders import EVIL, files, write_run
from tiny_runs import command
from truetune.reporting.live import serving
from truetune.run_dir import LOCK, RunDir
from truetune.system.local_http import LocalServer
from truetune.system.lock import hold, is_alive


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "secret.txt").write_text("the password")
    return write_run(tmp_path / "run", files(EVIL))


@pytest.fixture
def server(run: Path) -> Iterator[LocalServer]:
    with serving(RunDir(run), 0) as made:
        thread = threading.Thread(target=made.run, daemon=True)
        thread.start()
        yield made
        made.stop()
        thread.join(10)


def port_of(server: LocalServer) -> int:
    return int(server.address.rpartition(":")[2])


def ask(
    server: LocalServer, path: str = "/", method: str = "GET", host: str | None = None
) -> http.client.HTTPResponse:
    link = http.client.HTTPConnection("127.0.0.1", port_of(server), timeout=20)
    link.putrequest(method, path, skip_host=host is not None)
    if host:
        link.putheader("Host", host)
    link.endheaders()
    return link.getresponse()


def state(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.rglob("*"))}


def test_the_page_is_made_anew_for_each_request(server: LocalServer, run: Path) -> None:
    before = state(run)
    answer = ask(server)
    first = answer.read().decode()
    assert answer.status == 200
    assert "run: finished" in first.replace('<span class="verdict good">', "")
    assert "default-src 'none'" in str(answer.headers["Content-Security-Policy"])
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert "<script" not in first
    assert state(run) == before
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 101, "loss": 0.125}\n{"step": 102, "lo')
    assert "step 101" in ask(server).read().decode()
    head = ask(server, method="HEAD")
    assert (head.status, head.read()) == (200, b"")


def test_a_run_at_work_is_asked_for_more_often(server: LocalServer, run: Path) -> None:
    assert 'http-equiv="refresh" content="60"' in ask(server).read().decode()
    (run / "manifest.json").unlink()
    assert "not finished" in ask(server).read().decode()
    with hold(run / LOCK):
        text = ask(server).read().decode()
    assert "running" in text
    assert 'http-equiv="refresh" content="5"' in text


@pytest.mark.parametrize(
    "path",
    [
        *(
            "/secret.txt",
            "/../secret.txt",
            "/%2e%2e/secret.txt",
            "/..%2fsecret.txt",
            "//etc/passwd",
        ),
        *("/metrics.jsonl", "/recipe.yaml", "/model/config.json", "/./", "/index.html"),
        *("../secret.txt", "http://127.0.0.1/../secret.txt", "/\\..\\secret.txt", "*"),
    ],
)
def test_nothing_else_is_served(server: LocalServer, path: str) -> None:
    answer = ask(server, path)
    assert answer.status == 404
    assert answer.read() == b"there is only one page: /\n"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_nothing_can_be_changed(server: LocalServer, method: str) -> None:
    assert ask(server, method=method).status == 501


def test_other_hosts_are_refused(server: LocalServer) -> None:
    port = port_of(server)
    for host in ("localhost", "127.0.0.1", f"localhost:{port}", f"127.0.0.1:{port}", "LOCALHOST"):
        assert ask(server, host=host).status == 200, host
    for host in (
        *("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "localhost.evil"),
        *(f"127.0.0.1:{port + 1}", "0.0.0.0", "[::1]", "localhost:", "127.0.0.1:80"),
    ):
        answer = ask(server, host=host)
        assert answer.status == 403, host
        assert b"run" not in answer.read()


def raw(server: LocalServer, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port_of(server)), timeout=20) as link:
        link.sendall(request)
        link.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: link.recv(65536), b""))


def test_requests_that_no_browser_sends(server: LocalServer) -> None:
    assert b" 403 " in raw(server, b"GET / HTTP/1.1\r\n\r\n")
    two = b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n"
    assert b" 403 " in raw(server, two)
    assert b"password" not in raw(server, b"GET /../secret.txt HTTP/1.0\r\nHost: localhost\r\n\r\n")
    assert b" 400 " in raw(server, b"\x00\xff\r\n\r\n")
    assert ask(server).status == 200


def test_it_listens_on_this_machine_alone(server: LocalServer) -> None:
    assert server._server.server_address[0] == "127.0.0.1"


def test_a_port_that_is_taken(run: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        told = command("watch", run, "--port", port)
    assert told.code == 2
    assert f"error[port-taken]: port {port} cannot be used" in told.err
    assert "--port 0" in told.err
    assert command("watch", run, "--port", 70_000).code == 2
    told = command("watch", run.parent)
    assert told.code == 2
    assert "error[no-run]" in told.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_the_port_is_free_again(run: Path, number: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "truetune", "watch", str(run), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout
    address = process.stdout.readline().split()[0]
    port = int(address.rpartition(":")[2])
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    link.request("GET", "/")
    assert link.getresponse().status == 200
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (128 + number, "interrupted\n")
    with serving(RunDir(run), port):
        pass


def test_who_holds_a_lock_is_seen_without_taking_it(tmp_path: Path) -> None:
    lock = tmp_path / LOCK
    assert not is_alive(lock)
    with hold(lock):
        assert is_alive(lock)
    assert not is_alive(lock)
    # Of this machine and dead; of another one, by its last sign of life.
    from truetune.system.lock import _this

    dead = vars(_this()) | {"pid": 2**22 + 1}
    lock.write_text(json.dumps(dead))
    assert not is_alive(lock)
    lock.write_text(json.dumps(dead | {"machine": "another"}))
    assert is_alive(lock)
    os.utime(lock, (time.time() - 9000,) * 2)
    assert not is_alive(lock)
    assert [p.name for p in tmp_path.iterdir()] == [LOCK]


def test_a_number_without_measure_ends_no_answer(server: LocalServer, run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1' + "0" * 400 + ', "loss": 1.0}\n')
    answer = ask(server)
    assert answer.status == 200
    assert "1 lines of metrics.jsonl are damaged" in answer.read().decode()
