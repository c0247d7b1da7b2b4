"""Serve the page of a run to browsers on this machine, during the run and afterwards."""

from __future__ import annotations

import contextlib

from truetune.reporting.facts import RunFacts
from truetune.reporting.html import POLICY
from truetune.reporting.page import page
from truetune.run_dir import RunDir
from truetune.system.local_http import LocalHandler, LocalServer, serving_here

# Seconds after which a browser asks again: while the run goes, and after.
_LIVE, _LATER = 5, 60
# A client that says nothing for so many seconds is let go.
_PATIENCE = 10


def serving(run: RunDir, port: int) -> contextlib.AbstractContextManager[LocalServer]:
    """Open a server of one page on its port.

    Raises:
        UsageError: the port cannot be used.
    """
    return serving_here(_Handler, port, run)


class _Handler(LocalHandler):
    """GET / is the page; every other path, method and host is refused."""

    timeout = _PATIENCE
    headers_of_all = (
        *LocalHandler.headers_of_all,
        ("Content-Security-Policy", f"{POLICY}; frame-ancestors 'none'"),
        ("Referrer-Policy", "no-referrer"),
    )

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        if not self.is_named_rightly():
            return self._send(
                403, "this page is available only to browsers on this machine\n", with_body
            )
        path = self.path.partition("?")[0]
        if path == "/favicon.ico":
            return self._send(204, "", with_body)
        if path != "/":
            return self._send(404, "there is only one page: /\n", with_body)
        facts = RunFacts.read(self.server.subject)
        text = page(facts, refresh=_LIVE if facts.state == "running" else _LATER)
        return self._send(200, text, with_body, "text/html")

    def _send(self, status: int, text: str, with_body: bool, kind: str = "text/plain") -> None:
        body = text.encode("utf-8", errors="backslashreplace")
        self.send(status, body, kind, with_body=with_body)
