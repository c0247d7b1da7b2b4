"""What is told from ids, labels and stop ids alone: for each code rows that bring it about, and
rows as near to it as can be that must stay silent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from label_rows import check_labels, table_of
from tiny_contracts import DELETING, PLAIN, THINKING, byte_level, chat
from truetune.contract.frame import Frame
from truetune.contract.stops import served_stops
from truetune.errors import UsageError
from truetune.findings import Finding

Rows = list[tuple[list[int], list[int]]]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = byte_level()
    made.chat_template = PLAIN
    return made


ANSWERS = tuple(
    f"{text} The quick fox jumps over the lazy dog."
    for text in ("Yes, no.", "The lazy dog.", "Maybe, and then the fox.", "Hello there, world.")
)


def rendered(tok: Any, messages: Sequence[Any], **arguments: Any) -> list[int]:
    text = tok.apply_chat_template(list(messages), tokenize=False, **arguments)
    return list(tok(text, add_special_tokens=False)["input_ids"])


def on_everything(tok: Any, **arguments: Any) -> Rows:
    """As a trainer that takes loss on all tokens has them."""
    rows = (rendered(tok, chat(f"Question {a}?", a), **arguments) for a in ANSWERS)
    return [(ids, list(ids)) for ids in rows]


def on_answers(tok: Any) -> Rows:
    """As a trainer that masks the prompt has them."""
    rows = []
    for answer in ANSWERS:
        messages = chat(f"Question {answer}?", answer)
        prompt = rendered(tok, messages[:1], add_generation_prompt=True)
        ids = rendered(tok, messages)
        rows.append((ids, [-100] * len(prompt) + ids[len(prompt) :]))
    return rows


def written(tok: Any, *texts: str) -> Rows:
    """Texts without a template, every token a target."""
    return [(ids, list(ids)) for ids in tok(list(texts), add_special_tokens=False)["input_ids"]]


def masked_ids(rows: Rows, token: int) -> Rows:
    return [(ids, [-100 if i == token else i for i in labels]) for ids, labels in rows]


def cut(rows: Rows, size: int) -> Rows:
    return [(ids[:size], labels[:size]) for ids, labels in rows]


def alpaca(tok: Any, end: bool = True) -> Rows:
    texts = (f"### Instruction:\nQuestion {a}?\n\n### Response:\n{a}" for a in ANSWERS)
    return written(tok, *(text + (tok.eos_token if end else "") for text in texts))


def end(tok: Any) -> int:
    return int(tok.convert_tokens_to_ids("<|end|>"))


def text_id(tok: Any, text: str) -> int:
    (found,) = tok(text, add_special_tokens=False)["input_ids"]
    return int(found)


def thoughts(tok: Any, *, closed: bool = True, empty: Sequence[int] = ()) -> Rows:
    """One-turn rows with reasoning in the content."""
    rows = []
    for i, answer in enumerate(ANSWERS):
        thought = "" if i in empty else "and then"
        block = f"<think>\n{thought}\n" + ("</think>\n\n" if closed else "")
        rows.append(rendered(tok, chat("Question?", block + answer)))
    return [(ids, list(ids)) for ids in rows]


def two_turns(tok: Any, first: str, template: str | None = None) -> Rows:
    """Conversations whose last answer reasons; rendered with another template where one is
    given."""
    messages = chat("Question?", first + "yes", "And then?", "<think>\nmaybe\n</think>\n\nno")
    arguments = {} if template is None else {"chat_template": template}
    ids = rendered(tok, messages, **arguments)
    return [(ids, list(ids))] * 4


def talks(tok: Any, *conversations: Any) -> Rows:
    """Conversations with a label on every token."""
    return [(ids, list(ids)) for ids in (rendered(tok, talk) for talk in conversations)]


def closed_at(tok: Any, limit: int, answers: int) -> list[list[int]]:
    """Rows of many lengths, of which a third is long; cut at a limit and closed there."""
    rows = []
    for number in range(answers):
        long = number % 3 == 0
        text = "The quick fox jumps " * (9 if long else 1 + number % 4) + "over the dog."
        ids = rendered(tok, chat("Hm?", text))
        rows.append([*ids[: limit - 1], end(tok)] if len(ids) > limit else ids)
    return rows


def mask_from_first_answer(tok: Any, *, questions: bool = True) -> Rows:
    """The first prompt has no labels; later questions have some or none."""
    talk = chat("Question?", "Yes, no.", "And what about that?", "Maybe.")
    ids = rendered(tok, talk)
    labels = [-100] * len(ids)
    for turn in (1, 3):
        start = len(rendered(tok, talk[:turn], add_generation_prompt=True))
        stop = len(ids) if questions else len(rendered(tok, talk[: turn + 1]))
        labels[start:stop] = ids[start:stop]
    return [(ids, labels)] * 4


def twice(tok: Any, *contents: str, asked: bool = True) -> Rows:
    """Rendered prompts as the content of a turn of the user, or of the assistant."""
    made = []
    for content in contents:
        opened = tok.apply_chat_template(chat(content), tokenize=False, add_generation_prompt=asked)
        made.append(chat(opened, "Yes.") if asked else chat("Hm?", f"<|assistant|>\n{content}"))
    return talks(tok, *made)


def split(tok: Any, *, every: int = 1) -> Rows:
    """Rows whose control tokens were tokenized as their letters."""
    rows = on_everything(tok)
    for number in range(0, len(rows), every):
        text = tok.decode(rows[number][0])
        ids = tok(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        rows[number] = (ids, list(ids))
    return rows


def early(tok: Any, tokens: int, every: int = 1) -> Rows:
    """Labels that begin some tokens before the answer."""
    rows = on_answers(tok)
    for ids, labels in rows[::every]:
        first = next(at for at, label in enumerate(labels) if label != -100)
        labels[first - tokens : first] = ids[first - tokens : first]
    return rows


def thinking(tok: Any) -> Any:
    made = byte_level()
    made.chat_template = THINKING
    return made


# What is given to `check_labels`: rows and options, made from the tokenizer.
Make = Callable[[Any], tuple[Rows, dict[str, Any]]]


def case(rows: Callable[[Any], Rows], **options: Any) -> Make:
    return lambda tok: (rows(tok), options)


CASES: dict[str, tuple[list[Make], list[Make]]] = {
    "stop-not-supervised": (
        [
            # The collator masked the pad id, which ends answers too.
            case(lambda t: masked_ids(on_everything(t), end(t))),
            case(lambda t: masked_ids(on_answers(t), end(t))),
            # The mask is closed before the end.
            case(lambda t: [(i, [*x[:-2], -100, -100]) for i, x in on_answers(t)]),
        ],
        [
            # Padding of the end token without a label, behind a labelled one.
            case(lambda t: [(i + [end(t)] * 3, x + [-100] * 3) for i, x in on_everything(t)]),
            case(on_answers),
            # What the template writes after the end may be masked.
            case(lambda t: [(i, [*x[:-1], -100]) for i, x in on_answers(t)]),
        ],
    ),
    "stop-missing": (
        [
            case(lambda t: [(i[:-2], x[:-2]) for i, x in on_answers(t)]),
            case(lambda t: alpaca(t, end=False)),
        ],
        [
            case(alpaca),
            # Blocks of a running text end anywhere.
            case(lambda t: [written(t, "the fox and the dog " * 20)[0]] * 3),
        ],
    ),
    "answer-cut": (
        [
            # Closed by hand where it was cut.
            case(lambda t: [(i, list(i)) for i in closed_at(t, 70, answers=12)]),
            case(lambda t: cut(on_answers(t), 40)),
            # Each row its own length, and the limit is known.
            case(lambda t: cut(on_everything(t), 38), max_length=38),
        ],
        [
            # As long as the limit, and whole.
            case(lambda t: [on_answers(t)[0]] * 4, max_length=10_000),
            # The longest rows are of one length, and end with the end of a sentence.
            case(lambda t: [(i, list(i)) for i in closed_at(t, 10_000, answers=12)]),
            case(lambda t: [on_answers(t)[0]] * 4),
        ],
    ),
    "generation-prompt-trained": (
        [
            case(lambda t: on_everything(t, add_generation_prompt=True)),
            # A collator put the end token behind it.
            case(
                lambda t: [
                    ([*i, end(t)], [*x, end(t)])
                    for i, x in on_everything(t, add_generation_prompt=True)
                ]
            ),
        ],
        [
            case(on_everything),
            # A very short answer stands near the end of its row.
            case(lambda t: [(i, list(i)) for i in [rendered(t, chat("Hello?", "a"))] * 3]),
        ],
    ),
    "stop-not-served": (
        [
            case(on_everything, stop_ids=[6]),
            case(on_answers, generation_config={"eos_token_id": 6}),
        ],
        [
            case(on_everything, generation_config={"eos_token_id": [6, 1]}),
            # Ends on its own marker, and then on what is served.
            case(lambda t: [([*i, 6], [*x, 6]) for i, x in on_everything(t)], stop_ids=[6]),
        ],
    ),
    "labels-misaligned": (
        [
            case(lambda t: [(i, [*x[1:], -100]) for i, x in on_everything(t)]),
            case(lambda t: [(i, [-100, *i[:-1]]) for i, _ in on_everything(t)]),
            # One stray token.
            case(lambda t: [(i, [*x[:-3], 77, *x[-2:]]) for i, x in on_answers(t)]),
        ],
        [case(on_everything), case(on_answers)],
    ),
    "nothing-supervised": (
        [
            case(lambda t: [*on_answers(t), ([5, 6, 7], [-100] * 3)]),
            # Only the first token has a label, and nothing predicts it.
            case(lambda t: [*on_answers(t), ([5, 6, 7], [5, -100, -100])]),
        ],
        [case(on_answers)],
    ),
    "prompt-supervised": (
        [case(on_everything, loss_on="assistant"), case(on_everything, loss_on="last")],
        [case(on_answers, loss_on="assistant"), case(on_everything, loss_on="all")],
    ),
    "loss-mask-mixed": (
        [case(lambda t: on_everything(t)[:2] + on_answers(t)[2:])],
        [case(on_everything), case(on_answers)],
    ),
    "loss-on-everything": (
        [case(on_everything)],
        [case(on_answers), case(on_everything, loss_on="all")],
    ),
    "bos-doubled": (
        [case(lambda t: [([5, 5, *i], [5, 5, *x]) for i, x in on_everything(t)])],
        [case(lambda t: [([5, *i], [5, *x]) for i, x in on_everything(t)])],
    ),
    "prompt-not-served": (
        [
            case(alpaca),
            # Some rows only.
            case(lambda t: on_everything(t) + alpaca(t)[:2]),
        ],
        [
            case(on_everything),
            # Text without turns is no prompt at all.
            case(lambda t: written(t, *(a * 3 for a in ANSWERS))),
        ],
    ),
    "marker-in-pieces": (
        [
            # The template's own tokens, in letters.
            case(split),
            case(lambda t: split(t, every=2)),
            case(
                lambda t: written(
                    t,
                    *(
                        f"<|im_start|>user\nHm?<|im_end|>\n<|im_start|>a\n{a}<|im_end|>"
                        for a in ANSWERS
                    ),
                )
            ),
        ],
        [
            case(on_everything),
            # One text about the template, in letters.
            case(lambda t: on_everything(t) + split(t)[:1]),
            # In pieces, but what closes an answer is one token.
            case(lambda t: written(t, *(f"<|im_start|>Hm?\n{a}<|end|>" for a in ANSWERS))),
            # Somebody writes about markers.
            case(
                lambda t: [
                    (i, list(i))
                    for i in (rendered(t, chat("Hello?", f"<|im_end|> {a}")) for a in ANSWERS)
                ]
            ),
        ],
    ),
    "answer-start-masked": (
        [
            # "...France? " and "Paris." were merged: " Paris" counts as prompt.
            case(
                lambda t: [
                    (i, [-100] * 7 + i[7:])
                    for i in (
                        t(f"Question? the fo{c}, jumps over.<|end|>")["input_ids"] for c in "abcx"
                    )
                ]
            )
        ],
        [case(on_answers)],
    ),
    "answers-masked": (
        [
            # The mask is the wrong way round.
            case(
                lambda t: [
                    (i, [-100 if x != -100 else token for token, x in zip(i, labels, strict=True)])
                    for i, labels in on_answers(t)
                ]
            )
        ],
        [case(on_answers), case(on_everything)],
    ),
    "template-twice": (
        [
            case(lambda t: twice(t, "Hm?", "And?", "So?")),
            case(lambda t: twice(t, "Yes, no.", "Maybe.", asked=False)),
            # Some rows only.
            case(lambda t: on_everything(t) + twice(t, "Hm?", "And?")),
        ],
        [
            case(on_everything),
            # One text that is about the template.
            case(lambda t: on_everything(t) + twice(t, "Hm?")),
            # Questions that are empty, and answers.
            case(lambda t: talks(t, chat("", "Yes."), chat("", "No."), chat("Hm?", ""))),
            # Texts that name a header, and do not begin with one.
            case(
                lambda t: talks(
                    t, *(chat(f"What is <|user|> in {a}?", "A token.") for a in ANSWERS)
                )
            ),
        ],
    ),
    "header-supervised": (
        [case(lambda t: early(t, 1)), case(lambda t: early(t, 1, every=3))],
        [
            case(on_answers),
            case(on_everything),
            # Labels that were shifted are told as that alone.
            case(lambda t: [(i, [*x[1:], -100]) for i, x in on_answers(t)]),
            # The answers' own line break.
            case(
                lambda t: [
                    ([*i[:at], i[at - 1], *i[at:]], [*x[:at], i[at - 1], *x[at:]])
                    for i, x in on_answers(t)
                    for at in [next(n for n, label in enumerate(x) if label != -100)]
                ]
            ),
        ],
    ),
    "empty-answer": (
        [
            case(lambda t: on_answers(t) + talks(t, chat("Hm?", ""))),
        ],
        [case(on_answers), case(lambda t: talks(t, chat("Hm?", "a")))],
    ),
    "control-token-in-content": (
        [case(lambda t: on_everything(t) + talks(t, chat("Hm?", "An <|end|> is a token.")))],
        [
            case(on_everything),
            case(lambda t: talks(t, chat("Hm?", "Yes.", "And?", "No."))),
            # A template that goes on behind the token in every row.
            case(lambda t: talks(t, chat("Hm?", "An <|end|> is a token."))),
        ],
    ),
    "question-supervised": (
        [case(lambda t: mask_from_first_answer(t))],
        [
            # Every answer, and nothing between them.
            case(lambda t: mask_from_first_answer(t, questions=False)),
            case(lambda t: talks(t, chat("Hm?", "Yes.", "And?", "No."))),
        ],
    ),
    "reasoning-unclosed": (
        [case(lambda t: thoughts(t, closed=False))],
        [case(thoughts), case(on_everything)],
    ),
    "reasoning-empty": (
        [case(lambda t: thoughts(t, empty=[1])), case(lambda t: thoughts(t, empty=range(4)))],
        [case(thoughts)],
    ),
    "id-beyond-head": (
        [case(lambda t: [*on_everything(t), ([400, 5], [400, 5])], head_rows=400)],
        [case(lambda t: [*on_everything(t), ([399, 1], [399, 1])], head_rows=400)],
    ),
}


def codes(found: Sequence[Finding]) -> list[str]:
    return [finding.code for finding in found]


@pytest.mark.parametrize(
    ("code", "make"), [(code, make) for code, (bad, _) in CASES.items() for make in bad]
)
def test_found(tokenizer: Any, code: str, make: Make) -> None:
    rows, options = make(tokenizer)
    found = [f for f in check_labels(rows, tokenizer, **options) if f.code == code]
    assert len(found) == 1
    assert found[0].what
    assert found[0].fix
    assert found[0].rows[0] == found[0].where


@pytest.mark.parametrize(
    ("code", "make"), [(code, make) for code, (_, good) in CASES.items() for make in good]
)
def test_near_misses(tokenizer: Any, code: str, make: Make) -> None:
    rows, options = make(tokenizer)
    assert code not in codes(check_labels(rows, tokenizer, **options))


@pytest.mark.parametrize("rows", [on_answers, lambda t: on_everything(t)])
def test_sound_rows_raise_no_alarm(tokenizer: Any, rows: Callable[[Any], Rows]) -> None:
    found = check_labels(rows(tokenizer), tokenizer)
    assert all(finding.level == "note" for finding in found)
    assert set(codes(found)) <= {"loss-on-everything"}


def test_one_defect_is_one_finding(tokenizer: Any) -> None:
    """The cause, and not what follows from it."""
    for rows, code in (
        (masked_ids(on_everything(tokenizer), end(tokenizer)), "stop-not-supervised"),
        ([(i, [*x[1:], -100]) for i, x in on_everything(tokenizer)], "labels-misaligned"),
        (on_everything(tokenizer, add_generation_prompt=True), "generation-prompt-trained"),
        (cut(on_everything(tokenizer), 38), "answer-cut"),
        (cut(on_everything(tokenizer), 33), "answer-cut"),
    ):
        alarms = [f for f in check_labels(rows, tokenizer) if f.level != "note"]
        assert codes(alarms) == [code]


def test_rows_are_named_and_counted(tokenizer: Any) -> None:
    rows = on_answers(tokenizer)
    rows[1] = masked_ids([rows[1]], end(tokenizer))[0]
    rows[3] = masked_ids([rows[3]], end(tokenizer))[0]
    (finding,) = check_labels(rows, tokenizer, where="rows.jsonl:{}".format)
    assert (finding.level, finding.count) == ("error", 2)
    assert finding.rows == ("rows.jsonl:1", "rows.jsonl:3")


def test_a_straggler_is_a_warning(tokenizer: Any) -> None:
    rows = on_answers(tokenizer) * 50
    rows[7] = (rows[7][0][:-2], rows[7][1][:-2])
    (finding,) = check_labels(rows, tokenizer)
    assert (finding.code, finding.level, finding.count) == ("stop-missing", "warning", 1)


def test_the_reasons_name_the_cause(tokenizer: Any) -> None:
    saved = tokenizer.pad_token
    try:
        tokenizer.pad_token = tokenizer.eos_token
        (shared,) = check_labels(masked_ids(on_answers(tokenizer), end(tokenizer)), tokenizer)
    finally:
        tokenizer.pad_token = saved
    assert "masks every pad token" in shared.why
    empty = [([5] * 50, [-100] * 50)] * 2
    (cut_off, *_) = check_labels(empty, tokenizer, max_length=50)
    assert "fills the length limit of 50 tokens" in cut_off.why
    (no_marker, *_) = check_labels([([70, 71], [-100] * 2)], tokenizer)
    assert "'<|end|>\\n<|assistant|>'" in no_marker.why
    (shifted,) = check_labels([(i, [*x[1:], -100]) for i, x in on_everything(tokenizer)], tokenizer)
    assert "labels are the next token" in shifted.what


def test_each_mask_has_its_own_reason(tokenizer: Any) -> None:
    """What ends an answer, and what a mask leaves out, is told by the tokens that lost a label."""
    two = mask_from_first_answer(tokenizer, questions=False)
    for _, labels in two[:1]:
        # The four rows are one.
        labels[labels.index(end(tokenizer))] = -100
    (finding,) = check_labels(two, tokenizer)
    assert finding.code == "stop-not-supervised"
    assert "earlier answers" in finding.what
    assert "every answer but the last" in finding.why
    # Labels on the question alone: nothing is said of where they end.
    asked = [
        (ids, [-100 if label != -100 else token for token, label in zip(ids, labels, strict=True)])
        for ids, labels in on_answers(tokenizer)
    ]
    assert codes(check_labels(asked, tokenizer)) == ["answers-masked"]
    assert "answers-masked" in codes(check_labels(asked[:1] + on_answers(tokenizer), tokenizer))


@pytest.mark.parametrize(("every", "level"), [(1, "note"), (3, "warning")])
def test_the_line_break_of_a_header_matters_where_rows_differ(
    tokenizer: Any, every: int, level: str
) -> None:
    """TRL's own template for assistant_only_loss marks it in every row."""
    (finding,) = check_labels(early(tokenizer, 1, every=every), tokenizer)
    assert (finding.code, finding.level) == ("header-supervised", level)
    assert finding.count == (4 if every == 1 else 2)


