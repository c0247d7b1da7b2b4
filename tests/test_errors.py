"""The exception tree: exit codes, stable codes, and the tree drawn in the docstring."""

from __future__ import annotations

import ast
import inspect
import itertools
import re
from pathlib import Path

import pytest

import truetune
from truetune import errors
from truetune.errors import BadRows, CheckFailed, NonFiniteLoss, TruetuneError, UsageError
from truetune.findings import Finding

CLASSES = [
    value
    for value in vars(errors).values()
    if inspect.isclass(value)
    and issubclass(value, TruetuneError)
    and not value.__name__.startswith("_")
]


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn: dict[str, tuple[str, int]] = {}
    above: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"([│├└─ ]*)([A-Z]\w+) +(\d+) ", line)
        if found:
            depth = len(found[1]) // 4
            above = [*above[:depth], found[2]]
            drawn[found[2]] = (above[depth - 1] if depth else "Exception", int(found[3]))
    assert set(drawn) == {cls.__name__ for cls in CLASSES}
    for cls in CLASSES:
        parents = [base.__name__ for base in cls.__mro__[1:] if not base.__name__.startswith("_")]
        assert (parents[0], cls.exit_code) == drawn[cls.__name__]


def test_codes_are_kebab_case_and_unlike() -> None:
    codes = [cls.default_code for cls in CLASSES]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", code) for code in codes)


def test_text_has_what_where_why_and_fix() -> None:
    error = UsageError("what", where="here", why="because", fix="do this")
    assert str(error) == "what\n  where  here\n  why    because\n  fix    do this"
    assert str(UsageError("what")) == "what"
    assert error.code == "usage"
    assert UsageError("what", code="own").code == "own"


def test_lines_of_a_part_stand_under_each_other() -> None:
    assert str(UsageError("what", why="one\ntwo")) == "what\n  why    one\n         two"


@pytest.mark.parametrize("cls", [BadRows, CheckFailed])
def test_findings_travel_with_the_error(cls: type[BadRows]) -> None:
    found = [Finding("c", "error", "x")]
    error = cls("what", found, fix="y")
    assert error.findings == found
    assert error.fix == "y"


def test_rows_travel_with_a_non_finite_loss() -> None:
    error = NonFiniteLoss("what", rows=[3, 1], fix="y")
    assert error.rows == (3, 1)
    assert error.fix == "y"


def test_an_unfaithful_template_is_a_value_error_too() -> None:
    assert issubclass(errors.UnfaithfulTemplate, ValueError)


def test_no_text_is_cut_off_from_its_statement() -> None:
    """A second line of a text without brackets is a statement of its own, which does nothing."""
    for path in sorted(Path(truetune.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for part in ("body", "orelse", "finalbody"):
                block = getattr(node, part, None)
                for before, after in itertools.pairwise(block if isinstance(block, list) else ()):
                    lost = isinstance(after, ast.Expr) and (
                        isinstance(after.value, ast.JoinedStr)
                        or isinstance(getattr(after.value, "value", None), str)
                    )
                    # A text after a field describes it.
                    assert not lost or isinstance(before, ast.AnnAssign), (path, after.lineno)
