"""Rows of every schema become the same kind of message; every refusal has its code."""

from __future__ import annotations

import copy
import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from truetune.data.conversation import Conversation
from truetune.data.load import Loaded, load
from truetune.data.messages import messages_of
from truetune.errors import UsageError
from truetune.findings import Finding

ASK = {"role": "user", "content": "q"}
SAY = {"role": "assistant", "content": "a"}


@pytest.fixture
def data(tmp_path: Path):
    def loaded(*rows: Any, **kwargs: Any) -> Loaded:
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        return load(path, **kwargs)

    return loaded


def chat(*turns: dict, **more: Any) -> dict:
    return {"messages": list(turns), **more}


def call(name: str = "f", **arguments: Any) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def one(loaded: Loaded) -> Conversation:
    assert [f for f in loaded.findings if f.level == "error"] == []
    (conversation,) = loaded.conversations
    return conversation


def turns(loaded: Loaded) -> list[dict]:
    return list(one(loaded).messages)


# --- schemas -------------------------------------------------------------------------------------


def test_messages(data):
    loaded = data(chat({"role": "system", "content": "s"}, ASK, SAY))
    assert loaded.schema == "messages"
    assert turns(loaded) == [{"role": "system", "content": "s"}, ASK, SAY]
    assert one(loaded).where.endswith("rows.jsonl:1")
    assert (one(loaded).tools, one(loaded).template_kwargs, one(loaded).text) == (None, {}, None)


def test_openai_tool_calls(data):
    raw = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1]}'}}
    result = {"role": "tool", "content": "r", "tool_call_id": "1", "name": "f"}
    asked = {"role": "assistant", "content": None, "tool_calls": [raw], "refusal": None}
    loaded = data(chat(ASK, asked, result, SAY))
    made = {"id": "1", **call(x=[1])}
    assert turns(loaded) == [
        ASK,
        {"role": "assistant", "content": "", "tool_calls": [made]},
        result,
        SAY,
    ]
    assert list(turns(loaded)[1]["tool_calls"][0]) == list(raw)


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        ('{"x": 1}', {"x": 1}),
        ({"x": None}, {"x": None}),
        ("", {}),
        (None, {}),
        ("[1]", "[1]"),
        ("{broken", "{broken"),
    ],
)
def test_tool_arguments(data, arguments, kept):
    raw = {"function": {"name": "f", "arguments": arguments}}
    loaded = data(chat(ASK, {"role": "assistant", "tool_calls": [raw]}))
    assert turns(loaded)[1]["tool_calls"][0]["function"]["arguments"] == kept


def test_other_spellings_of_tool_calls(data):
    for extra in (
        {"tool_calls": [{"name": "f", "parameters": {"x": 1}}]},
        {"tool_calls": '[{"name": "f", "arguments": {"x": 1}}]'},
        {"function_call": {"name": "f", "arguments": '{"x": 1}'}},
        {"content": [{"type": "tool_use", "id": "", "name": "f", "input": {"x": 1}}]},
        {"content": [{"type": "tool_call", "value": '{"name": "f", "arguments": {"x": 1}}'}]},
        {"content": [{"type": "tool_calls", "tool_calls": [call(x=1)]}]},
    ):
        loaded = data(chat(ASK, {"role": "assistant", **extra}))
        assert turns(loaded)[1] == {"role": "assistant", "content": "", "tool_calls": [call(x=1)]}


@pytest.mark.parametrize("key", ["text", "value", "content"])
def test_typed_parts(data, key):
    content = [
        {"type": "reasoning", "value": "r1"},
        {"type": "thinking", "thinking": "r2"},
        {"type": "text", key: "a"},
        "b",
        {"type": "tool_call", "value": {"name": "f", "arguments": {}}},
    ]
    loaded = data(
        chat({"role": "user", "content": [{"type": "text", key: "q"}]}, {**SAY, "content": content})
    )
    assert turns(loaded) == [
        ASK,
        {
            "role": "assistant",
            "content": "ab",
            "reasoning_content": "r1\n\nr2",
            "tool_calls": [call()],
        },
    ]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_fields(data, key):
    assert turns(data(chat(ASK, {**SAY, key: "r"})))[1] == {**SAY, "reasoning_content": "r"}
    assert turns(data(chat(ASK, {**SAY, key: " \n"})))[1] == SAY
    assert turns(data(chat(ASK, {**SAY, key: None})))[1] == SAY