def test_a_pad_token_that_is_a_word_leaves_holes() -> None:
    made = byte_level()
    made.chat_template = PLAIN
    rows = on_answers(made)
    # A token of the middle of every answer.
    word = rows[0][0][-6]
    assert all(word in ids[-8:-3] for ids, _ in rows)
    made.pad_token = made.convert_ids_to_tokens(word)
    assert check_labels(rows, made) == []
    (finding,) = check_labels(masked_ids(rows, word), made)
    assert (finding.code, finding.level) == ("answer-hole", "error")
    assert "is the pad token of this tokenizer" in finding.why


def test_history_that_no_server_sends() -> None:
    tok = byte_level()
    tok.chat_template = THINKING
    reasoned = "<think>\nand then\n</think>\n\n"
    kept = two_turns(tok, reasoned, template=PLAIN)
    assert "history-not-served" in codes(check_labels(kept, tok))
    # Rendered by the served template: the first answer lost its reasoning.
    lost = two_turns(tok, reasoned)
    (finding,) = [f for f in check_labels(lost, tok) if f.level != "note"]
    assert (finding.code, finding.level, finding.count) == ("reasoning-lost", "warning", 4)
    # Only the last answer has labels: what stands before it is what is served.
    header = rendered(tok, chat("x"), add_generation_prompt=True)
    last = []
    for ids, _ in lost:
        at = len(ids) - ids[::-1].index(header[-2])
        last.append((ids, [-100] * at + ids[at:]))
    assert [f for f in check_labels(last, tok) if f.level != "note"] == []
    # One turn a row: nothing to lose.
    assert [f for f in check_labels(thoughts(tok), tok) if f.level != "note"] == []


