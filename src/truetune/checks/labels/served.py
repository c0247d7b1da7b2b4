"""Rebuild prompts from ids: does any conversation render to what precedes an answer?

input   rows of ids and labels, without the messages that they were made from
does    cuts the text before an answer at what the served template writes between turns, found by
        rendering sentinels; renders the turns again as a server does, under each of the template's
        arguments, and compares
output  findings on rows after a prompt that the template never renders; nothing on rows that cannot
        be split into turns, or if rebuilt prompts of sound rows would differ
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from truetune.checks.labels.facts import LabelFacts, has_header, of_turns, unproved
from truetune.checks.registry import check
from truetune.contract.contract import PromptContract
from truetune.contract.frame import Separators, separators, served_ids
from truetune.contract.tokens import common_prefix
from truetune.errors import TruetuneError
from truetune.findings import Finding, Level, rows_finding, share

# Roles that servers take; a template may write others, which its own text then names.
ROLES = frozenset(
    {"system", "user", "assistant", "tool", "developer", "function", "ipython", "model"}
)
_ROLE = re.compile(r"\b(?:system|user|assistant)\b")
_DATE = re.compile(r"\d{1,2} [A-Z][a-z]{2,8} \d{4}|\d{4}-\d\d-\d\d|[A-Z][a-z]{2,8} \d{1,2}, \d{4}")
_DATE_FORMATS = ("%d %b %Y", "%d %B %Y", "%Y-%m-%d", "%B %d, %Y", "%b %d, %Y")
# Arguments of a template that are tried, and days that rows were rendered on.
_MOST_ARGUMENTS, _MOST_DATES = 8, 4
# Up to this share of the rows they are stragglers.
_STRAGGLERS = 0.01
_SPACE = "different whitespace before the answer"
# Up to this share of the rows it is the answers' own, which began with a line break.
_OWN_SPACE = 0.1

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class _Difference:
    """How a row differs from what is served: its kind, and both texts where they part."""

    kind: str
    ours: str
    theirs: str


class Rebuilder:
    """A contract and the template arguments to try with it."""

    def __init__(
        self, contract: PromptContract, ends: Sequence[str], bos: str, header: tuple[int, ...]
    ) -> None:
        self.contract = contract
        self.header = header
        # Whether the ids of a served prompt stay as they are with an answer behind them.
        self.exact = True
        self.ends = tuple(sorted(filter(None, ends), key=len, reverse=True))
        self.bos = bos
        self.arguments: list[dict[str, Any]] = [{}]
        self.arguments += contract.arguments.candidates()[:_MOST_ARGUMENTS]
        self._dated: dict[str, PromptContract] = {}
        self._known: dict[tuple[str | None, str], Separators | None] = {}

    def difference(
        self, before: str, row: str, opened: Sequence[int] = (), masked: int = 0
    ) -> _Difference | None:
        """How a row differs from each served prompt of its turns; None if it begins with one of
        them, or if its turns cannot be found.

        Args:
            before: the row's text up to what opens the answer.
            row: the whole row.
            opened: the ids after the header of the answer; without them only texts are compared.
            masked: how many of those have no label.
        """
        first: _Difference | None = None
        for contract in self._contracts(before):
            for arguments in self.arguments:
                found = self._under(contract, arguments, before, row, opened, masked)
                if found == "same":
                    return None
                if isinstance(found, _Difference) and (first is None or found.kind == _SPACE):
                    first = found
        return first

    def _contracts(self, before: str) -> Iterator[PromptContract]:
        yield self.contract
        if not self.contract.renderer.reads_date:
            return
        # Rows that were rendered on another day are what is served on that day.
        for text in list(dict.fromkeys(_DATE.findall(before[:4000])))[:_MOST_DATES]:
            if (day := _day(text)) is not None:
                if day not in self._dated:
                    self._dated[day] = replace(self.contract, date=day)
                yield self._dated[day]

    def _under(
        self,
        contract: PromptContract,
        arguments: Mapping[str, Any],
        before: str,
        row: str,
        opened: Sequence[int],
        masked: int,
    ) -> _Difference | str:
        """ "same", "unknown", or how the row differs."""
        cuts = self._separators(contract, arguments)
        if cuts is None:
            return "unknown"
        before, row = before.removeprefix(self.bos), row.removeprefix(self.bos)
        found: _Difference | str = "unknown"
        for loose in (False, True):
            parsed = self._turns(contract, cuts, before, loose=loose)
            if parsed is None:
                continue
            messages, role = parsed
            ids = served_ids(contract, arguments, messages)
            if ids is None:
                continue
            served = contract.tokens.decode(ids).removeprefix(self.bos)
            if row.startswith(served):
                return self._spaced(ids, opened, masked) or "same"
            found = _differing(row, served, cuts, before, role)
            break
        return found

    def _spaced(
        self, served: Sequence[int], opened: Sequence[int], masked: int
    ) -> _Difference | None:
        """The white space between header and answer, by its ids: a line break more is another
        token, and the text still begins as the served one does."""
        at = _last(served, self.header)
        if at is None or not opened or not self.exact:
            return None
        tail, decode = list(served[at + len(self.header) :]), self.contract.tokens.decode
        size = len(tail)
        if list(opened[:size]) == tail:
            if masked <= size or decode(list(opened[size:masked])).strip():
                return None
            # White space without a label belongs to the prompt that was rendered.
            size = masked
        ours, theirs = (
            decode([*self.header, *ids])[-_SEES // 2 :] for ids in (opened[:size], tail)
        )
        return _Difference(_SPACE, ours, theirs)

    def _separators(
        self, contract: PromptContract, arguments: Mapping[str, Any]
    ) -> Separators | None:
        key = contract.date, repr(sorted(arguments.items()))
        if key not in self._known:
            self._known[key] = separators(contract, arguments, self.bos)
        return self._known[key]

    # -------------------------------------------------------------- turns

    def _turns(
        self, contract: PromptContract, cuts: Separators, before: str, *, loose: bool
    ) -> tuple[Messages, str] | None:
        """(the turns of a text that ends with a question, a role in it that no server sends)."""
        find = self._finder(contract, loose=loose)
        turns: Messages = []
        role = ""
        at = 0
        if before.startswith(cuts.head) and cuts.head:
            at = len(cuts.head)
        elif (system := self._system(cuts, before, find)) is not None:
            text, at, role = system
            turns.append({"role": "system", "content": text})
        elif loose and (hit := find(cuts.question, before, 0)) and not before[: hit[0]].strip():
            at, role = hit[1], hit[2]
        elif cuts.head:
            return None
        while True:
            answered = find(cuts.answered, before, at)
            if answered is None:
                break
            asked = find(cuts.asked, before, answered[1])
            if asked is None:
                return None
            turns.append({"role": "user", "content": before[at : answered[0]]})
            said = self._without_end(before[answered[1] : asked[0]])
            turns.append({"role": "assistant", "content": said})
            at, role = asked[1], role or answered[2] or asked[2]
        if role in ROLES or (role and role in contract.renderer.literals):
            return None
        turns.append({"role": "user", "content": before[at:]})
        # What looks like a turn of its own inside a text was not separated.
        opening = cuts.question.strip()
        if opening and any(opening in m["content"] for m in turns):
            return None
        return turns, role

    def _system(
        self, cuts: Separators, before: str, find: Callable[..., tuple[int, int, str] | None]
    ) -> tuple[str, int, str] | None:
        if cuts.system is None:
            return None
        opening, closing = cuts.system
        if not before.startswith(opening) or not closing.strip():
            return None
        hit = find(closing, before, len(opening))
        return None if hit is None else (before[len(opening) : hit[0]], hit[1], hit[2])

    def _finder(
        self, contract: PromptContract, *, loose: bool
    ) -> Callable[[str, str, int], tuple[int, int, str] | None]:
        """(start, end, foreign role) of a separator from a position on."""

        def exact(separator: str, text: str, at: int) -> tuple[int, int, str] | None:
            found = text.find(separator, at) if separator.strip() else -1
            return None if found < 0 else (found, found + len(separator), "")

        def near(separator: str, text: str, at: int) -> tuple[int, int, str] | None:
            if hit := exact(separator, text, at):
                return hit
            if not separator.strip():
                return None
            pattern = loosened(separator, contract.tokens.added_texts)
            hit2 = re.compile(pattern).search(text, at)
            if hit2 is None:
                return None
            usual = _ROLE.search(separator)
            said = hit2.groupdict().get("role") or ""
            return hit2.start(), hit2.end(), "" if usual and said == usual.group() else said

        return near if loose else exact

    def _without_end(self, text: str) -> str:
        """An answer up to the token on which a server stops."""
        for end in self.ends:
            text = text.partition(end)[0]
        return text


def loosened(separator: str, added: Sequence[str]) -> str:
    """A pattern for a separator with different whitespace, or another role in plain letters."""
    tokens = [t for t in sorted(added, key=len, reverse=True) if t.strip() and t in separator]
    pieces = re.split(f"({'|'.join(map(re.escape, tokens))})", separator) if tokens else [separator]
    made, named = "", False
    for piece in pieces:
        if piece in tokens:
            made += re.escape(piece)
            continue
        for part in re.split(r"(\s+)", piece):
            if not part.strip():
                made += r"\s*" if part else ""
            elif not named and tokens and _ROLE.fullmatch(part):
                made, named = made + r"(?P<role>[A-Za-z_]{2,20})", True
            else:
                made += re.escape(part)
    return made


def _day(text: str) -> str | None:
    for form in _DATE_FORMATS:
        try:
            return datetime.strptime(text, form).date().isoformat()
        except ValueError:
            continue
    return None


_SEES = 24


def _differing(row: str, served: str, cuts: Separators, before: str, role: str) -> _Difference:
    at = common_prefix(row, served)
    kind = "another text"
    if role:
        kind = f"the role {role!r}"
    elif at >= len(before) + len(cuts.answered.rstrip()) and cuts.served.strip() != (
        cuts.answered.strip()
    ):
        kind = "an answer without the block that the served prompt opens"
    elif at >= len(before):
        kind = "another beginning of the answer"
    elif cuts.head and not before.startswith(cuts.head[: len(cuts.head) // 2 + 1]):
        kind = "no system message"
    back = max(0, at - 8)
    return _Difference(kind, row[back : at + _SEES], served[back : at + _SEES])


# ------------------------------------------------------------------ the family


@check(unproved, has_header, of_turns)
def prompts_rebuilt(facts: LabelFacts) -> Iterator[Finding]:
    """What precedes an answer is what a server sends for the turns in it."""
    contract, header = facts.frame.contract, facts.frame.answer_start_ids
    if contract is None or facts.compared:
        return
    rebuilder = _sound(facts, contract, header)
    if rebuilder is None:
        return
    bad: dict[str, dict[int, _Difference]] = {}
    judged = 0
    for row in facts.sample:
        found = _judged(facts, rebuilder, row, header)
        if found is None:
            continue
        judged += 1
        if isinstance(found, _Difference):
            bad.setdefault(found.kind, {})[row] = found
    for kind, rows in bad.items():
        if kind == _SPACE and len(rows) <= _OWN_SPACE * judged:
            continue
        yield _report(facts, kind, rows, judged)


def _sound(
    facts: LabelFacts, contract: PromptContract, header: tuple[int, ...]
) -> Rebuilder | None:
    """A rebuilder that finds nothing on sound rows of its own making; else None."""
    tokens = contract.tokens
    bos = tokens.tokenizer.bos_token_id
    ends = [tokens.decode([i]) for i in facts.frame.ends if i >= 0]
    made = Rebuilder(contract, ends, "" if bos is None else tokens.decode([bos]), header)
    asked = [{"role": "user", "content": "What is 2 + 2?\nSay it."}]
    later = [
        *asked,
        {"role": "assistant", "content": "It is 4."},
        {"role": "user", "content": "And 3 + 3 (in words)"},
    ]
    system = [{"role": "system", "content": "Be brief. Be kind"}, *asked]
    looked = 0
    for talk in (asked, later, system):
        try:
            ids = tokens.encode([contract.prompt_text(talk)])[0]
        except TruetuneError:
            continue
        at = _last(ids, header)
        if at is None:
            continue
        looked += 1
        if made.difference(tokens.decode(ids[:at]), tokens.decode(ids) + "Yes.") is not None:
            return None
        for word in ("Yes.", "1", "a"):
            # Where usual answers merge with the prompt, its last ids say nothing.
            joined = tokens.encode([contract.prompt_text(talk) + word])[0]
            made.exact = made.exact and list(joined[: len(ids)]) == list(ids)
    return made if looked else None


def _last(ids: Sequence[int], header: tuple[int, ...]) -> int | None:
    size = len(header)
    hits = [i for i in range(len(ids) - size + 1) if tuple(ids[i : i + size]) == header]
    return hits[-1] if hits else None


def _judged(
    facts: LabelFacts, rebuilder: Rebuilder, row: int, header: tuple[int, ...]
) -> _Difference | bool | None:
    """The first difference of a row's trained answers; False if there is none, None if the
    row has no answer to look at, or was cut."""
    table = facts.table
    ids = table.row_ids(row)
    if len(ids) == facts.cut_at:
        return None
    trained = table.supervised[table.starts[row] : table.starts[row + 1]]
    size = len(header)
    heads = [i for i in range(len(ids) - size + 1) if tuple(ids[i : i + size]) == header]
    ends = [*heads[1:], len(ids)][: len(heads)]
    answers = [a for a, b in zip(heads, ends, strict=True) if trained[a + size : b].any()]
    if not answers:
        return None
    decode = facts.tokens.decode
    thinks = facts.frame.keeps_reasoning is not True and any(
        m in decode(ids) for m in facts.frame.think
    )
    # A template that deletes earlier reasoning is judged by the turns, in `reasoning.py`.
    looked = answers[:1] if thinks else dict.fromkeys([answers[0], answers[-1]])
    whole = decode(ids)
    for at in looked:
        on = trained[at + size :]
        masked = int(on.argmax()) if on.any() else 0
        found = rebuilder.difference(decode(ids[:at]), whole, ids[at + size :], masked)
        if found is not None:
            return found
    return False


def _report(facts: LabelFacts, kind: str, rows: Mapping[int, _Difference], judged: int) -> Finding:
    shown = Counter((d.ours, d.theirs) for d in rows.values()).most_common(1)[0][0]
    everywhere = len(rows) > 0.9 * judged
    level: Level = "error"
    if len(rows) <= _STRAGGLERS * judged or (everywhere and not facts.frame.own_stop_is_terminator):
        # A base model may be served in the form of its rows.
        level = "warning"
    return rows_finding(
        facts.names,
        rows,
        code="prompt-differs",
        level=level,
        what=f"in {share(len(rows), judged)} that were examined, answers follow a prompt that the "
        f"served template never renders: {kind}",
        why=f"the row contains {shown[0]!r} where a server sends {shown[1]!r}"
        + (
            ": the prompts end with it, or the answers begin with it and were joined to their "
            "prompts before tokenization, which yields a different token"
            if kind == _SPACE
            else ""
        ),
        fix="render the rows with the tokenizer's chat template: the prompt with "
        "add_generation_prompt=True, followed by the answer; or save the template of the rows "
        "with the model",
    )
