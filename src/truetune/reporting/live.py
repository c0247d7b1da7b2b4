"""The page of a run, served to browsers of this machine while the run goes and after."""

from __future__ import annotations

import contextlib
import http.server
import os
from collections.abc import Iterator

from truetune.errors import UsageError
from truetune.reporting.facts import RunFacts
from truetune.reporting.html import POLICY
from truetune.reporting.page import page
from truetune.run_dir import RunDir

_HOST = "127.0.0.1"
# Seconds after which a browser asks again: while the run goes, and after.
_LIVE, _LATER = 5, 60
# A client that says nothing for so many seconds is let go.
_PATIENCE = 10


class Server:
    """Serves one page, and nothing else."""

    def __init__(self, run: RunDir, port: int) -> None:
        self._server = _Server((_HOST, port), _Handler)
        self._server.run = run

    @property
    def address(self) -> str:
        return f"http://{_HOST}:{self._server.server_port}"

    def run(self) -> None:
        """Answer until Ctrl-C."""
        with contextlib.suppress(KeyboardInterrupt):
            self._server.serve_forever(poll_interval=0.2)

    def stop(self) -> None:
        """End `run`, from another thread."""
        self._server.shutdown()

    def close(self) -> None:
        self._server.server_close()


@contextlib.contextmanager
def serving(run: RunDir, port: int) -> Iterator[Server]:
    """A server that holds its port.

    Raises:
        UsageError: the port cannot be had.
    """
    try:
        server = Server(run, port)
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"port {port} cannot be used: {getattr(error, 'strerror', None) or error}",
            why="another program serves there",
            fix="name another one with --port, or --port 0 for any that is free",
            code="port-taken",
        ) from error
    try:
        yield server
    finally:
        server.close()


class _Server(http.server.ThreadingHTTPServer):
    run: RunDir
    daemon_threads = True
    # Elsewhere it would let two programs share a port; here it lets one begin again at once.
    allow_reuse_address = os.name == "posix"


class _Handler(http.server.BaseHTTPRequestHandler):
    """GET / is the page; every other path, method and host is refused."""

    server: _Server
    timeout = _PATIENCE
    server_version, sys_version = "truetune", ""

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        port = self.server.server_port
        hosts = {f"{name}{end}" for name in ("localhost", _HOST) for end in ("", f":{port}")}
        named = self.headers.get_all("Host") or []
        if len(named) != 1 or named[0].strip().lower() not in hosts:
            # A name of somebody else that leads here: its pages could read ours.
            return self._send(403, "this page is for browsers of this machine\n", with_body)
        path = self.path.partition("?")[0]
        if path == "/favicon.ico":
            return self._send(204, "", with_body)
        if path != "/":
            return self._send(404, "there is only one page: /\n", with_body)
        facts = RunFacts.read(self.server.run)
        text = page(facts, refresh=_LIVE if facts.state == "running" else _LATER)
        return self._send(200, text, with_body, "text/html")

    def _send(self, status: int, text: str, with_body: bool, kind: str = "text/plain") -> None:
        body = text.encode("utf-8", errors="backslashreplace")
        self.send_response(status)
        for name, value in (
            ("Content-Type", f"{kind}; charset=utf-8"),
            ("Content-Length", str(len(body))),
            ("Content-Security-Policy", f"{POLICY}; frame-ancestors 'none'"),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
            ("Cache-Control", "no-store"),
        ):
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            # A browser that has gone away is no error.
            with contextlib.suppress(OSError):
                self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Requests are not told on the terminal."""