def test_a_template_that_keeps_reasoning_is_none_of_that(tokenizer: Any) -> None:
    rows = two_turns(tokenizer, "<think>\nand then\n</think>\n\n")
    assert [f for f in check_labels(rows, tokenizer) if f.level != "note"] == []


# ------------------------------------------------------------------ rows of any trainer


def test_batches_dicts_tuples_and_tensors_are_the_same_rows(tokenizer: Any) -> None:
    import torch

    rows = on_answers(tokenizer)
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([i + [0] * (width - len(i)) for i, _ in rows])
    labels = torch.tensor([x + [-100] * (width - len(x)) for _, x in rows])
    mask = torch.tensor([[1] * len(i) + [0] * (width - len(i)) for i, _ in rows])
    left = [[0] * (width - len(i)) + i for i, _ in rows]
    left_labels = [[-100] * (width - len(x)) + x for _, x in rows]
    left_mask = [[0] * (width - len(i)) + [1] * len(i) for i, _ in rows]
    expected = table_of(rows)
    for same in (
        [{"input_ids": i, "labels": x, "attention_mask": [1] * len(i)} for i, x in rows],
        [{"input_ids": ids, "labels": labels, "attention_mask": mask}],
        [(ids, labels, mask)],
        [{"input_ids": left, "labels": left_labels, "attention_mask": left_mask}],
        [(np.array(i), np.array(x)) for i, x in rows],
    ):
        table = table_of(same)
        assert table.ids.tolist() == expected.ids.tolist()
        assert table.labels.tolist() == expected.labels.tolist()
        assert table.starts.tolist() == expected.starts.tolist()
        assert list(table.where) == ["row 0", "row 1", "row 2", "row 3"]


