"""docs/findings.md: what each code says, its likely cause and its fix, read from the sources.

input   the sources
does    finds every Finding, error and refused row; writes its sentences out, with what is filled in
        at run time in angle quotes
output  one section a code; `codes` for the tests
who     make_docs.py
"""

from __future__ import annotations

import ast
import builtins
import itertools
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "truetune"
_FINDINGS = ("Finding", "rows_finding", "_finding", "_say")
# Fields by place, where they are not named.
_FINDING_FIELDS = ("code", "level", "what", "where", "count", "why", "fix")
# Helpers whose result is plain to say.
_CALLS = {"share": "N of M rows", "len": "N", "gib": "N GiB", "percent": "N %"}

# Methods that say less about a value than the value that they are called on.
_CHANGES = ("strip", "splitlines", "items", "values", "format")
# Values of many parts: a function that is called on one of them says more than its name.
_WHOLES = ("facts", "outcome", "rows", "train")
# A table of refusals: a text for each of these fields, with names of values in braces.
_TABLE_FIELDS = ("what", "why", "fix", "code")


@dataclass(frozen=True)
class Site:
    """One place at which a code is raised.

    Attributes:
        kind: finding, error or row error.
        level: of a finding; "" where it depends.
        what, why, fix: their sentences; "" where there is none.
        module: below the package.
    """

    code: str
    kind: str
    level: str
    what: str
    why: str
    fix: str
    module: str


@cache
def sites() -> tuple[Site, ...]:
    """All of them, in the order of the sources."""
    found: list[Site] = []
    for path in sorted(SOURCE.rglob("*.py")):
        module = _Module(_parsed(path))
        for function, call in module.calls:
            found += _sites_of(call, module, function, str(path.relative_to(SOURCE)))
        for table in module.tables():
            found += _tabled(table, module, str(path.relative_to(SOURCE)))
    return tuple(found)


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def finding_codes() -> dict[str, set[str]]:
    """code -> modules, of all findings."""
    found: dict[str, set[str]] = defaultdict(set)
    for site in sites():
        if site.kind == "finding":
            found[site.code].add(site.module)
    return dict(found)


def findings_page() -> str:
    """The page."""
    by_code: dict[str, list[Site]] = defaultdict(list)
    for site in sites():
        by_code[site.code].append(site)
    lines = [
        "# Findings and errors by code",
        "",
        "This page is made from the sources by `make docs`. A *finding* has a level: error,",
        "warning or note (no level is shown here if it depends on the rows). It is",
        "reported with its location, a count, a reason (why) and a fix. A *command error* ends",
        "the command with the exit code of its class (`errors.py`). A *row error* refuses one row",
        "and is counted. Codes are stable. Values that are filled in when a finding is reported",
        "appear in \u2039quotes\u203a. A slash separates alternatives, and text in brackets is not",
        "always shown.",
    ]
    for code, places in sorted(by_code.items()):
        kinds = ", ".join(_kinds(places))
        modules = ", ".join(f"`{name}`" for name in dict.fromkeys(s.module for s in places))
        lines += ["", f"## `{code}`", "", f"{kinds}; {modules}", ""]
        texts = dict.fromkeys((s.what, s.why, s.fix) for s in places)
        for what, why, fix in texts:
            if len(texts) > 1 and not re.sub("\u2039[^\u203a]*\u203a|\\W", "", what + why + fix):
                # It passes on what the others say.
                continue
            lines.append(f"* {_escaped(what)}")
            lines += [f"    * why: {_escaped(why)}"] * bool(why)
            lines += [f"    * fix: {_escaped(fix)}"] * bool(fix)
    return "\n".join(lines) + "\n"


def _kinds(places: list[Site]) -> Iterator[str]:
    """Each kind once, a finding with its levels."""
    levels = dict.fromkeys(s.level for s in places if s.kind == "finding")
    shown = " or ".join(level or "depending on the rows" for level in levels)
    for kind in dict.fromkeys(site.kind for site in places):
        if kind == "error":
            yield "command error"
        else:
            yield f"finding ({shown})" if kind == "finding" and any(levels) else kind


def _escaped(text: str) -> str:
    # What Markdown would take for its own: entities, tables, escapes and emphasis.
    for mark, shown in {
        "\\": "\\\\",
        "&": "&amp;",
        "<": "&lt;",
        "|": "\\|",
        "__": "\\_\\_",
    }.items():
        text = text.replace(mark, shown)
    return text.replace("\n", " ").strip()


# ------------------------------------------------------------------ reading a call


