"""Find rows in another language than the others, and answers in another language than they should
be.

Scripts say which language a text is not written in; of languages in Latin letters, the small words
that each of their sentences has.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from truetune.behaviour.text import script_of
from truetune.checks.conversations.rows import CODE, DataFacts, asked, level_of, opening, said
from truetune.checks.registry import check
from truetune.data.conversation import Conversation
from truetune.findings import Finding, percent, rows_finding, share

_WORD = re.compile(r"[^\W\d_]{2,}")
_COMMON = 200
# Shorter texts say too little about their language.
_LEAST_LETTERS = 40


@check()
def one_language(facts: DataFacts) -> Iterator[Finding]:
    """No small group of rows is in another script or language than all the others."""
    if len(facts.train) < 20:
        return
    texts = [said(conversation) for conversation in facts.train]
    scripts = [_script(text) for text in texts]
    kinds = Counter(script for script in scripts if script)
    if not kinds:
        return
    main, number = kinds.most_common(1)[0]
    judged = sum(kinds.values())
    strange = [i for i, s in enumerate(scripts) if s not in ("", main)]
    if number >= 0.95 * judged:
        strange = sorted({*strange, *_foreign_words(texts, main)})
    if not strange or len(strange) > 0.05 * judged:
        return
    others = Counter(scripts[i] for i in strange if scripts[i] != main)
    named = ", ".join(f"{script} ({n:,})" for script, n in others.most_common(3))
    yield rows_finding(
        facts.names,
        strange,
        code="language-outlier",
        level="note",
        what=f"{share(len(strange), len(facts.train))} are in a different language from the others"
        + (f": {named}" if named else ""),
        why=f"{percent(number / judged)} of the rows are written in {main} letters; the rows "
        "named here contain almost none of their common words",
        fix="inspect them, and remove those that do not belong in the data",
    )


def _script(text: str) -> str:
    """The script of most letters, by the first word of their Unicode names; "" for too few."""
    if text.isascii():
        return "LATIN" if len(text) >= _LEAST_LETTERS else ""
    counts = Counter(map(script_of, text[:2000]))
    for script, other in _ONE_LANGUAGE.items():
        counts[other] += counts.pop(script, 0)
    del counts[""]
    total = sum(counts.values())
    if not total or (total < _LEAST_LETTERS and not counts.keys() & _DENSE):
        return ""
    return counts.most_common(1)[0][0]


# One letter of these says as much as several of an alphabet.
_DENSE = frozenset({"CJK", "HIRAGANA", "KATAKANA", "HANGUL"})
_ONE_LANGUAGE = {"HIRAGANA": "CJK", "KATAKANA": "CJK"}


def _foreign_words(texts: list[str], main: str) -> list[int]:
    """Texts that use next to none of the words that the others use most."""
    if main in _DENSE:
        return []
    words = [_WORD.findall(text[:1500].lower()) for text in texts]
    counts: Counter[str] = Counter()
    for found in words:
        counts.update(set(found))
    common = {word for word, n in counts.most_common(_COMMON) if n >= 5}
    shares = np.array(
        [
            sum(w in common for w in found) / len(found) if len(found) >= 12 else np.nan
            for found in words
        ]
    )
    judged = shares[~np.isnan(shares)]
    # Where rows have few words in common anyhow (code, names), nothing can be said.
    if len(judged) < 20 or np.quantile(judged, 0.1) < 0.2:
        return []
    found = [i for i, s in enumerate(shares) if not np.isnan(s) and s < 0.06]
    # Rows of one scheme share more words than their language has in common.
    usual = Counter(map(language_of, texts[:_COMMON])).most_common(1)[0][0] if found else ""
    return [i for i in found if not usual or language_of(texts[i]) != usual]


# ------------------------------------------------------------------ the language of an answer

# Words that hardly a sentence does without, and that few of the other languages have.
_SMALL = {
    name: frozenset(words.split())
    for name, words in {
        "English": "the of and to is that it for was with this be you your by from have not or "
        "what how which does will an they",
        "German": "der die das und ist nicht ein eine einen den dem des mit von zu auf f\u00fcr im "
        "sich auch es ich sie wir wie wird oder aus bei nach",
        "French": "le la les des et est un une du que qui dans pour pas sur avec ce cette sont par "
        "au aux vous nous il elle ou comme ses",
        "Spanish": "el la los las de y es un una que en por para con se del su al lo como m\u00e1s "
        "pero sus este esta son muy hay",
        "Italian": "il la le gli di \u00e8 un una che per con non si del della dei delle al sono "
        "pi\u00f9 anche questo questa nel nella lo",
        "Portuguese": "os de \u00e9 um uma que em por para com n\u00e3o se da dos das na ao como "
        "mais seu sua s\u00e3o tem pelo pela",
        "Dutch": "de het een en van dat op te voor met niet zijn aan er ook als om bij naar dit "
        "deze worden wordt door maar je wij hun",
    }.items()
}
_LANGUAGES_OF = {
    word: [name for name, small in _SMALL.items() if word in small]
    for word in frozenset().union(*_SMALL.values())
}
# Other languages by a script that those of Latin letters do not use.
_BY_SCRIPT = {
    "Japanese": frozenset({"HIRAGANA", "KATAKANA"}),
    "Chinese": frozenset({"CJK"}),
    "Mandarin": frozenset({"CJK"}),
    "Korean": frozenset({"HANGUL"}),
    **dict.fromkeys(("Russian", "Ukrainian", "Bulgarian"), frozenset({"CYRILLIC"})),
    **dict.fromkeys(("Arabic", "Persian", "Urdu"), frozenset({"ARABIC"})),
    **dict.fromkeys(("Hindi", "Marathi", "Nepali"), frozenset({"DEVANAGARI"})),
    "Greek": frozenset({"GREEK"}),
    "Hebrew": frozenset({"HEBREW"}),
    "Thai": frozenset({"THAI"}),
}
_NAMED = "|".join((*_SMALL, *_BY_SCRIPT))
_ANY_NAME = re.compile(
    rf"\b(?:{_NAMED}|translat\w*|language|deutsch|fran\u00e7ais|espa\u00f1ol|italiano"
    r"|portugu\u00eas|nederlands|\u00fcberset\w*|tradu\w+|anglais|englisch|ingl[e\u00e9]s\w*)\b"
    r"|\u8bd1|\u8a33|\u7ffb|[\u82f1\u6cd5\u5fb7\u4e2d\u65e5]\u6587|[\u82f1\u65e5]\u8a9e",
    re.IGNORECASE,
)
# An order to write in a language: a verb, and the name at the end of a phrase.
_ORDERED = re.compile(
    r"\b(?:answer|repl(?:y|ies)|respond|write|explain|summari[sz]e|translate)\b[^.?!\n]{0,60}?"
    rf"\b(?:in|into|to) ({_NAMED})(?=\s*(?:[.,:;!?()\n]|\Z|please\b|and\b|only\b|with\b))",
    re.IGNORECASE,
)
# The same in Latin letters, or in code.
_SPELLED = re.compile(
    r"\b(?:romaji|pinyin|romani[sz]\w*|transliterat\w*|pronounc\w*|latin|function|program\w*|code"
    r"|script|python|java\w*|html)\b",
    re.IGNORECASE,
)
# Of the words of a text, the small ones of its language; and how much fewer those of another are.
_LEAST_WORDS, _SMALL_SHARE, _FEWER, _DIFFERENT = 8, 0.15, 0.4, 3
_LEAST_OTHER = 0.02


@check()
def answers_in_their_language(facts: DataFacts) -> Iterator[Finding]:
    """Answers are in the language that their prompt names, or else in that of their prompt."""
    wrong = {i: named for i, c in enumerate(facts.train) if (named := _not_as_ordered(c))}
    if wrong:
        rows = list(wrong)
        yield rows_finding(
            facts.names,
            rows,
            code="answer-language",
            level=level_of(rows, len(facts.train)),
            what=f"the answers of {share(len(rows), len(facts.train))} are not in the language "
            f"that their prompt names ({_listed(wrong.values())}), for example "
            f"{opening(facts.answers[rows[0]])}",
            why="the model that generated them ignored the instruction, or answers in another "
            "language were joined to these prompts: the tuned model learns to ignore it, too",
            fix="use answers in that language, or remove those rows",
        )
    pairs = {i: _languages(c) for i, c in enumerate(facts.train) if i not in wrong}
    judged = {i: pair for i, pair in pairs.items() if all(pair)}
    other = {i: f"{b} after {a}" for i, (a, b) in judged.items() if a != b}
    # Where they are most of the rows, that is the task.
    if max(3, _LEAST_OTHER * len(facts.train)) <= len(other) <= 0.5 * len(judged):
        rows = list(other)
        yield rows_finding(
            facts.names,
            rows,
            code="answer-language",
            level="warning",
            what=f"the answers of {share(len(rows), len(facts.train))} are in another language "
            f"than their prompt: {_listed(other.values())}",
            why="the other answers are in the language of their prompt, and these prompts name no "
            "language: the model learns to switch languages without being asked",
            fix="use answers in the language of the prompt, or name the language in the prompt",
        )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"{name} ({n:,})" for name, n in Counter(names).most_common(3))


def _last_pair(conversation: Conversation) -> tuple[str, str]:
    """(the last question, the trained answer behind it)."""
    question, found = "", ("", "")
    for message in conversation.messages:
        if message["role"] == "user":
            question = str(message["content"])
        elif message["role"] == "assistant" and question and message.get("train") is not False:
            found = (question, str(message["content"]))
    return found


def _not_as_ordered(conversation: Conversation) -> str:
    """The language that the prompt names and the answer is not in; "" for none."""
    question, answer = _last_pair(conversation)
    named = {name.capitalize() for name in _ORDERED.findall(question)}
    if len(named) != 1 or _SPELLED.search(question) or CODE.search(answer):
        return ""
    (name,) = named
    # "In Spanish, you say ..." answers in the language of the question.
    if name in answer:
        return ""
    if scripts := _BY_SCRIPT.get(name):
        letters = Counter(map(script_of, answer[:2000]))
        del letters[""]
        enough = letters.total() >= _LEAST_LETTERS
        return name if enough and sum(letters[s] for s in scripts) < 0.1 * letters.total() else ""
    written = language_of(answer)
    return name if written and written != name else ""


def _languages(conversation: Conversation) -> tuple[str, str]:
    """(language of the question, of the answer); "" where that is not sure or a language is
    named."""
    question, answer = _last_pair(conversation)
    if _ANY_NAME.search(asked(conversation)) or CODE.search(question) or CODE.search(answer):
        return "", ""
    # An order may stand before a text of another language.
    first, more, _ = question.partition("\n")
    whole = language_of(question)
    known = whole and (not more or language_of(first) == whole)
    return (whole, language_of(answer)) if known else ("", "")


def language_of(text: str) -> str:
    """The language of a text, or its script where that is not Latin; "" if it is not sure."""
    script = _script(text)
    if script != "LATIN":
        return script
    words = re.findall(r"[^\W\d_]+", text[:2000].lower())
    if len(words) < _LEAST_WORDS:
        return ""
    counts = Counter(name for word in words for name in _LANGUAGES_OF.get(word, ()))
    (name, most), (_, second) = [*counts.most_common(2), ("", 0), ("", 0)][:2]
    different = len(_SMALL.get(name, frozenset()).intersection(words)) >= _DIFFERENT
    clear = most >= _SMALL_SHARE * len(words) and second <= _FEWER * most
    return name if different and clear else ""