def test_packed_rows_are_cut_at_positions_and_segments() -> None:
    ids, labels = [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]
    by_position = table_of(
        [{"input_ids": [ids], "labels": [labels], "position_ids": [[0, 1, 2, 0, 1]]}]
    )
    by_segment = table_of([(ids, labels, [1, 1, 1, 2, 2])])
    for table in (by_position, by_segment):
        assert table.starts.tolist() == [0, 3, 5]
        assert list(table.where) == ["row 0", "row 0"]


def test_padding_without_a_mask_keeps_one_token() -> None:
    table = table_of([([7, 8, 9, 9, 9], [7, 8, -100, -100, -100])], pad_id=9, ends=[9])
    assert table.row_ids(0) == [7, 8, 9]
    ended = table_of([([7, 8, 9, 9, 9], [7, 8, 9, -100, -100])], pad_id=9, ends=[9])
    assert ended.row_ids(0) == [7, 8, 9]
    assert ended.labels.tolist() == [7, 8, 9]


def test_labels_on_padding_are_seen_before_it_is_taken_off(tokenizer: Any) -> None:
    rows = [(i + [0] * 3, x + [0] * 3, [1] * len(i) + [0] * 3) for i, x in on_answers(tokenizer)]
    (finding,) = check_labels(rows, tokenizer)
    assert (finding.code, finding.level, finding.count) == ("padding-supervised", "warning", 4)
    rows = [(i + [0] * 3, x + [-100] * 3, [1] * len(i) + [0] * 3) for i, x in on_answers(tokenizer)]
    assert check_labels(rows, tokenizer) == []