def test_sharegpt(data):
    loaded = data(
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "r"},
                {"from": "function_call", "value": '[{"name": "f"}, {"name": "g"}]'},
                {"from": "tool", "value": "r"},
                {"from": "gpt", "value": "a"},
            ],
            "system": "s",
            "tools": '[{"name": "f", "description": "d", "parameters": {}}]',
        }
    )
    assert loaded.schema == "sharegpt"
    assert turns(loaded) == [
        {"role": "system", "content": "s"},
        ASK,
        {"role": "assistant", "content": "", "tool_calls": [call(x=1)]},
        {"role": "tool", "content": "r"},
        {"role": "assistant", "content": "", "tool_calls": [call("f"), call("g")]},
        {"role": "tool", "content": "r"},
        SAY,
    ]
    function = {"name": "f", "description": "d", "parameters": {}}
    assert one(loaded).tools == ({"type": "function", "function": function},)


def test_schema_is_named_for_the_turns_not_the_column(data):
    assert data({"conversations": [ASK, SAY]}).schema == "messages"
    turns_ = [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]
    loaded = data({"messages": turns_})
    assert loaded.schema == "sharegpt"
    assert turns(loaded) == [ASK, SAY]
    assert turns(data({"conversations": turns_}, schema="messages")) == [ASK, SAY]


@pytest.mark.parametrize(
    ("extra", "asked"), [({}, "q"), ({"input": ""}, "q"), ({"input": "i"}, "q\n\ni")]
)
def test_alpaca(data, extra, asked):
    loaded = data({"instruction": "q", "output": "a", **extra})
    assert loaded.schema == "alpaca"
    assert turns(loaded) == [{**ASK, "content": asked}, SAY]


def test_alpaca_system_and_history(data):
    row = {"instruction": "q", "output": "a", "system": "s", "history": [["q0", "a0"]]}
    assert [(m["role"], m["content"]) for m in turns(data(row))] == [
        ("system", "s"),
        ("user", "q0"),
        ("assistant", "a0"),
        ("user", "q"),
        ("assistant", "a"),
    ]


def test_instances(data):
    instances = [{"input": "", "output": "a"}, {"input": "i", "output": ""}, 3, {"output": "b"}]
    loaded = data({"who": "me", "instruction": "q", "instances": instances})
    assert loaded.schema == "instances"
    assert [c.messages[1]["content"] for c in loaded.conversations] == ["a", "b"]
    assert [f.code for f in loaded.findings] == ["empty-answer", "bad-message", "unused-columns"]
    assert loaded.num_rows == 1
    assert data({"instruction": "q", "instances": []}).findings[0].code == "no-assistant-turn"


@pytest.mark.parametrize(
    "columns",
    [("prompt", "completion"), ("question", "answer"), ("query", "response"), ("input", "output")],
)
def test_prompt_completion(data, columns):
    loaded = data(dict(zip(columns, "qa", strict=True)))
    assert loaded.schema == "prompt-completion"
    assert turns(loaded) == [ASK, SAY]


def test_prompt_completion_of_messages_trains_the_completion_alone(data):
    given_ = {"role": "assistant", "content": "a0"}
    row = {"prompt": [ASK, given_, ASK], "completion": [SAY], "system": "s"}
    assert turns(data(row)) == [
        {"role": "system", "content": "s"},
        ASK,
        {**given_, "train": False},
        ASK,
        SAY,
    ]
    assert turns(data({"prompt": [ASK], "completion": "a"})) == [ASK, SAY]


