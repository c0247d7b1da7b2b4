"""What is shipped, and what it stands on: `make supply-chain`.

    python scripts/supply_chain.py [wheel] [licences] [audit] [sbom] [--required]

wheel       builds the wheel twice from what is committed, in two folders, and compares the bits
licences    the licence of every package that an installation brings along, held to an allow list
audit       the pins of constraints.txt against the advisory database of PyPI (pip-audit)
sbom        a CycloneDX bill of materials of that installation (cyclonedx-py)
--required  where the network is missing, fail; without, say so and go on

Without a word: all four. The wheel and the bill are written to dist/. Tools live in an environment
of their own (.venv-supply), beside the pins that they judge.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
TOOLS = ("pip-audit==2.10.1", "cyclonedx-bom==7.5.0")
_TOOLS_IN = ROOT / ".venv-supply"

# Licences under which all that truetune stands on may be used and passed on as it is. MPL-2.0 binds
# changed files of its own package alone.
ALLOWED = frozenset(
    """0BSD Apache-2.0 BSD BSD-2-Clause BSD-3-Clause BSL-1.0 CC0-1.0 CNRI-Python ISC LLVM-exception
    MIT MPL-2.0 PSF-2.0 Zlib""".split()  # noqa: SIM905
)
# What packages write that name no licence as SPDX does.
_SAME = {
    "apache": "Apache-2.0",
    "apache 2.0": "Apache-2.0",
    "apache 2.0 license": "Apache-2.0",
    "apache software license": "Apache-2.0",
    "bsd license": "BSD",
    "isc license": "ISC",
    "isc license (iscl)": "ISC",
    "mit license": "MIT",
    "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0",
    "python software foundation license": "PSF-2.0",
}


class NotDone(Exception):
    """It could not be found out here."""


# Wheel.


def wheel() -> str:
    clock = _said("git", "log", "-1", "--format=%ct").strip()
    with tempfile.TemporaryDirectory() as folder:
        made = [_built(Path(folder) / name, clock) for name in ("one", "a-longer-name")]
        digests = {hashlib.sha256(path.read_bytes()).hexdigest() for path in made}
        if len(digests) > 1 or made[0].name != made[1].name:
            raise SystemExit(f"wheel: two builds of one commit differ: {sorted(digests)}")
        DIST.mkdir(exist_ok=True)
        shutil.copy(made[0], DIST)
    return f"two builds are equal bit for bit: {made[0].name}, sha256 {digests.pop()}"


def _built(folder: Path, clock: str) -> Path:
    """A wheel of what is committed; files have the time of the last commit."""
    source = folder / "source"
    source.mkdir(parents=True)
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, capture_output=True)
    subprocess.run(["tar", "-x", "-C", str(source)], input=archive.stdout, check=True)
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"),
            *("--wheel-dir", str(folder / "out"), str(source)),
        ],
        env={**os.environ, "SOURCE_DATE_EPOCH": clock, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        check=True,
    )
    (found,) = (folder / "out").glob("*.whl")
    return found


# Licences.


def licences() -> str:
    found = {name: licence_of(package) for name, package in installed("truetune")}
    strange = [
        f"{name}: {'; '.join(words) or 'none is stated'}"
        for name, words in found.items()
        if not is_allowed(words)
    ]
    if strange:
        raise SystemExit("licences that are not on the list:\n  " + "\n  ".join(strange))
    counted: dict[str, int] = {}
    for words in found.values():
        for word in {part for text in words for part in _parts(text)}:
            counted[word] = counted.get(word, 0) + 1
    most = sorted(counted.items(), key=lambda item: (-item[1], item[0]))
    return f"{len(found)} packages: " + ", ".join(f"{count} {name}" for name, count in most)


def installed(name: str) -> Iterator[tuple[str, metadata.Distribution]]:
    """A package and all that it needs, extras left out."""
    from packaging.requirements import Requirement

    waiting, seen = [name], set()
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        package = metadata.distribution(name)
        yield name, package
        for text in package.requires or []:
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                waiting.append(needed.name)


def licence_of(package: metadata.Distribution) -> list[str]:
    """What a package says of its licence: the expression, else classifiers, else free words."""
    told: Any = package.metadata
    if expression := told.get("License-Expression"):
        return [expression]
    classifiers = [c.rpartition("::")[2].strip() for c in told.get_all("Classifier") or []
                   if c.startswith("License ::")]  # fmt: skip
    if classifiers:
        return classifiers
    words = (told.get("License") or "").strip()
    return [words.splitlines()[0]] if words else []


def is_allowed(words: list[str]) -> bool:
    """Of an expression with OR one side is enough; that is read as well as it is written."""
    return bool(words) and all(
        any(
            all(part in ALLOWED for part in _parts(choice))
            for choice in re.split(r"\s+OR\s+", text)
        )
        for text in words
    )


def _parts(text: str) -> list[str]:
    parts = re.split(r"\s+(?:AND|OR|WITH)\s+", _SAME.get(text.lower(), text))
    return [part.strip("() ") for part in parts]


# Vulnerabilities.


def audit() -> str:
    """Raises:
    NotDone: no pin could be asked about.
    """
    done = subprocess.run(
        [
            *(str(_tool("pip-audit")), "--no-deps", "--disable-pip", "--progress-spinner", "off"),
            *("--format", "json", "--requirement", str(ROOT / "constraints.txt")),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        pins = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError) as error:
        raise NotDone(f"pip-audit gave no answer: {done.stderr.strip()[-300:]}") from error
    return judged(pins)


def judged(pins: list[dict[str, Any]]) -> str:
    """pip-audit's own verdict is "no known vulnerabilities" also where it could ask nobody.

    Raises:
        NotDone: no pin could be asked about.
    """
    skipped = [pin["name"] for pin in pins if "skip_reason" in pin]
    if len(skipped) == len(pins):
        raise NotDone("the advisory database of PyPI cannot be reached from here")
    known = [
        f"{pin['name']} {pin['version']}: {found['id']}"
        + (f", fixed in {', '.join(found['fix_versions'])}" if found["fix_versions"] else "")
        for pin in pins
        for found in pin.get("vulns", [])
    ]
    if known:
        raise SystemExit("known vulnerabilities:\n  " + "\n  ".join(known))
    if skipped:
        raise SystemExit(f"the database does not know {', '.join(skipped)}")
    return f"{len(pins)} pins, no known vulnerability"


# Bill of materials.


def sbom() -> str:
    DIST.mkdir(exist_ok=True)
    path = DIST / "sbom.json"
    clock = _said("git", "log", "-1", "--format=%ct").strip()
    subprocess.run(
        [
            *(str(_tool("cyclonedx-py")), "environment", "--pyproject", "pyproject.toml"),
            *("--output-reproducible", "--output-file", str(path), sys.executable),
        ],
        cwd=ROOT,
        env={**os.environ, "SOURCE_DATE_EPOCH": clock},
        check=True,
    )
    bill = json.loads(path.read_text(encoding="utf-8"))
    return f"{len(bill['components'])} components: {path.relative_to(ROOT)}"


def _tool(name: str) -> Path:
    """A tool in an environment of its own.

    Raises:
        NotDone: it cannot be installed.
    """
    path = _TOOLS_IN / "bin" / name
    if not path.exists():
        venv.create(_TOOLS_IN, with_pip=True)
        pip = [str(_TOOLS_IN / "bin" / "python"), "-m", "pip", "install", "--quiet", *TOOLS]
        if subprocess.run(pip, check=False, capture_output=True).returncode:
            raise NotDone(f"{' and '.join(TOOLS)} cannot be installed from here")
    return path


def _said(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def main() -> None:
    steps = {"wheel": wheel, "licences": licences, "audit": audit, "sbom": sbom}
    parser = argparse.ArgumentParser()
    parser.add_argument("step", nargs="*", choices=[[], *steps], default=[])
    parser.add_argument("--required", action="store_true")
    arguments = parser.parse_args()
    for name in arguments.step or steps:
        try:
            print(f"{name}: {steps[name]()}", flush=True)
        except NotDone as error:
            if arguments.required:
                raise SystemExit(f"{name}: {error}") from error
            print(f"{name}: NOT DONE: {error}", flush=True)


if __name__ == "__main__":
    main()