class _Module:
    """A parsed module: its functions by name, and its calls with the function around them."""

    def __init__(self, tree: ast.Module) -> None:
        self.tree = tree
        self.calls = list(self._within(tree, None))
        self.functions = {n.name: n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
        self.constants = _constants(tree)
        # Tables of texts: name -> the values of each row, or key -> text.
        self.rows: dict[str, list[list[ast.expr]]] = {}
        self.texts: dict[str, dict[object, ast.expr]] = {}
        for node in tree.body:
            match node:
                case ast.Assign(
                    targets=[ast.Name(id=name)], value=ast.Dict(keys=keys, values=values)
                ):
                    if all(isinstance(v, ast.Tuple) for v in values):
                        self.rows[name] = [v.elts for v in values if isinstance(v, ast.Tuple)]
                    elif all(map(_is_text, values)):
                        named = [_constant(k) for k in keys if k]
                        self.texts[name] = dict(zip(named, values, strict=True))
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("truetune."):
                path = SOURCE.parent / f"{node.module.replace('.', '/')}.py"
                if path.exists():
                    theirs = _constants(_parsed(path))
                    names = [n.name for n in node.names if n.name in theirs]
                    self.constants |= {name: theirs[name] for name in names}

    def tables(self) -> Iterator[ast.Dict]:
        """Dictionaries whose values are the texts of an error."""
        for node in self.tree.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Dict):
                values = node.value.values
                if all(isinstance(v, ast.Tuple) and len(v.elts) == 4 for v in values):
                    yield node.value

    def _within(
        self, node: ast.AST, function: ast.FunctionDef | None
    ) -> Iterator[tuple[ast.FunctionDef | None, ast.Call]]:
        for child in ast.iter_child_nodes(node):
            inside = child if isinstance(child, ast.FunctionDef) else function
            if isinstance(child, ast.Call):
                yield inside, child
            yield from self._within(child, inside)


