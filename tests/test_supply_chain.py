"""What is shipped, and what it stands on: licences, advisories, a wheel that is built twice."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from scripts import supply_chain
from scripts.supply_chain import NotDone, installed, is_allowed, judged, licence_of

ROOT = Path(__file__).resolve().parents[1]


def test_the_licences_of_all_that_is_installed() -> None:
    names = [name for name, _ in installed("truetune")]
    assert {"truetune", "torch", "transformers", "numpy"} <= set(names)
    # Tools of development and extras are not passed on.
    assert not {"pytest", "mypy", "bitsandbytes"} & set(names)
    assert "MIT" in supply_chain.licences()


@pytest.mark.parametrize(
    ("words", "allowed"),
    [
        (["Apache-2.0"], True),
        (["Apache Software License", "MIT License"], True),
        (["Apache-2.0 WITH LLVM-exception AND BSD-2-Clause"], True),
        (["MIT OR GPL-3.0-only"], True),
        (["MIT AND GPL-3.0-only"], False),
        (["GNU General Public License v3 (GPLv3)"], False),
        (["see LICENSE"], False),
        ([], False),
    ],
)
def test_a_licence_that_is_not_on_the_list_is_refused(words: list[str], allowed: bool) -> None:
    assert is_allowed(words) == allowed


def test_a_package_with_another_licence_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def licence(package: Any) -> list[str]:
        return ["GPL-3.0-only"] if package.name == "numpy" else licence_of(package)

    monkeypatch.setattr(supply_chain, "licence_of", licence)
    with pytest.raises(SystemExit, match=r"numpy: GPL-3\.0-only"):
        supply_chain.licences()


SOUND = {"name": "numpy", "version": "2.4.6", "vulns": []}
SKIPPED = {"name": "rich", "skip_reason": "Dependency not found on PyPI"}
KNOWN = {
    "name": "Jinja2",
    "version": "3.1.5",
    "vulns": [{"id": "GHSA-cpwx", "fix_versions": ["3.1.6"]}],
}


def test_an_audit_says_what_it_knows() -> None:
    assert judged([SOUND, SOUND]) == "2 pins, no known vulnerability"
    with pytest.raises(SystemExit, match=r"Jinja2 3\.1\.5: GHSA-cpwx, fixed in 3\.1\.6"):
        judged([SOUND, KNOWN])


def test_an_audit_that_could_ask_nobody_is_none() -> None:
    """pip-audit ends with 0 there, and with the words that nothing is known."""
    with pytest.raises(NotDone, match="cannot be reached"):
        judged([SKIPPED, SKIPPED])
    with pytest.raises(SystemExit, match="does not know rich"):
        judged([SOUND, SKIPPED])


@pytest.mark.slow
def test_a_wheel_is_built_twice_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout: what is committed cannot be told")
    if subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", tmp_path, "setuptools"],
        capture_output=True,
        check=False,
    ).returncode:
        pytest.skip("a build needs setuptools from a package index, and none can be reached")
    monkeypatch.setattr(supply_chain, "DIST", tmp_path / "dist")
    assert "equal bit for bit" in supply_chain.wheel()
    (wheel,) = (tmp_path / "dist").iterdir()
    assert wheel.name.startswith("truetune-")