@pytest.mark.parametrize(
    "columns",
    [
        ("problem", "thinking", "solution"),
        ("question", "reasoning", "answer"),
        ("Question", "Complex_CoT", "Response"),
        ("prompt", "trace", "completion"),
        ("instruction", "cot", "output"),
    ],
)
def test_reasoning_triplets(data, columns):
    loaded = data(dict(zip(columns, "qra", strict=True)))
    assert loaded.schema == "reasoning"
    assert turns(loaded) == [ASK, {**SAY, "reasoning_content": "r"}]
    assert turns(data(dict(zip(columns, ("q", "", "a"), strict=True)))) == [ASK, SAY]


def test_text_and_its_empty_rows(data):
    loaded = data({"text": "a\n"}, {"text": " "}, {"text": None}, {"text": "b"})
    assert loaded.schema == "text"
    assert [(c.text, c.messages) for c in loaded.conversations] == [("a\n", ()), ("b", ())]
    (note,) = loaded.findings
    assert (note.code, note.level, note.count) == ("empty-text", "note", 2)
    assert note.where.endswith("rows.jsonl:2")
    assert data({"text": "a"}).findings == []


def test_specific_schemas_go_before_general_ones(data):
    row = {"instruction": "q", "input": "", "output": "a", "text": "t"}
    loaded = data(row)
    assert loaded.schema == "alpaca"
    assert data(row, schema="text").schema == "text"
    assert data({"prompt": "q", "messages": [ASK, SAY]}).schema == "messages"


def test_row_level_template_kwargs(data):
    for value in ({"enable_thinking": False}, '{"enable_thinking": false}'):
        row = chat(ASK, SAY, chat_template_kwargs=value)
        assert one(data(row)).template_kwargs == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("extra", "train"),
    [
        ({"train": False}, {"train": False}),
        ({"train": True}, {"train": True}),
        ({"weight": 0}, {"train": False}),
        ({"weight": 1.0}, {"train": True}),
        ({"weight": None}, {}),
        ({"weight": 0, "train": False}, {"train": False}),
    ],
)
def test_train_flags(data, extra, train):
    assert turns(data(chat(ASK, {**SAY, **extra}, ASK, SAY)))[1] == {**SAY, **train}


def test_nan_is_no_content(data):
    assert turns(data({"prompt": "q", "completion": "a", "system": float("nan")})) == [ASK, SAY]


def test_messages_as_json_text(data):
    assert turns(data({"messages": json.dumps([ASK, SAY])})) == [ASK, SAY]


# --- findings: each with a near miss -------------------------------------------------------------

