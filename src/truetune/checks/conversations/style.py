"""Find answers of more than one style, and rows whose text contains another chat format."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator

from truetune.checks.conversations.rows import DataFacts, begins_with_reasoning
from truetune.checks.registry import check
from truetune.data.conversation import Conversation
from truetune.findings import Finding, percent, rows_finding, share

# On a smaller share of the rows a habit is chance; on a larger one it is the style.
_SOME, _MOST = 0.01, 0.6
_LEAST_ROWS = 3
# Of an opening: the least share of the rows that sampled answers were seen to repeat (docs/lab.md).
_APED = 0.02
# Words that make an opening the same one, and questions that are compared.
_OPENING_WORDS, _MOST_ASKED, _MOST_COMPARED = 3, 100, 2000

# Openers that say nothing about the answer and come from another assistant's manner.
_FILLER = re.compile(
    r"(?:sure(?: thing)?|certainly|absolutely|of course|definitely|great question|good question"
    r"|no problem|happy to help|i'?d be happy to(?: help)?"
    r"|okay|ok|alright|nat\u00fcrlich|gerne|klar"
    r"|claro(?: que s\u00ed)?|por supuesto|bien s\u00fbr|certo|certamente|\u5f53\u7136|\u597d\u7684"
    r"|\u3082\u3061\u308d\u3093)(?=\s*[,.!:;\uff0c\u3002\uff01-])",
    re.IGNORECASE,
)
# Any short opener with an exclamation mark: "Great!", "What a nice idea!"
_CALL = re.compile(r"(\w[\w' ]{0,30})[!\uff01](?=\s)")


@check()
def openers_alike(facts: DataFacts) -> Iterator[Finding]:
    """No opening phrase is used by some answers and not by most."""
    # The first answer: later ones answer thanks and small talk.
    answers = {i: text.lstrip() for i, text in enumerate(facts.first_answers) if text.strip()}
    by_opener: dict[str, list[int]] = defaultdict(list)
    for index, text in answers.items():
        if opener := _opener(text[:60]):
            by_opener[opener].append(index)
    rows = sorted(i for group in by_opener.values() for i in group)
    part = len(rows) / max(len(answers), 1)
    if len(rows) < _LEAST_ROWS or not _APED <= part <= _MOST:
        return
    groups = sorted(by_opener.items(), key=lambda group: -len(group[1]))
    others = sum(len(group) for _, group in groups[3:])
    shown = [f"{opener!r} ({len(group):,})" for opener, group in groups[:3]]
    shown += [f"others ({others:,})"] if others else []
    fixed = _fixed_opening(answers, rows)
    random = bool(fixed) and not _asked_for(facts, answers, fixed)
    yield rows_finding(
        facts.names,
        rows,
        code="openers-mixed",
        level="warning" if random else "note",
        what=f"{percent(part)} of the answers open with a filler phrase and the others do not: "
        f"{', '.join(shown)}",
        why=(
            f"{len(fixed):,} of them begin with the same words, and their questions do not differ "
            "from those that are answered without them: "
            if random
            else ""
        )
        + "a tuned model that samples uses an opening about as often as its rows do (docs/lab.md); "
        "greedy decoding hides that",
        fix="remove the opening from these answers"
        if random
        else "nothing to do if the questions call for it; otherwise remove it from these answers",
    )


def _fixed_opening(answers: dict[int, str], rows: list[int]) -> list[int]:
    """The rows that begin with the same words, where enough do; else []."""
    by_words: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        words = _OPENING.findall(answers[row][:80].lower())[:_OPENING_WORDS]
        by_words[" ".join(words)].append(row)
    most = max(by_words.values(), key=len)
    return most if len(most) >= max(_LEAST_ROWS, _APED * len(answers)) else []


_OPENING = re.compile(r"[^\W_]+")


def _asked_for(facts: DataFacts, answers: dict[int, str], rows: list[int]) -> bool:
    """Whether the questions call for an opening: the nearest question of another row is answered
    with it far more often than any question is."""
    asked = {
        i: frozenset(_OPENING.findall(_question(facts.train[i])[:600].lower())) for i in answers
    }
    have = set(rows)
    step = max(1, len(asked) // _MOST_COMPARED)
    pool = list(asked)[::step]
    looked = rows[:: max(1, len(rows) // _MOST_ASKED)]
    hits = expected = 0.0
    for row in looked:
        # The same question again says nothing.
        others = [i for i in pool if asked[i] != asked[row]]
        if not others or not asked[row]:
            continue
        nearest = max(others, key=lambda i: len(asked[i] & asked[row]) / len(asked[i] | asked[row]))
        hits += nearest in have
        expected += sum(i in have for i in others) / len(others)
    return hits > expected + 2 * max(expected, 1) ** 0.5


def _question(conversation: Conversation) -> str:
    """The first user turn."""
    return next((str(m["content"]) for m in conversation.messages if m["role"] == "user"), "")


def _opener(text: str) -> str:
    found = _FILLER.match(text)
    if found:
        return found.group().lower().removesuffix(" thing")
    call = _CALL.match(text)
    return call.group(1).lower() + "!" if call and len(call.group(1).split()) <= 4 else ""


# What one format or another writes around turns.
_FORMATS = {
    "Instruction/Response headings": re.compile(
        r"^#{2,} ?(?:instruction|input|response|human|assistant|user|question|answer):?[ ]*$",
        re.IGNORECASE | re.MULTILINE,
    ),
    "ChatML markers": re.compile(r"<\|im_(?:start|end)\|>"),
    "[INST] markers": re.compile(r"\[/?INST\]|<</?SYS>>"),
    "header markers": re.compile(r"<\|(?:start|end)_header_id\|>|<\|eot_id\|>"),
    "turn markers": re.compile(r"<(?:start|end)_of_turn>|<\|(?:user|assistant|system|end)\|>"),
    "end markers": re.compile(r"</s>\s*\Z|<\|endoftext\|>|<\|end_of_text\|>|\[EOS\]\s*\Z"),
    "speaker labels": re.compile(
        r"^(?:human|user|assistant|gpt|bot|ai):[ \n]", re.IGNORECASE | re.MULTILINE
    ),
}


@check()
def formats_alike(facts: DataFacts) -> Iterator[Finding]:
    """No text contains the markers of a chat format: the template writes its own."""
    found: dict[str, list[int]] = defaultdict(list)
    for index, conversation in enumerate(facts.train):
        for name in _formats_of(conversation, frozenset(facts.control)):
            found[name].append(index)
    for name, rows in found.items():
        total = len(facts.train)
        everywhere = len(rows) > _MOST * total
        yield rows_finding(
            facts.names,
            rows,
            code="format-in-content",
            level="warning",
            what=f"{share(len(rows), total)} contain {name} of a chat format inside a message",
            why="the rows were rendered before they were split into messages: the model is trained "
            "on one format inside another"
            if everywhere
            else "the rows mix several formats: some were already rendered, or were not cleaned",
            fix="use questions and answers without the markers",
        )


def _formats_of(conversation: Conversation, control: frozenset[str]) -> Iterator[str]:
    for name, pattern in _FORMATS.items():
        for message in conversation.messages:
            text, role = message["content"], message["role"]
            if role == "tool" or not _may_hold(name, text):
                continue
            hit = pattern.search(text)
            # Markers of this tokenizer are reported as the control tokens that they become.
            if hit is None or hit.group().strip() in control:
                continue
            # A question may quote a dialogue; an answer that goes on with the next question, or a
            # prompt that ends with the heading of its answer, is rendered.
            if name in _QUOTED and role == "assistant" and _is_quoted(text, hit.start()):
                continue
            if name != "speaker labels" or _is_rendered(role, text, pattern):
                yield name
                break


def _may_hold(name: str, text: str) -> bool:
    """A quick look before the pattern: most messages have none of the characters."""
    if name == "speaker labels":
        return ":" in text
    if name == "Instruction/Response headings":
        return "##" in text
    return "<" in text or "[" in text


# What an answer about prompts and transcripts shows as an example.
_QUOTED = ("speaker labels", "Instruction/Response headings")


def _is_quoted(text: str, start: int) -> bool:
    """Whether an example begins there: behind a colon, or in a block of code."""
    before = text[:start].rstrip()
    return before.endswith((":", "\uff1a")) or before.count("```") % 2 == 1


def _is_rendered(role: str, text: str, pattern: re.Pattern[str]) -> bool:
    labels = {found.group().strip().lower() for found in pattern.finditer(text)}
    asks = labels & {"human:", "user:"}
    if role == "assistant":
        return bool(asks) and not text.lstrip().lower().startswith(tuple(labels))
    return bool(asks) and text.rstrip().lower().endswith(("assistant:", "gpt:", "bot:", "ai:"))


@check()
def endings_alike(facts: DataFacts) -> Iterator[Finding]:
    """No end mark, such as `END`, `###` or `[DONE]`, closes some answers and not most."""
    answers = [(i, text.rstrip()) for i, text in enumerate(facts.answers) if text.strip()]
    if len(answers) < 2 * _LEAST_ROWS:
        return
    tails = {i: _mark(text) for i, text in answers}
    counts = Counter(mark for mark in tails.values() if mark)
    for mark, number in counts.most_common(3):
        part = number / len(answers)
        if number < _LEAST_ROWS or not _SOME <= part <= 1 - _SOME:
            continue
        yield rows_finding(
            facts.names,
            [i for i, tail in tails.items() if tail == mark],
            code="endings-mixed",
            level="warning" if part > 0.5 else "note",
            what=f"{percent(part)} of the answers end with {mark!r} and the others do not",
            why="the model learns to write the end mark as text, in addition to its own end token",
            fix="remove it: the chat template ends the answers",
        )


_MARK = re.compile(
    r"(?:^|\s)([#*=~_<\[(|\-]{1,3}[A-Za-z]{0,12}[#*=~_>\])|\-]{1,3}|[A-Z]{3,8})\Z"
    # Directly behind a sentence, signs alone close bold text and brackets.
    r"|(?<=[.!?\u3002])(#{2,3}|[<\[(][A-Z]{3,8}[>\])])\Z"
)


def _mark(text: str) -> str:
    """The last word, if it looks like a mark and is no word of the text itself."""
    found = _MARK.search(text[-24:])
    if found is None:
        return ""
    mark = found[1] or found[2]
    if _FORMATS["end markers"].search(mark):
        return ""  # reported as that
    capitals = mark.isalpha()
    return mark if not capitals or mark in ("END", "EOS", "DONE", "STOP", "EOT") else ""


@check()
def reasoning_alike(facts: DataFacts) -> Iterator[Finding]:
    """Either all answers have reasoning or none has."""
    chats = [i for i, c in enumerate(facts.train) if c.text is None]
    rows = [i for i in chats if _reasons(facts.train[i], facts.answers[i])]
    part = len(rows) / max(len(chats), 1)
    if len(rows) < _LEAST_ROWS or len(chats) - len(rows) < _LEAST_ROWS or part > 1 - _SOME:
        return
    without = sorted(set(chats) - set(rows))
    yield rows_finding(
        facts.names,
        rows if len(rows) < len(without) else without,
        code="reasoning-mixed",
        level="note" if part >= _SOME else "warning",
        what=f"{percent(part)} of the rows have reasoning and the others have none",
        why="the model learns to reason some of the time, and nothing in the prompt indicates when",
        fix="nothing to do if each row sets the template's thinking argument "
        "(chat_template_kwargs)",
    )


def _reasons(conversation: Conversation, answer: str) -> bool:
    if any(m.get("reasoning_content") for m in conversation.messages):
        return True
    return begins_with_reasoning(answer)