def _constants(tree: ast.Module) -> dict[str, ast.expr]:
    """Texts that a module gives a name."""
    return {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and _is_text(node.value)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def _sites_of(
    call: ast.Call, module: _Module, function: ast.FunctionDef | None, name: str
) -> Iterator[Site]:
    called = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
    values = {word.arg: word.value for word in call.keywords if word.arg}
    finding = called in _FINDINGS
    if called == "Check":
        # A check of the verification that failed is reported as a finding.
        match call.args:
            case [check, state, text, *_] if "failed" in map(_constant, ast.walk(state)):
                finding = True
                parts = [ast.FormattedValue(check, -1), ast.Constant(": "), text]
                values = {
                    "code": ast.Constant("verify-failed"),
                    "level": ast.Constant("error"),
                    "what": ast.JoinedStr(parts),
                    "fix": values.get("fix", ast.Constant("")),
                }
            case _:
                return
    elif called == "Finding":
        for field, value in zip(_FINDING_FIELDS, call.args, strict=False):
            values.setdefault(field, value)
    elif called == "BadRow":
        for field, value in zip(("code", "what"), call.args, strict=False):
            values.setdefault(field, value)
    elif not finding and call.args:
        values.setdefault("what", call.args[0])
    codes = _codes(values.get("code"), called)
    if not codes:
        return
    level = values.get("level")
    texts = [values.get(field) for field in ("what", "why", "fix")]
    for bound in _bindings(texts, module, function):
        said = _Said(module, function, bound)
        what, why, fix = map(said.of, texts)
        for code in codes:
            if "code" not in values and re.fullmatch("(\u2039[^\u203a]*\u203a)?", what):
                # It passes on what another error says.
                continue
            yield Site(
                code=code,
                kind="finding" if finding else "row error" if called == "BadRow" else "error",
                level=str(level.value) if finding and isinstance(level, ast.Constant) else "",
                what=what,
                why=why,
                fix=fix,
                module=name,
            )


def _bindings(
    texts: list[ast.expr | None], module: _Module, function: ast.FunctionDef | None
) -> list[dict[str, tuple[_Said, ast.expr]]]:
    """name -> its value, once for each set of values that a function may be given.

    These are the parameters of a function that says what its callers pass, and names that a row
    of a table is unpacked into.
    """
    used = {n.id for text in texts if text for n in ast.walk(text) if isinstance(n, ast.Name)}
    if function is None:
        return [{}]
    for node in ast.walk(function):
        match node:
            case ast.Assign(
                targets=[ast.Tuple(elts=names)],
                value=ast.Subscript(value=ast.Name(id=table)),
            ) if table in module.rows:
                unpacked = [n.id for n in names if isinstance(n, ast.Name)]
                if used & set(unpacked):
                    said = _Said(module, None)
                    return [
                        {n: (said, value) for n, value in zip(unpacked, row, strict=True)}
                        for row in module.rows[table]
                    ]
    parameters = [p.arg for p in function.args.args if p.arg != "self"]
    if not used & set(parameters):
        return [{}]
    found = []
    for caller, call in module.calls:
        match call.func:
            case ast.Name(id=called) | ast.Attribute(value=ast.Name(id="self"), attr=called):
                pass
            case _:
                continue
        if called == function.name and caller is not function and not hasattr(builtins, called):
            given = dict(zip(parameters, call.args, strict=False))
            given |= {word.arg: word.value for word in call.keywords if word.arg}
            said = _Said(module, caller)
            found.append({n: (said, value) for n, value in given.items() if n in used})
    if not any(_is_text(value) for bound in found for _, value in bound.values()):
        return [{}]
    return found


def _codes(node: ast.expr | None, called: str) -> list[str]:
    match node:
        case ast.Constant(value=str(code)) if code:
            return [code]
        case ast.IfExp(body=body, orelse=other):
            return _codes(body, called) + _codes(other, called)
        case None if called in _default_codes():
            return [_default_codes()[called]]
    return []


@cache
def _default_codes() -> dict[str, str]:
    """class -> the code of its errors, where they are raised without one."""
    found = {}
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                for field in node.body:
                    match field:
                        case ast.Assign(
                            targets=[ast.Name(id="default_code")],
                            value=ast.Constant(value=str(code)),
                        ):
                            found[node.name] = code
    return found


def _tabled(table: ast.Dict, module: _Module, name: str) -> Iterator[Site]:
    said = _Said(module, None)
    for row in table.values:
        assert isinstance(row, ast.Tuple)
        what, why, fix, code = (_unbraced(said.of(part)) for part in row.elts)
        yield Site(code, "error", "", what, why, fix, name)


def _unbraced(text: str) -> str:
    """A text for str.format, with its names of values as gaps."""
    filled = re.sub(r"(?<!\{)\{(\w+)(?:![rs])?\}(?!\})", lambda m: _gap(m[1]), text)
    return filled.replace("{{", "{").replace("}}", "}")


class _Said:
    """An expression of text as a person would read it."""

    def __init__(
        self,
        module: _Module,
        function: ast.FunctionDef | None,
        bound: dict[str, tuple[_Said, ast.expr]] | None = None,
    ) -> None:
        self.module = module
        self.function = function
        self.bound = bound or {}
        self._open: set[str] = set()
        # gap -> the expression that fills it
        self._shown: dict[str, str] = {}

    def of(self, node: ast.expr | None) -> str:
        """The text; several, joined by " / ", where it depends."""
        match node:
            case None:
                return ""
            case ast.Constant(value=str(text)):
                return text
            case ast.JoinedStr(values=parts):
                return "".join(self.of(part) for part in parts)
            case ast.FormattedValue(value=inner):
                return self._filled(inner)
            case ast.BinOp(op=ast.Add(), left=left, right=right):
                return self.of(left) + self.of(right)
            case ast.IfExp(body=body, orelse=other):
                return _either(self.of(body), self.of(other))
            case ast.BoolOp(values=[first, *rest]):
                return _either(*map(self.of, [first, *rest]))
            case ast.NamedExpr(value=value):
                return self.of(value)
            case ast.Name(id=name):
                return self._named(name)
            case ast.Call(func=ast.Name(id=name)) if name in self.module.functions:
                return self._returned(name)
            case ast.Call(func=ast.Name(id=name)) if name in _CALLS:
                return _CALLS[name]
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id=table), attr="get"), args=[_, *other]
            ) if table in self.module.texts:
                return _either(*map(self.of, [*self.module.texts[table].values(), *other]))
            case ast.Subscript(value=ast.Name(id=table), slice=ast.Constant(value=key)) if (
                key in self.module.texts.get(table, {})
            ):
                return self.of(self.module.texts[table][key])
            case ast.Call(func=ast.Attribute(value=inner, attr="format")):
                return _unbraced(self.of(inner))
            case ast.Constant():
                return ""
        return self._told_apart(node)

    def _told_apart(self, node: ast.expr) -> str:
        """`_quoted`, with another name for each other value of the same texts."""
        name = _quoted(node)
        if not re.fullmatch("\u2039[^\u203a]*\u203a", name):
            return name
        longer = name
        match node:
            case ast.Attribute(value=ast.Name(id=owner)) if owner != "self":
                longer = _gap(f"{owner} {name[1:-1]}")
            case ast.Subscript(slice=ast.UnaryOp(op=ast.USub())):
                longer = _gap(f"last {name[1:-1]}")
            case ast.Subscript(slice=ast.Constant(value=0)):
                longer = _gap(f"first {name[1:-1]}")
        numbered = (_gap(f"{name[1:-1]} {number}") for number in itertools.count(2))
        for shown in itertools.chain((name, longer), numbered):
            if self._shown.setdefault(shown, ast.dump(node)) == ast.dump(node):
                return shown
        raise AssertionError

    def _filled(self, node: ast.expr) -> str:
        match node:
            case ast.Call(func=ast.Name(id="counted"), args=[_, ast.Constant(value=noun), *more]):
                return f"N {self.of(more[0]) if more else f'{noun}s'}"
            case ast.Call(func=ast.Name(id=name)) if name in _CALLS:
                return _CALLS[name]
            case ast.IfExp(body=body, orelse=other) if _is_text(body) or _is_text(other):
                return _either(self.of(body), self.of(other))
            case ast.Constant(value=value):
                return str(value)
            case ast.Name(id=name) if name in self.module.constants or name in self.bound:
                return self.of(node)
            case ast.Call(func=ast.Name(id=name)) | ast.Attribute(attr=name) if (
                name in self.module.functions and self._says(name)
            ):
                return self._returned(name)
        return self._told_apart(node)

    def _says(self, name: str) -> bool:
        """Whether a function or property returns nothing but texts."""
        function = self.module.functions[name]
        returned = [n.value for n in ast.walk(function) if isinstance(n, ast.Return) and n.value]
        return bool(returned) and all(map(_is_text, returned))

    def _named(self, name: str) -> str:
        """What a local variable or a constant was set to, where that is text."""
        if name in self.bound:
            said, value = self.bound[name]
            return said.of(value)
        if name in self.module.constants:
            return self.of(self.module.constants[name])
        if self.function is None or name in self._open:
            return _gap(name)
        self._open.add(name)
        found = []
        for node in ast.walk(self.function):
            if isinstance(node, ast.Assign):
                targets = [t.id for t in node.targets if isinstance(t, ast.Name)]
                if name in targets and _is_text(node.value):
                    found.append(self.of(node.value))
        self._open.discard(name)
        return _either(*found) if found else _gap(name)

    def _returned(self, name: str) -> str:
        if name in self._open:
            return _gap(name)
        self._open.add(name)
        inner = _Said(self.module, self.module.functions[name])
        inner._open, inner._shown = self._open, self._shown
        found = [
            inner.of(node.value)
            for node in ast.walk(self.module.functions[name])
            if isinstance(node, ast.Return) and node.value is not None and _is_text(node.value)
        ]
        self._open.discard(name)
        return _either(*found) if found else _gap(name)