PART = [{"type": "text", "text": "q"}]
IMAGE = [{"type": "image_url", "image_url": {"url": "x"}}]
CALLING = {"role": "assistant", "tool_calls": [call()]}
BAD = [
    (
        "unknown-role",
        chat({**ASK, "role": "narrator"}, SAY),
        chat({**ASK, "role": "developer"}, SAY),
    ),
    ("unknown-role", chat({"content": "q"}, SAY), chat({**ASK, "role": "User"}, SAY)),
    ("bad-message", chat("q", SAY), chat(ASK, SAY)),
    ("bad-message", {"messages": "q"}, {"messages": json.dumps([ASK, SAY])}),
    ("bad-message", {"messages": "[broken"}, {"messages": json.dumps([ASK, SAY])}),
    ("prompt-missing", chat(), chat(ASK, SAY)),
    ("prompt-missing", chat(SAY), chat({**SAY, "train": False}, ASK, SAY)),
    ("prompt-missing", {"prompt": " ", "completion": "a"}, {"prompt": ".", "completion": "a"}),
    (
        "prompt-missing",
        {"instruction": "", "output": "a"},
        {"instruction": "", "input": "i", "output": "a"},
    ),
    ("no-assistant-turn", chat(ASK), chat(ASK, SAY)),
    ("no-assistant-turn", chat(ASK, {**SAY, "train": False}), chat(ASK, {**SAY, "train": True})),
    ("empty-answer", chat(ASK, {**SAY, "content": " \n"}), chat(ASK, CALLING)),
    (
        "empty-answer",
        chat(ASK, {**SAY, "content": None}, ASK, SAY),
        chat(ASK, {**SAY, "content": "", "train": False}, ASK, SAY),
    ),
    ("empty-answer", {"prompt": "q", "completion": None}, {"prompt": "q", "completion": "0"}),
    ("empty-answer", {"prompt": "q", "completion": []}, {"prompt": "q", "completion": [SAY]}),
    (
        "empty-answer",
        {"problem": "q", "thinking": "r", "solution": ""},
        {"problem": "q", "thinking": "", "solution": "a"},
    ),
    (
        "unsupported-content",
        chat({**ASK, "content": PART + IMAGE}, SAY),
        chat({**ASK, "content": PART}, SAY),
    ),
    (
        "unsupported-content",
        chat({**ASK, "images": ["x.png"]}, SAY),
        chat({**ASK, "images": []}, SAY),
    ),
    ("unsupported-content", chat({**ASK, "content": 3}, SAY), chat({**ASK, "content": "3"}, SAY)),
    (
        "unsupported-content",
        chat({**ASK, "content": [3]}, SAY),
        chat({**ASK, "content": ["3"]}, SAY),
    ),
    (
        "unsupported-content",
        chat({**ASK, "content": [{"type": "text"}]}, SAY),
        chat({**ASK, "content": PART}, SAY),
    ),
    (
        "unsupported-content",
        chat(ASK, {**SAY, "content": [*PART, {"type": "reasoning", "value": "r"}]}),
        chat(ASK, {**SAY, "content": [{"type": "reasoning", "value": "r"}, *PART]}),
    ),
    (
        "unsupported-content",
        chat(ASK, {**SAY, "content": [{"type": "tool_call", "value": {"name": "f"}}, *PART]}),
        chat(ASK, {**SAY, "content": [*PART, {"type": "tool_call", "value": {"name": "f"}}]}),
    ),
    (
        "unsupported-content",
        chat({**ASK, "thinking": "r"}, SAY),
        chat({**ASK, "thinking": ""}, SAY),
    ),
    (
        "unsupported-content",
        chat(ASK, {**SAY, "thinking": "r", "reasoning": "s"}),
        chat(ASK, {**SAY, "thinking": "r", "reasoning": "r"}),
    ),
    (
        "unsupported-content",
        chat(ASK, {**SAY, "reasoning": {"x": 1}}),
        chat(ASK, {**SAY, "reasoning": "r"}),
    ),
    ("unsupported-content", {"prompt": "q", "completion": 3}, {"prompt": "q", "completion": "3"}),
    ("unsupported-content", {"text": ["a"]}, {"text": "a"}),
    ("bad-tool-call", chat(ASK, {**CALLING, "tool_calls": "f("}), chat(ASK, CALLING)),
    (
        "bad-tool-call",
        chat(ASK, {**CALLING, "tool_calls": 3}),
        chat(ASK, {**SAY, "tool_calls": []}),
    ),
    (
        "bad-tool-call",
        chat(ASK, {**CALLING, "tool_calls": [{"function": {"arguments": {}}}]}),
        chat(ASK, CALLING),
    ),
    (
        "bad-tool-call",
        chat(ASK, {**CALLING, "tool_calls": [{"name": "f", "arguments": 3}]}),
        chat(ASK, CALLING),
    ),
    (
        "unsupported-content",
        chat({**ASK, "content": [{"role": "user", "content": "hi"}]}, SAY),
        chat({**ASK, "content": [{"type": "text", "text": "hi"}]}, SAY),
    ),
    (
        "bad-tool-call",
        chat({**ASK, "tool_calls": [call()]}, SAY),
        chat({**ASK, "tool_calls": []}, SAY),
    ),
    (
        "bad-tool-call",
        chat(ASK, {**CALLING, "function_call": {"name": "f"}}),
        chat(ASK, {**CALLING, "function_call": None}),
    ),
    (
        "bad-tool-call",
        chat(ASK, {"from": "function_call", "value": ""}),
        chat(ASK, {"from": "function_call", "value": '{"name": "f"}'}),
    ),
    ("bad-tools", chat(ASK, SAY, tools="[{broken"), chat(ASK, SAY, tools="[]")),
    ("bad-tools", chat(ASK, SAY, tools=3), chat(ASK, SAY, tools=None)),
    ("bad-tools", chat(ASK, SAY, tools=[3]), chat(ASK, SAY, tools=[{"name": "f"}])),
    (
        "bad-tools",
        chat(ASK, SAY, tools=[{"type": "function", "function": {}}]),
        chat(ASK, SAY, tools=[{"function": {"name": "f"}}]),
    ),
    ("bad-train-flag", chat(ASK, {**SAY, "weight": 0.5}), chat(ASK, {**SAY, "weight": 1})),
    ("bad-train-flag", chat(ASK, {**SAY, "train": "no"}), chat(ASK, {**SAY, "train": None})),
    (
        "bad-train-flag",
        chat(ASK, {**SAY, "train": True, "weight": 0}),
        chat(ASK, {**SAY, "train": True, "weight": 1}),
    ),
    (
        "bad-history",
        {"instruction": "q", "output": "a", "history": [["q"]]},
        {"instruction": "q", "output": "a", "history": []},
    ),
    (
        "two-systems",
        chat({**ASK, "role": "system", "content": "s"}, ASK, SAY, system="t"),
        chat({**ASK, "role": "system", "content": "s"}, ASK, SAY, system="s"),
    ),
    (
        "bad-template-kwargs",
        chat(ASK, SAY, chat_template_kwargs=[1]),
        chat(ASK, SAY, chat_template_kwargs={}),
    ),
    (
        "invalid-text",
        chat({**ASK, "content": "\ud83d"}, SAY),
        chat({**ASK, "content": "\ud83d\ude00"}, SAY),
    ),
]