def test_rows_that_are_none_are_refused() -> None:
    with pytest.raises(UsageError, match="no input_ids"):
        table_of([{"labels": [1]}])
    with pytest.raises(UsageError, match="2 input_ids and 1 labels"):
        table_of([([1, 2], [1])])
    # Without labels nothing is learned, which is told.
    assert table_of([{"input_ids": [1]}]).num_supervised.tolist() == [0]


def test_no_rows_and_empty_rows(tokenizer: Any) -> None:
    assert check_labels([], tokenizer) == []
    assert codes(check_labels([([], [])], tokenizer)) == ["nothing-supervised"]


# ------------------------------------------------------------------ markers


def test_markers_are_found_by_rendering(tokenizer: Any) -> None:
    found = Frame.probe(tokenizer, stop_ids=[1])
    assert found.answer_start == "<|end|>\n<|assistant|>"
    assert found.user_start == "<|end|>\n<|user|>"
    assert found.terminator == 1
    assert found.own_stop_is_terminator
    assert found.keeps_reasoning is True
    assert found.bos is None
    assert not Frame.probe(tokenizer, stop_ids=[6]).own_stop_is_terminator


def test_markers_of_other_templates(tokenizer: Any) -> None:
    assert Frame.probe(tokenizer, chat_template=THINKING).keeps_reasoning is False
    assert Frame.probe(tokenizer, chat_template=DELETING).keeps_reasoning is None
    bare = byte_level()
    bare.chat_template = None
    without = Frame.probe(bare)
    assert not without.has_template
    assert (without.answer_start, without.terminator) == ("", None)
    assert Frame.probe(byte_level(own_bos=True)).bos is None