def _constant(node: ast.AST) -> object:
    return node.value if isinstance(node, ast.Constant) else None


def _is_text(node: ast.expr) -> bool:
    match node:
        case ast.Constant(value=str()) | ast.JoinedStr():
            return True
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            return _is_text(left) or _is_text(right)
        case ast.IfExp(body=body, orelse=other):
            return _is_text(body) or _is_text(other)
    return False


def _either(*texts: str) -> str:
    distinct = list(dict.fromkeys(text for text in texts if text))
    if len(distinct) == 1 and "" in texts:
        return f"[{distinct[0]}]"
    return " / ".join(distinct)


def _quoted(node: ast.expr) -> str:
    """A name for a value that is only there at run time."""
    match node:
        case ast.Name(id=name):
            text = name
        case ast.Attribute(attr=name):
            text = name
        case ast.Subscript(slice=ast.Constant(value=str(key))):
            text = key
        case ast.Subscript(value=value) | ast.Starred(value=value):
            return _quoted(value)
        case ast.Call(func=ast.Attribute(attr="join"), args=[inner, *_]):
            return _quoted(inner)
        case ast.Call(func=ast.Attribute(attr="get"), args=[ast.Constant(value=key), *_]):
            text = str(key)
        case ast.Call(func=ast.Attribute(value=inner), args=[ast.Constant(), *_]):
            return _quoted(inner)
        case ast.Call(func=ast.Name(id="map"), args=[_, inner]):
            return _quoted(inner)
        case ast.Call(func=ast.Name(id="len")):
            return _CALLS["len"]
        case ast.Call(func=ast.Attribute(attr="iterdir")):
            text = "\u2026"
        case ast.Call(func=ast.Attribute(value=inner, attr=name)) if name in _CHANGES:
            return _quoted(inner)
        case ast.Call(func=ast.Name(id=name), args=[inner, *_]):
            called = _quoted(inner)
            return (
                _gap(name)
                if called in map(_gap, _WHOLES) and not hasattr(builtins, name)
                else called
            )
        case ast.Call(args=[inner, *_]):
            return _quoted(inner)
        case ast.Call(func=func):
            return _quoted(func)
        case ast.BinOp(left=left, right=right):
            return _quoted(right if isinstance(left, ast.Constant) else left)
        case ast.GeneratorExp(generators=[ast.comprehension(iter=source), *_]):
            return _quoted(source)
        case ast.Constant(value=value):
            return str(value)
        case _:
            text = "\u2026"
    return _gap(text)


def _gap(name: str) -> str:
    return f"\u2039{name.replace('_', ' ').strip().lower()}\u203a"