@pytest.mark.parametrize(("code", "bad", "near"), BAD)
def test_bad_row_and_near_miss(data, code, bad, near):
    loaded = data(near, bad)
    errors = [f for f in loaded.findings if f.level == "error"]
    assert [(f.code, f.count) for f in errors] == [(code, 1)]
    assert errors[0].where.endswith("rows.jsonl:2")
    assert len(loaded.conversations) == 1
    assert loaded.num_rows == 2


def test_mixed_schemas_are_named(data):
    chats = [chat(ASK, SAY)] * 2
    loaded = data({"prompt": "q", "completion": "a"}, *chats, {"foo": 1})
    assert loaded.schema == "messages"
    assert len(loaded.conversations) == 2
    first, second = loaded.findings
    assert first.code == second.code == "mixed-schemas"
    assert "prompt-completion" in first.what
    assert "messages" in first.what
    assert "no known schema" in second.what
    assert [f.where[-2:] for f in loaded.findings] == [":1", ":4"]
    # A row with a column more would lose it in silence.
    loaded = data(
        *[{"question": "q", "answer": "a"}] * 2, {"question": "q", "cot": "r", "answer": "a"}
    )
    assert [f.code for f in loaded.findings] == ["mixed-schemas"]
    # Near miss: an optional column is not another schema.
    loaded = data(
        {"instruction": "q", "output": "a"}, {"instruction": "q", "input": "", "output": "a"}
    )
    assert loaded.findings == []


def test_unused_columns_are_told_once(data):
    turn = {**ASK, "timestamp": 3, "refusal": None}
    loaded = data(chat(turn, SAY, topic="x", rating=3), chat(ASK, SAY, rating=2))
    (note,) = loaded.findings
    assert (note.code, note.level, note.count) == ("unused-columns", "note", 3)
    assert note.what.endswith(": messages[].timestamp, rating, topic")
    assert data(chat(ASK, SAY)).findings == []