def test_what_is_served_comes_from_the_generation_config(tokenizer: Any) -> None:
    from transformers import GenerationConfig

    assert served_stops([("config", GenerationConfig(eos_token_id=[3, 4]))], tokenizer)[0] == (3, 4)
    assert served_stops([("config", {"eos_token_id": 3})], tokenizer)[0] == (3,)
    assert served_stops([("config", None)], tokenizer)[0] == (1,)
    assert served_stops([("config", {})], tokenizer)[0] == (1,)


def test_a_begin_token_that_served_prompts_have(tokenizer: Any) -> None:
    made = byte_level()
    made.chat_template = "{{- bos_token -}}" + PLAIN
    whole = on_everything(made)
    assert "bos-missing" not in codes(check_labels(whole, made))
    without = [(i[1:], x[1:]) for i, x in whole]
    (finding,) = [f for f in check_labels(without, made) if f.level != "note"]
    assert (finding.code, finding.level, finding.count) == ("bos-missing", "warning", 4)
    # Blocks that truetune itself split a text into: only the first begins a document.
    blocks = written(made, *(answer * 3 for answer in ANSWERS))
    assert check_labels(blocks, made, proved=True, is_text=True) == []
    assert "bos-missing" in codes(check_labels(blocks, made, is_text=True))


