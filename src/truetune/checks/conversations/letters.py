"""Find texts that were decoded wrongly, or still hold entities of HTML."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from truetune.checks.conversations.rows import (
    DataFacts,
    level_of,
)
from truetune.checks.registry import check
from truetune.data.conversation import Conversation
from truetune.findings import Finding, rows_finding, share

_NOT_ASCII = re.compile(r"[^\x00-\x7f]{2,}")
_ENTITY = re.compile(
    r"&(?:amp|lt|gt|quot|apos|nbsp|hellip|[mn]dash|[lr][sd]quo|copy|eacute|egrave|uuml|ouml|auml"
    r"|ccedil|#\d{2,5}|#[xX][0-9a-fA-F]{2,4});"
)
_ABOUT_MARKUP = re.compile(
    r"</?[a-zA-Z][^<>]*>|\b(?:html|xml|entit(?:y|ies)|escap\w*|href|css)\b|```", re.IGNORECASE
)


@check()
def letters_decoded(facts: DataFacts) -> Iterator[Finding]:
    """No text is UTF-8 that was read in another encoding or lost letters."""
    if rows := _rows_with(facts, _wrongly_decoded):
        example = next(iter(rows.values()))
        yield rows_finding(
            facts.names,
            rows,
            code="text-mojibake",
            level=level_of(rows, len(facts.train)),
            what=f"{share(len(rows), len(facts.train))} contain characters that were decoded "
            f"wrongly, such as {example!r}",
            why="UTF-8 was read as Windows-1252 or Latin-1, or unreadable characters were "
            "replaced: the model learns to write the wrong characters",
            fix="read the source again as UTF-8, or repair the text (the package ftfy does that)",
        )


@check()
def entities_read(facts: DataFacts) -> Iterator[Finding]:
    """No text contains HTML entities unless it is HTML."""
    if rows := _rows_with(facts, _entity_in_prose):
        example = next(iter(rows.values()))
        yield rows_finding(
            facts.names,
            rows,
            code="text-entities",
            level=level_of(rows, len(facts.train)),
            what=f"{share(len(rows), len(facts.train))} contain HTML entities in plain text, such "
            f"as {example!r}",
            why="the text came from web pages and was not unescaped: the model learns to write "
            "&amp; instead of &",
            fix="apply html.unescape to these texts; leave HTML as it is",
        )


def _rows_with(facts: DataFacts, look: Callable[[list[str]], str]) -> dict[int, str]:
    """Rows in whose texts something was found, and what."""
    looked = ((i, look(list(_texts(conversation)))) for i, conversation in enumerate(facts.train))
    return {index: found for index, found in looked if found}


_ABOUT_ENCODINGS = re.compile(
    r"\b(?:utf-?\d+|latin-?1|iso-?8859\S*|(?:cp|windows)-?125\d|mojibake|charsets?"
    r"|(?:character|text|file)?[ -]?encod(?:ing|ings|ed)|decod(?:e|ed|ing)|unicode|garbled)\b",
    re.IGNORECASE,
)


def _wrongly_decoded(texts: list[str]) -> str:
    """What was decoded wrongly, unless the row is about that: it names an encoding, and has the
    right characters as well."""
    if not (found := _first(_mojibake, texts)):
        return ""
    explains = any(map(_ABOUT_ENCODINGS.search, texts))
    meant = (right for text in texts for _, right in _misread(text))
    explained = "\ufffd" in found or any(right in text for right in meant for text in texts)
    return "" if explains and explained else found


def _first(look: Callable[[str], str], texts: Iterable[str]) -> str:
    return next((found for text in texts if (found := look(text))), "")


def _entity_in_prose(texts: list[str]) -> str:
    return "" if any(map(_ABOUT_MARKUP.search, texts)) else _first(_entity, texts)


def _entity(text: str) -> str:
    hit = _ENTITY.search(text) if "&" in text else None
    return text[max(0, hit.start() - 16) : hit.end() + 16] if hit else ""


def _mojibake(text: str) -> str:
    if text.isascii():
        return ""
    if "\ufffd" in text:
        at = text.index("\ufffd")
        return text[max(0, at - 12) : at + 12]
    for found, _ in _misread(text):
        return text[max(0, found.start() - 12) : found.end() + 12]
    return ""


def _misread(text: str) -> Iterator[tuple[re.Match[str], str]]:
    """Characters that are UTF-8 in another reading, and what they mean."""
    for found in _NOT_ASCII.finditer(text):
        for encoding in ("cp1252", "latin-1"):
            try:
                meant = found.group().encode(encoding).decode("utf-8")
            except (UnicodeEncodeError, UnicodeDecodeError):
                continue
            # What is left is a letter or a quotation mark, not again two odd characters.
            if len(meant) < len(found.group()) and meant.isprintable():
                yield found, meant
                break


def _texts(conversation: Conversation) -> Iterator[str]:
    if conversation.text is not None:
        yield conversation.text
    for message in conversation.messages:
        if message["role"] != "tool":
            yield message["content"]