@pytest.mark.parametrize("name", ["id", "UUID", "question_id", "", "Unnamed: 0", "data-source"])
def test_a_column_that_says_which_row_it_is_needs_no_note(data, name):
    """Near miss: a text of some length, whatever its column is called, and structures."""
    assert data(chat(ASK, SAY, **{name: "0a1b"}), chat(ASK, SAY, **{name: None})).findings == []
    for value in ("once upon a time " * 30, ["a"], {"a": 1}):
        (note,) = data(chat(ASK, SAY, **{name: value})).findings
        assert (note.code, note.count) == ("unused-columns", 1)
    for other in ("idea", "answer_key", "resource"):
        assert [f.code for f in data(chat(ASK, SAY, **{other: "x"})).findings] == ["unused-columns"]


def test_findings_escape_what_they_quote(data):
    loaded = data(chat(ASK, SAY), chat({**ASK, "role": "\x1b[2J"}, SAY))
    assert "\x1b" not in "".join(loaded.findings[0].lines())


# --- properties ----------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
OBJECTS = st.dictionaries(TEXT, st.integers() | TEXT | st.none(), max_size=3)


@st.composite
def normal_messages(draw: st.DrawFn) -> list[dict]:
    made = []
    for role in draw(st.lists(st.sampled_from(["user", "assistant", "tool"]), min_size=1)):
        message: dict = {"role": role, "content": draw(TEXT)}
        if role == "assistant":
            if draw(st.booleans()):
                message["reasoning_content"] = draw(TEXT.filter(str.strip))
            if draw(st.booleans()):
                message["tool_calls"] = [call("f", **draw(OBJECTS))]
            if draw(st.booleans()):
                message["train"] = draw(st.booleans())
        made.append(message)
    return made


@given(normal_messages())
def test_normal_messages_stay_as_they_are(messages):
    from collections import Counter

    before = copy.deepcopy(messages)
    assert messages_of(messages, Counter()) == before
    assert messages == before
    assert messages_of(json.dumps(messages), Counter()) == before


@given(
    st.recursive(
        st.none() | st.integers() | TEXT,
        lambda x: (
            st.lists(x)
            | st.dictionaries(
                st.sampled_from(["role", "content", "from", "value", "tool_calls", "type", "name"])
                | TEXT,
                x,
            )
        ),
        max_leaves=12,
    )
)
def test_no_cell_breaks_the_converter(cell):
    from collections import Counter

    from truetune.data.convert import convert
    from truetune.data.rows import Row
    from truetune.data.schemas import SCHEMAS

    for schema in SCHEMAS:
        slots = [*schema.required, *schema.optional]
        row = Row(dict.fromkeys(slots, cell), "f", 1)
        for made in convert(row, schema.name, {s: s for s in slots}, Counter()):
            assert isinstance(made, Conversation | Finding)


def test_unknown_schema(data):
    with pytest.raises(UsageError) as caught:
        data(chat(ASK, SAY), schema="alpacca")
    assert caught.value.code == "unknown-schema"
    assert "alpaca" in caught.value.fix
    assert data(chat(ASK, SAY), schema="OpenAI").schema == "messages"


def test_a_date_of_a_parquet_file_is_refused_with_its_row(tmp_path: Path) -> None:
    """JSON has no dates, and a tool call is written as JSON."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    days = [None, datetime.date(2026, 1, 2), None]
    rows = [
        {"messages": [ASK, {**CALLING, "tool_calls": [{"name": "f", "arguments": {"day": day}}]}]}
        for day in days
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    loaded = load(tmp_path / "rows.parquet")
    (told,) = [f for f in loaded.findings if f.level == "error"]
    assert told.code == "bad-tool-call"
    assert told.where == f"{tmp_path}/rows.parquet row 2"
    assert len(loaded.conversations) == 2