RESULTS = (
    "{%- for m in messages -%}{%- if m.role == 'tool' -%}"
    "{{- '<|user|>\n<result>\n' ~ m.content ~ '\n</result><|end|>\n' -}}"
    "{%- else -%}{{- '<|' ~ m.role ~ '|>\n' ~ m.content ~ (m.tool_calls or '') ~ '<|end|>\n' -}}"
    "{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}"
    "{%- endif -%}"
)


@pytest.mark.parametrize("learned", ["results", "answers", "questions"])
def test_results_of_tools_are_no_questions(learned: str) -> None:
    """They may stand in a turn of the user: what is trained by mistake is named as what it is."""
    tok = byte_level()
    tok.chat_template = RESULTS
    rows = []
    for answer in ANSWERS:
        talk = [
            {"role": "user", "content": f"Question {answer}?"},
            {"role": "assistant", "content": "Asking."},
            {"role": "user" if learned == "questions" else "tool", "content": "It is a dog."},
            {"role": "assistant", "content": answer},
        ]
        ids = rendered(tok, talk)
        at = len(rendered(tok, talk[:1], add_generation_prompt=True))
        labels = [-100] * at + ids[at:]
        if learned == "answers":
            begin, stop = len(rendered(tok, talk[:2])), len(rendered(tok, talk[:3]))
            labels[begin:stop] = [-100] * (stop - begin)
        rows.append((ids, labels))
    told = [f for f in check_labels(rows, tok) if f.code == "question-supervised"]
    words = {"results": ["the results of tools"], "questions": ["the user's later turns"]}
    assert len(told) == len(words.get(learned, []))
    for finding, said in zip(told, words.get(learned, []), strict=True):
        assert said in finding.what
        assert finding.count == 4


