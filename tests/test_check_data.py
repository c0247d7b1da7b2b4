"""Conversations judged before any template: each code with rows that bring it about, and rows as
near to it as can be that must stay silent."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import pytest

from tiny_models import tiny_tokenizer
from truetune.checks import conversations
from truetune.checks.conversations.duplicates import near_pairs
from truetune.checks.conversations.rows import DataFacts
from truetune.checks.conversations.tools import call_problem, value_problem
from truetune.checks.registry import ask
from truetune.contract.contract import PromptContract
from truetune.contract.specials import control_tokens
from truetune.data.conversation import Conversation
from truetune.findings import Finding

SAID = (
    "the river runs past old houses and under a bridge where people sell bread fruit cloth "
    "while boats bring salt from far towns every morning before rain begins to fall on roofs"
)
WORDS = SAID.split()


def prose(seed: int, length: int = 30) -> str:
    """Words in an order of their own, common ones often."""
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(length)).capitalize() + "."


def row(index: int, *turns: tuple[str, Any], **fields: Any) -> Conversation:
    messages = tuple(
        {"role": role, **(said if isinstance(said, dict) else {"content": said})}
        for role, said in turns
    )
    return Conversation(messages, f"rows.jsonl:{index}", **fields)


def plain(index: int, answer: str | None = None, question: str | None = None) -> Conversation:
    asked = question if question is not None else prose(index) + "?"
    return row(index, ("user", asked), ("assistant", answer or prose(index + 5000)))


def sound(number: int = 100) -> list[Conversation]:
    return [plain(i) for i in range(number)]


def with_some(
    make: Callable[[int], Conversation], some: int, number: int = 100
) -> list[Conversation]:
    """Sound rows, every so-manyth made otherwise."""
    rows = sound(number)
    for i in range(some):
        at = i * number // max(some, 1)
        rows[at] = make(at)
    return rows


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "unit": {"type": "string", "enum": ["C", "F"]},
            },
            "required": ["city"],
        },
    },
}


def calling(index: int, name: str = "weather", tools: Any = (TOOL,), **arguments: Any) -> Any:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    turns = [
        ("user", prose(index)),
        ("assistant", {"content": "", "tool_calls": [call]}),
        ("tool", "rain"),
        ("assistant", prose(index + 9000)),
    ]
    return row(index, *turns, tools=tools)


def facts(train: list[Conversation], held_out: list[Conversation] | None = None) -> DataFacts:
    return DataFacts(train, held_out or [], ("<|end|>", "<|user|>", "<s>"))


Make = Callable[[], DataFacts]


def case(make: Callable[[int], Conversation], some: int, number: int = 100) -> Make:
    return lambda: facts(with_some(make, some, number))


FOREIGN = "Der Fluss flie\u00dft an alten H\u00e4usern vorbei unter einer Br\u00fccke durch, " * 3
GREEK = "\u03c4\u03bf \u03c0\u03bf\u03c4\u03ac\u03bc\u03b9 \u03c0\u03b5\u03c1\u03bd\u03ac " * 8


def twice(role: str) -> Callable[[int], Conversation]:
    other = prose(7)
    if role == "user":
        return lambda i: row(i, ("user", prose(i)), ("user", other), ("assistant", prose(i + 1)))
    return lambda i: row(i, ("user", prose(i)), ("assistant", other), ("assistant", prose(i + 1)))


def changed(index: int, of: int, words: int) -> Conversation:
    """A row that repeats another but for some words at its end."""
    source = plain(of)
    question, answer = (m["content"] for m in source.messages)
    kept = answer.split()
    kept[len(kept) - words :] = [f"other{index}x{k}" for k in range(words)]
    return row(index, ("user", question), ("assistant", " ".join(kept)))


def about(index: int, answered: int | None = None) -> Conversation:
    """A question and an answer about the same things; or the answer about those of another row."""
    named = [f"{WORDS[(i * 7) % 30]}{i} by {WORDS[i % 30]}{i}ton" for i in (index, index + 1)]
    named[1] = named[0] if answered is None else f"{WORDS[(answered * 7) % 30]}{answered}"
    return plain(index, f"In {named[1]}, {prose(index + 5000)}", f"What is in {named[0]}?")


def beside(first: int, last: int, step: int = 1) -> Make:
    """120 rows, of which those from one to another have the answer of a neighbour."""
    return lambda: facts([about(i, i - step if first <= i < last else None) for i in range(120)])


def exchanged(index: int) -> Conversation:
    """The question where the answer belongs, and the other way round."""
    asked, answer = (m["content"] for m in plain(index).messages)
    return plain(index, asked, answer)


SYSTEM = "You are Ida, the clerk of a small library. Never tell the code of the door."
DOCUMENT = "The old library by the river was built in 1720 of grey stone and salt."


def led_by(system: str, answer: str, question: str = "") -> Callable[[int], Conversation]:
    def make(i: int) -> Conversation:
        asked = ("user", question or prose(i) + "?")
        return row(i, ("system", system), asked, ("assistant", f"{answer} {prose(i + 5000)}"))

    return make


ENGLISH = "The river is old, and it was with the town that the bridge of stone was built. "
GERMAN = "Der Fluss ist alt, und die Br\u00fccke aus Stein wird von der Stadt nicht mehr genutzt. "
JAPANESE = (
    "\u5ddd\u306f\u53e4\u304f\u3001\u77f3\u306e\u6a4b\u306f\u753a\u306e\u3082\u306e\u3067\u3059\u3002"
    * 4
)


def in_language(
    answer: str, order: str = "", question: str = ENGLISH
) -> Callable[[int], Conversation]:
    return lambda i: plain(i, f"{answer}{i}", f"{order}{question}{i}?")


def languages(make: Callable[[int], Conversation], some: int) -> Make:
    usual = in_language(ENGLISH)
    return lambda: facts([make(i) if i < some else usual(i) for i in range(60)])


CASES: dict[str, tuple[list[Make], list[Make]]] = {
    "answers-shifted": (
        [beside(0, 120), beside(0, 120, -1), beside(0, 120, 2), beside(80, 120)],
        [
            beside(0, 0),
            beside(80, 90),
            # Answers that say nothing of their questions; questions that go on from an answer.
            lambda: facts([plain(i, "yes" if i % 2 else "no") for i in range(120)]),
            lambda: facts([plain(i, prose(i + 1), prose(i)) for i in range(120)]),
            lambda: facts(
                [
                    plain(i, f"{prose(i + 2)} {prose(i + 3)}", f"{prose(i)} {prose(i + 1)}")
                    for i in range(120)
                ]
            ),
        ],
    ),
    "turns-exchanged": (
        [case(exchanged, 20), case(exchanged, 30)],
        [
            case(exchanged, 3),
            # Which half would it be? A task that is asked for; texts that are alike.
            case(exchanged, 50),
            case(lambda i: plain(i, prose(i) + "?", f"Write a question to this: {prose(i)}"), 20),
            lambda: facts([plain(i, prose(i + 1), prose(i)) for i in range(120)]),
        ],
    ),
    "system-in-answer": (
        [
            case(led_by(SYSTEM, SYSTEM), 10),
            case(led_by(SYSTEM, "You are Ida, the clerk of a small library."), 10),
            case(led_by("Always answer in two sentences.", "Always answer in two sentences."), 1),
        ],
        [
            case(led_by(SYSTEM, "I am Ida, the clerk of a small library."), 100),
            case(led_by("Be brief.", "Be brief."), 10),
            case(led_by(DOCUMENT, DOCUMENT), 10),
            case(led_by(SYSTEM, SYSTEM, "What are your instructions?"), 10),
            case(led_by(SYSTEM, SYSTEM, f"Say this: {SYSTEM}"), 10),
        ],
    ),
    "answer-language": (
        [
            languages(in_language(ENGLISH, "Answer in German. "), 20),
            languages(in_language(ENGLISH, "Please respond in Japanese: "), 20),
            languages(in_language(ENGLISH, "Write about the river in French.\n"), 60),
            languages(in_language(GERMAN), 5),
            languages(in_language(ENGLISH, question=GERMAN), 5),
            languages(in_language(JAPANESE), 5),
        ],
        [
            languages(in_language(GERMAN, "Answer in German. "), 20),
            languages(in_language(JAPANESE, "Please respond in Japanese: "), 20),
            languages(in_language(ENGLISH, "Who wrote in German schools? "), 20),
            languages(in_language("In German: Fluss. " + ENGLISH, "Translate it to German. "), 20),
            languages(in_language(ENGLISH, "Write a function that speaks in German. "), 20),
            # The usual form of the file; one row; both in the same; a translation.
            languages(in_language(GERMAN), 60),
            languages(in_language(GERMAN), 1),
            languages(in_language(GERMAN, question=GERMAN), 20),
            languages(in_language(GERMAN, "Translate: "), 20),
            languages(in_language(ENGLISH, "Sum up:\n", GERMAN), 20),
        ],
    ),
    "user-twice": (
        [case(twice("user"), 1)],
        # Two people speak.
        [
            case(
                lambda i: row(
                    i,
                    ("user", {"content": prose(1), "name": "a"}),
                    ("user", {"content": prose(2), "name": "b"}),
                    ("assistant", prose(3)),
                ),
                1,
            )
        ],
    ),
    "assistant-twice": (
        [case(twice("assistant"), 1)],
        # A tool answers in between.
        [case(lambda i: calling(i, city="Rome"), 3)],
    ),
    "question-empty": (
        [case(lambda i: plain(i, question=" \n"), 1)],
        [case(lambda i: plain(i, question="?"), 1)],
    ),
    "answer-not-last": (
        [
            case(
                lambda i: row(i, ("user", prose(i)), ("assistant", prose(i + 1)), ("user", "Ok")), 1
            )
        ],
        [case(plain, 1)],
    ),
    "system-late": (
        [case(lambda i: row(i, ("user", "Hm"), ("system", "Hm"), ("assistant", prose(i))), 1)],
        [
            case(lambda i: row(i, ("system", "Hm"), ("user", "Hm"), ("assistant", prose(i))), 100),
            case(
                lambda i: row(
                    i, ("system", "A"), ("developer", "B"), ("user", "C"), ("assistant", prose(i))
                ),
                1,
            ),
        ],
    ),
    "tools-undeclared": (
        [case(lambda i: calling(i, tools=None, city="Rome"), 5)],
        [case(lambda i: calling(i, city="Rome"), 5)],
    ),
    "tool-unknown": (
        [case(lambda i: calling(i, name="wether", city="Rome"), 1)],
        [case(lambda i: calling(i, city="Rome"), 5)],
    ),
    "tool-arguments": (
        [
            case(lambda i: calling(i, days=3), 1),
            case(lambda i: calling(i, city="Rome", days="3"), 1),
            case(lambda i: calling(i, city="Rome", unit="K"), 1),
            case(lambda i: calling(i, town="Rome", city="Rome"), 1),
        ],
        [
            case(lambda i: calling(i, city="Rome", days=3.0, unit="C"), 5),
            # A schema that says nothing takes anything.
            case(
                lambda i: calling(
                    i, tools=({"type": "function", "function": {"name": "weather"}},), x=1
                ),
                5,
            ),
        ],
    ),
    "control-token-in-content": (
        [
            case(lambda i: plain(i, question="What does <|end|> do?"), 1),
            case(lambda i: plain(i, answer="It is <s>struck</s>."), 1),
        ],
        [
            case(lambda i: plain(i, question="What does <| end |> do, or <|other|>?"), 5),
        ],
    ),
    "language-outlier": (
        [
            case(lambda i: plain(i, GREEK, GREEK), 2),
            case(lambda i: plain(i, FOREIGN, FOREIGN), 2),
        ],
        [
            # As many as that are no outliers.
            case(lambda i: plain(i, GREEK, GREEK), 30),
            case(lambda i: plain(i, "A word of Greek: \u03c0\u03bf\u03c4\u03ac\u03bc\u03b9"), 2),
            case(plain, 0),
            # A row without the words of a scheme, in its language.
            lambda: facts(
                [
                    *(plain(i, f"{ENGLISH}{i}", f"Where is {i}?") for i in range(60)),
                    plain(60, "A list for what you do not have, or how you can see them.", "Why?"),
                ]
            ),
        ],
    ),
    "length-outlier": (
        [case(lambda i: plain(i, prose(i, 3000)), 1, 200)],
        [
            case(lambda i: plain(i, prose(i, 60)), 1, 200),
            # Lengths that spread anyhow.
            lambda: facts([plain(i, prose(i, 5 + 2 * i)) for i in range(200)]),
        ],
    ),
    "openers-mixed": (
        [
            case(lambda i: plain(i, "Sure, here it is: " + prose(i)), 4),
            case(lambda i: plain(i, "Of course! " + prose(i)), 4),
            case(lambda i: plain(i, "Great idea! " + prose(i)), 4),
        ],
        [
            # All of them: a style. One of them: chance.
            case(lambda i: plain(i, "Sure, here it is: " + prose(i)), 100),
            case(lambda i: plain(i, "Sure, here it is: " + prose(i)), 1),
            case(lambda i: plain(i, "Surely the river. " + prose(i)), 4),
            case(lambda i: plain(i, "First, " + prose(i)), 40),
            # Below the share that sampled answers were seen to repeat.
            case(lambda i: plain(i, "Sure, here it is: " + prose(i)), 4, 250),
            # The question calls for it.
            case(lambda i: plain(i, "As an AI, I have no house. " + prose(i), "Your house?"), 9),
        ],
    ),
    "answer-missing": (
        [
            case(lambda i: plain(i, "nan"), 10),
            case(lambda i: plain(i, "None"), 20),
            case(lambda i: plain(i, " <NA>\n"), 3),
            case(lambda i: plain(i, ("-", "N/A")[i % 2]), 10),
            lambda: facts([plain(i, ("yes", "no", "nan")[i % 3]) for i in range(60)]),
        ],
        [
            # Labels; an answer that is asked for; code; words.
            lambda: facts([plain(i, ("yes", "no", "None")[i % 3]) for i in range(60)]),
            lambda: facts([plain(i, ("null", '{"a": null}')[i % 2]) for i in range(60)]),
            case(lambda i: plain(i, "None", f"Which of them, or none? {prose(i)}"), 10),
            case(lambda i: plain(i, "nan", f"What does this print: float('nan') {i}"), 10),
            case(lambda i: plain(i, "None of them."), 10),
            lambda: facts([plain(i, "nan") for i in range(20)]),
        ],
    ),
    "placeholder-left": (
        [
            case(lambda i: plain(i, ("{{answer}}", "{output}")[i % 2]), 10),
            lambda: facts([plain(i, "{{ answer }}") for i in range(20)]),
            case(lambda i: plain(i, "[INSERT ANSWER HERE]"), 10),
            case(lambda i: plain(i, question=f"{prose(i)}\n\n{{question}}"), 100),
            case(lambda i: plain(i, prose(i) + " Dear {customer_name}, thanks."), 80),
            # Anywhere in a few answers, where nothing asks for a gap.
            case(lambda i: plain(i, "{{answer}} " + prose(i)), 10),
            case(lambda i: plain(i, "Dear [INSERT NAME HERE],\n\n" + prose(i)), 10),
            case(lambda i: plain(i, "TODO: write a better answer. " + prose(i)), 10),
            case(lambda i: plain(i, "[Your Company Name] says: " + prose(i)), 10),
        ],
        [
            # Lessons on templates, letters, LaTeX, JSON, code, sets, form instructions.
            case(lambda i: plain(i, "{{name}}", "Which Jinja template writes the name?"), 10),
            case(lambda i: plain(i, "{name}", f"Write the placeholder of an f-string. {i}"), 10),
            case(lambda i: plain(i, "Dear {name}, " + prose(i)), 10),
            case(lambda i: plain(i, "Dear [Name], " + prose(i)), 100),
            case(lambda i: plain(i, r"It is \frac{width}{two} and x_{max}. " + prose(i)), 100),
            case(lambda i: plain(i, f'{{"name": "{i}", "a": null}}'), 100),
            case(lambda i: plain(i, f'```python\nprint(f"{{name}} {i}")\n```'), 100),
            case(lambda i: plain(i, question=f"Reply in the form {{answer}}. {prose(i)}"), 100),
            case(lambda i: plain(i, "[1]"), 10),
            # Two of a hundred; letters; lists; links; what the prompt holds itself.
            case(lambda i: plain(i, "{{answer}} " + prose(i)), 2),
            case(lambda i: plain(i, f"[Your Name] {prose(i)}", f"Write an email to {i}."), 30),
            case(lambda i: plain(i, f"{prose(i)}\n\nBest regards,\n[Your Name]"), 30),
            case(lambda i: plain(i, "TODO: " + prose(i), f"Make a to-do list for {i}."), 30),
            case(lambda i: plain(i, f"See [your page](http://x.org/{i}). {prose(i)}"), 30),
            case(
                lambda i: plain(i, f"The {{{{order}}}} {prose(i)}", f"Where is {{{{order}}}} {i}?"),
                30,
            ),
        ],
    ),
    "text-escaped": (
        [
            case(lambda i: plain(i, f"{prose(i)}\\n\\n1. {prose(i + 1)}\\n2. {prose(i)}"), 10),
            case(lambda i: plain(i, f"{prose(i)}\\n- {prose(i + 1)}"), 100),
        ],
        [
            case(lambda i: plain(i, f"{prose(i)}\\n\\n1. {prose(i + 1)}"), 1, 200),
            case(lambda i: plain(i, f"{prose(i)}\n\n1. {prose(i + 1)}"), 100),
            # LaTeX, paths, lessons, JSON, code.
            case(lambda i: plain(i, r"So \nu \neq \nabla f. " + prose(i)), 100),
            case(lambda i: plain(i, r"Open C:\new\notes and save. " + prose(i)), 100),
            case(lambda i: plain(i, r"Write \n\n for it.", f"How do I escape a newline? {i}"), 100),
            case(lambda i: plain(i, rf'{{"text": "a\nB {i}"}}'), 100),
            case(lambda i: plain(i, rf'print("a\nB {i}");'), 100),
        ],
    ),
    "reasoning-unclosed": (
        [
            case(lambda i: plain(i, "<think>\n" + prose(i)), 100),
            case(lambda i: plain(i, "<think>" + prose(i)), 1),
            case(lambda i: plain(i, "[THINK]" + prose(i)), 4),
        ],
        [
            case(lambda i: plain(i, f"<think>\n{prose(i)}\n</think>\n\n{prose(i + 1)}"), 100),
            case(lambda i: plain(i, f"{prose(i)}\n</think>\n\n{prose(i + 1)}"), 100),
            case(lambda i: plain(i, f"The tag <think> opens it. {prose(i)}"), 10),
        ],
    ),
    "format-in-content": (
        [
            case(lambda i: plain(i, question=f"### Instruction:\n{prose(i)}\n### Response:"), 100),
            case(lambda i: plain(i, prose(i) + "\nUser: And now?\nAssistant: Yes."), 3),
            case(lambda i: plain(i, prose(i) + "</s>"), 3),
            case(lambda i: plain(i, question=f"[INST] {prose(i)} [/INST]"), 3),
        ],
        [
            case(lambda i: plain(i, question=f"Go on:\nUser: Hi\nAssistant: Hello\n{prose(i)}"), 3),
            case(lambda i: plain(i, prose(i) + "\n## Why\nBecause.\n### Example\nOne."), 50),
            case(lambda i: plain(i, "Strike it with <s>this</s> tag."), 3),
            # An answer that shows one.
            case(lambda i: plain(i, f"Such as:\n\nUser: Hello\nAssistant: Hi {i}!"), 3),
            case(lambda i: plain(i, f"As text:\n```\n### Input:\n{i}\n```"), 3),
        ],
    ),
    "endings-mixed": (
        [
            case(lambda i: plain(i, prose(i) + " ###"), 30),
            case(lambda i: plain(i, prose(i) + "\nEND"), 70),
            case(lambda i: plain(i, prose(i) + "###"), 10),
            case(lambda i: plain(i, prose(i) + "[END]"), 10),
        ],
        [
            case(lambda i: plain(i, prose(i) + " ###"), 100),
            case(lambda i: plain(i, prose(i) + " NATO"), 30),
            case(lambda i: plain(i, f"It is so. **{prose(i)}**"), 30),
            case(plain, 0),
        ],
    ),
    "reasoning-mixed": (
        [
            case(lambda i: plain(i, f"<think>\n{prose(i)}\n</think>\n\nYes."), 40),
            case(lambda i: plain(i, f"[THINK]{prose(i)}[/THINK]Yes."), 40),
        ],
        [
            case(lambda i: plain(i, f"<think>\n{prose(i)}\n</think>\n\nYes."), 100),
            case(plain, 0),
        ],
    ),
    "rows-duplicate": (
        [case(lambda i: plain(3), 5), case(lambda i: plain(3), 1)],
        [case(lambda i: plain(i, prose(3)), 5)],
    ),
    "rows-nearly-duplicate": (
        [case(lambda i: changed(i, 3, 2), 1), case(lambda i: changed(i, 3, 2), 20)],
        [
            case(lambda i: changed(i, 3, 25), 1),
            # Alike by their scheme only.
            lambda: facts([plain(i, f"{i * 7}", f"What is {i} + {6 * i}?") for i in range(100)]),
            case(plain, 0),
        ],
    ),
    "eval-nearly-trained": (
        [lambda: facts(sound(), [changed(500, 3, 2)])],
        [lambda: facts(sound(), [plain(500)])],
    ),
    "prompt-repeated": (
        [case(lambda i: plain(i, question="Which river?"), 2)],
        [case(lambda i: plain(i, "Yes."), 2)],
    ),
}


def found(given: DataFacts) -> list[Finding]:
    return list(ask(conversations, given))


@pytest.mark.parametrize(
    ("code", "make"), [(code, make) for code, (bad, _) in CASES.items() for make in bad]
)
def test_found(code: str, make: Make) -> None:
    told = [finding for finding in found(make()) if finding.code == code]
    assert len(told) == 1
    assert told[0].what
    assert told[0].fix
    assert told[0].where.startswith("rows.jsonl:")


@pytest.mark.parametrize(
    ("code", "make"), [(code, make) for code, (_, good) in CASES.items() for make in good]
)
def test_near_misses(code: str, make: Make) -> None:
    assert code not in {finding.code for finding in found(make())}


def told_of(code: str, given: DataFacts) -> Finding:
    (told,) = [finding for finding in found(given) if finding.code == code]
    return told


def test_an_opening_is_a_warning_only_where_no_question_calls_for_it() -> None:
    same = told_of("openers-mixed", case(lambda i: plain(i, "Sure, let me see. " + prose(i)), 10)())
    assert same.level == "warning"
    assert "10 of them begin with the same words" in same.why
    # Different words behind it; and questions of one kind, which are all answered so.
    assert "sources" not in same.why
    varied = case(lambda i: plain(i, f"Sure, {prose(i)}"), 10)()
    assert told_of("openers-mixed", varied).level == "note"

    def asked(i: int) -> Conversation:
        return plain(i, f"Sure, let me see. {prose(i)}", f"Can you help me with my letter {i}?")

    assert told_of("openers-mixed", case(asked, 20)()).level == "note"


def test_openings_that_are_shown_add_up() -> None:
    said = ("Sure", "Sure thing", "Of course", "Okay", "Certainly")
    mixed = [plain(i, f"{said[i % 5]}, {prose(i)}") for i in range(100, 140)]
    told = told_of("openers-mixed", facts([*sound(60), *mixed]))
    shown = [int(n) for n in re.findall(r"\((\d+)\)", told.what)]
    assert sum(shown) == told.count == 40
    assert "'sure' (16)" in told.what
    assert "others (8)" in told.what


def test_an_unclosed_reasoning_is_no_cut_sentence_too() -> None:
    told = found(facts([plain(i, f"<think>\n{prose(i)[:80]}") for i in range(40)]))
    assert [(f.code, f.level) for f in told] == [("reasoning-unclosed", "error")]


def test_rendered_conversations_as_plain_text() -> None:
    """The cause is named, and the way back to messages; a text that holds a token is another."""
    turns = "<|user|>\nHow?<|end|>\n<|assistant|>\nSo.<|end|>\n"
    rows = [Conversation((), f"rows.jsonl:{i}", text=turns + prose(i)) for i in range(9)]
    told = told_of("control-token-in-content", facts(rows))
    assert "already rendered" in told.why
    assert "including the questions" in told.why
    assert '"messages"' in told.fix
    assert "break them up" not in told.fix
    documents = [Conversation((), f"t.txt:{i}", text=f"<s> {prose(i)} <s>") for i in range(9)]
    told = told_of("control-token-in-content", facts(documents))
    assert "rendered" not in told.why
    assert "opens or closes a turn" not in told.why
    assert "`< s>`" in told.fix
    assert "--content-specials" not in told.fix


def test_sound_rows_raise_nothing() -> None:
    assert found(facts(sound(200), [plain(i) for i in range(300, 320)])) == []
    assert found(facts([])) == []
    text = [Conversation((), f"t.txt:{i}", text=prose(i, 200)) for i in range(40)]
    assert found(facts(text)) == []


def test_the_rows_are_named() -> None:
    (told,) = [f for f in found(facts(with_some(twice("user"), 4))) if f.code == "user-twice"]
    assert told.rows == ("rows.jsonl:0", "rows.jsonl:25", "rows.jsonl:50", "rows.jsonl:75")
    assert told.count == 4
    assert "4 of 100 rows (4 %)" in told.what


def test_near_duplicates_name_both_rows() -> None:
    rows = [*sound(50), changed(77, 3, 2)]
    (told,) = [f for f in found(facts(rows)) if f.code != "prompt-repeated"]
    assert (told.code, told.level) == ("rows-nearly-duplicate", "note")
    assert "rows.jsonl:77 and rows.jsonl:3" in told.why


def test_minhash_finds_what_all_pairs_find() -> None:
    """Of pairs at or above 80 %, the bands miss next to none; of those below, none is told."""
    draw = random.Random(0)
    texts, expected = [], 0
    for i in range(120):
        words = [f"w{draw.randrange(400)}" for _ in range(60)]
        texts.append(" ".join(words))
        near = i % 2 == 0
        # 1 word of 60 changes 3 of 58 runs (Jaccard 0.9); 8 spread ones change nearly all.
        for at in [30] if near else range(0, 60, 7):
            words[at] = f"x{i}"
        texts.append(" ".join(words))
        expected += near
    pairs = near_pairs(texts)
    assert all(b == a + 1 and a % 4 == 0 for a, b in pairs)
    assert len(pairs) == expected == 60


def test_a_cluster_of_copies_stays_cheap() -> None:
    import time

    text = prose(1, 60)
    began = time.process_time()
    pairs = near_pairs([text] * 3000)
    assert time.process_time() - began < 5
    assert {b for _, b in pairs} == set(range(1, 3000))


def test_schemas_of_tools() -> None:
    nested = {
        "type": "object",
        "properties": {
            "legs": {
                "type": "array",
                "items": {"type": "object", "required": ["to"], "properties": {"to": {}}},
            },
            "when": {"type": ["string", "null"]},
        },
    }
    assert value_problem({"legs": [{"to": 1}], "when": None}, nested, "") == ""
    assert value_problem({"legs": [{}]}, nested, "") == "'legs'[0].to is required but missing"
    assert value_problem({"when": 3}, nested, "") == "'when' is a number, not string or null"
    assert (
        value_problem({"a": 1}, {"additionalProperties": True, "properties": {"b": {}}}, "") == ""
    )
    assert value_problem(True, {"type": "integer"}, "x") == "x is a boolean, not integer"
    # Types that nobody knows, and what people write for known ones.
    assert value_problem(3, {"type": "quantity"}, "x") == ""
    assert value_problem(3, {"type": "int"}, "x") == ""
    assert call_problem({"arguments": "city=Rome"}, {}) == "the arguments are text, not an object"


def test_control_tokens_are_those_that_writing_them_makes() -> None:
    contract = PromptContract.load(tiny_tokenizer())
    assert set(control_tokens(contract)) == {
        *("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
    }


@pytest.mark.parametrize(("question", "twice"), [("<|user|>\nHm?", True), ("A <|user|>?", False)])
def test_texts_that_were_rendered_already_are_called_so(question: str, twice: bool) -> None:
    rows = [plain(i, question=f"{question} {i}") for i in range(4)]
    facts = DataFacts(rows, control=["<|user|>", "<|end|>"])
    (finding,) = (f for f in ask(conversations, facts) if f.code == "control-token-in-content")
    assert finding.count == 4
    assert ("applied twice" in finding.why) == twice
    assert ("before they were rendered" in finding.fix) == twice


def test_arguments_that_are_broken_json_are_called_so() -> None:
    tool = {"name": "weather", "parameters": {"type": "object"}}
    for text, said in (
        ('{"city": "Oslo"', "not a complete JSON object"),
        ("print(1)", "not an object"),
    ):
        assert said in call_problem({"name": "weather", "arguments": text}, tool)
    assert call_problem({"name": "weather", "arguments": {"city": "Oslo"}}, tool) == ""