CALLING = RESULTS.replace("(m.tool_calls or '') ~", "").replace(
    "{%- else -%}",
    "{%- elif m.tool_calls -%}{{- '<|assistant|>\\n<|end|>\\n<|assistant|>\\n' -}}"
    "{{- m.tool_calls[0].function.name ~ '<|end|>\\n' -}}"
    "{%- else -%}",
)


def test_an_empty_turn_of_the_history_is_the_templates(tokenizer: Any) -> None:
    """A template that writes one beside each call is no empty answer of the data."""
    tok = byte_level()
    tok.chat_template = CALLING
    call = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": {}}}
    talk = [
        *chat("Question?"),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "It is a dog."},
    ]
    at = len(rendered(tok, talk, add_generation_prompt=True))
    ids = rendered(tok, [*talk, *chat("", "The lazy dog.")[1:]])
    assert "empty-answer" not in codes(check_labels([(ids, [-100] * at + ids[at:])] * 4, tok))
    # Another template writes none: the text of a turn has the markers.
    talk = chat("Question?", "", "And then?", "The lazy dog.")
    ids = rendered(tokenizer, talk)
    at = len(rendered(tokenizer, talk[:3], add_generation_prompt=True))
    last = [(ids, [-100] * at + ids[at:])] * 4
    assert "empty-answer" in codes(check_labels(last, tokenizer))
    # Rows of a contract have the turns of the data, which are checked as data.
    assert "empty-answer" not in codes(check_labels(last, tokenizer, proved=True))
    assert "empty-answer" in codes(check_labels([(ids, ids)] * 4, tokenizer, proved=True))


def test_labels_that_end_early_quote_no_end(tokenizer: Any) -> None:
    """The end token is there, behind some words without a label: it is not missing."""
    rows = [
        (ids, [*labels[:-6], *[-100] * 6])
        for ids, labels in on_answers(tokenizer)
        if len([x for x in labels if x != -100]) > 12
    ]
    found = {f.code: f for f in check_labels(rows, tokenizer)}
    assert "stop-missing" not in found
    assert found["stop-not-supervised"].count == len(rows)
    # Without an end it is missing.
    cut = [(ids[:-6], labels[:-6]) for ids, labels in rows]
    assert "stop-missing" in codes(check_labels(cut, tokenizer))


@pytest.mark.parametrize("ends", [True, False])
def test_labels_that_are_dropped_at_random_are_one_cause(tokenizer: Any, ends: bool) -> None:
    rows = []
    for number in range(40):
        text = "The quick fox jumps over the lazy dog and then over the quick fox. " * 3
        talk = chat(f"Question {number}?", text)
        ids = rendered(tokenizer, talk)
        at = len(rendered(tokenizer, talk[:1], add_generation_prompt=True))
        draw = np.random.default_rng(number)
        kept = draw.random(len(ids)) > 0.2
        kept[-8:] |= not ends
        kept[at : at + 8] |= not ends
        labels = [x if i >= at and kept[i] else -100 for i, x in enumerate(ids)]
        rows.append((ids, labels))
    told = [f for f in check_labels(rows, tokenizer) if f.level != "note"]
    assert [f.code for f in told] == (["answer-hole"] if ends else [])
    if ends:
        assert "the token that ends it" in told[0].what
        assert "at random" in told[0].why


def test_rows_that_were_cut_and_closed_are_one_cause(tokenizer: Any) -> None:
    """Also those that were cut in their prompt, or right behind the header of the answer."""
    limit = 60
    rows = closed_at(tokenizer, limit, 60)
    header = rendered(tokenizer, chat("Hm?"), add_generation_prompt=True)
    asked = rendered(tokenizer, chat("The quick fox jumps " * 40))[: limit - 1]
    behind = rendered(tokenizer, chat("The quick fox jumps " * 40))
    behind = [*behind[: limit - 1 - len(header)], *header][: limit - 1]
    rows += [[*asked, end(tokenizer)], [*behind, end(tokenizer)]]
    told = check_labels([(ids, list(ids)) for ids in rows], tokenizer)
    assert {f.code for f in told if f.level == "error"} == {"answer-cut"}
