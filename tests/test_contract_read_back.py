"""What a client reads back from a completion is the row: no escape, no word beside a call, no
argument lost, added or made another value; and what a format does rightly is taken."""

from __future__ import annotations

from typing import Any

import pytest

from test_contract_proof import CALL, CALLS, TOOL, asked, call, loaded, only, refused, turns
from tiny_contracts import chat
from truetune import UnfaithfulTemplate

pytestmark = pytest.mark.filterwarnings("error")


def json_call(arguments: str) -> str:
    """A call whose arguments are an expression of Jinja."""
    return (
        "{%- for c in m.tool_calls or [] -%}"
        + CALL.replace("(c.function.arguments | tojson)", arguments)
        + "{%- endfor -%}"
    )


def tags(value: str, condition: str = "") -> str:
    """A call in tags, as Qwen3-Coder writes it."""
    return (
        "{%- for c in m.tool_calls or [] -%}{{- '<tool_call>\\n<function=' ~ c.function.name "
        "~ '>\\n' -}}{%- for k, v in c.function.arguments.items()" + condition + " -%}"
        "{{- '<parameter=' ~ k ~ '>\\n' ~ (" + value + ") ~ '\\n</parameter>\\n' -}}"
        "{%- endfor -%}{{- '</function>\\n</tool_call>' -}}{%- endfor -%}"
    )


PLAIN_TAGS = tags("v if v is string else v | tojson")


@pytest.mark.parametrize(
    ("expression", "content"),
    [
        ("m.content | e", "a & b"),
        ("m.content | e", 'say "hi"'),
        ("(m.content | tojson)[1:-1]", "one\ntwo"),
        ("(m.content | tojson)[1:-1]", 'say "hi" now'),
        ("m.content | replace('\\\\', '\\\\\\\\')", "C:\\new"),
        ("m.content ~ '\\\\n'", "Hello there."),
        ("'\\\\t' ~ m.content", "2"),
        ("m.content ~ '\\u00a0'", "Hello there."),
        ("m.content ~ '\\x0b'", "Hello there."),
        ("m.content ~ '\\x00'", "Hello there."),
    ],
)
def test_a_plain_answer_is_written_as_it_is(expression: str, content: str) -> None:
    contract = loaded(turns("{{- " + expression + " -}}"))
    refused(contract, chat("Hi", content))


def test_outer_whitespace_of_a_row_is_its_own() -> None:
    contract = loaded(turns("{{- m.content -}}"))
    for content in ("a\x0b", "\u00a0a", "a\\n", "\ta\n"):
        assert only(contract, chat("Hi", content)) == content + "<|end|>"


def test_outer_whitespace_of_a_value_is_its_own_too() -> None:
    contract = loaded(turns("{{- m.content -}}" + PLAIN_TAGS))
    for value in ("0\u00a0", "\u2003x", "\x0b\x0b1", "a\\n"):
        assert f"\n{value}\n</parameter>" in only(contract, asked(call(city=value), call()))


@pytest.mark.parametrize(
    "beside",
    [
        "OK",
        "Answer:",
        "I",
        "42",
        "2024-01-01",
        "null",
        "true",
        "...",
        "!",
        "$5",
        "()",
        "(1)",
        "#1 ",
    ],
)
def test_nothing_stands_in_front_of_a_call_or_behind_it(beside: str) -> None:
    before = loaded(turns("{{- '" + beside + "' if m.tool_calls -}}{{- m.content -}}" + CALLS))
    assert refused(before, asked(call(sides=6)), tools=[TOOL]).code == "target-invented"
    behind = loaded(turns("{{- m.content -}}" + CALLS + "{{- '" + beside + "' if m.tool_calls -}}"))
    assert refused(behind, asked(call(sides=6), content="Look."), tools=[TOOL])


def test_a_name_of_the_format_stands_in_front_of_its_brackets() -> None:
    contract = loaded(
        turns(
            "{{- m.content -}}{%- if m.tool_calls -%}{{- '\\nfunctools[' -}}"
            '{%- for c in m.tool_calls -%}{{- \'{"name": "\' ~ c.function.name ~ '
            "'\", \"arguments\": ' ~ (c.function.arguments | tojson) ~ '}' -}}"
            "{%- if not loop.last -%}{{- ', ' -}}{%- endif -%}{%- endfor -%}{{- ']' -}}"
            "{%- endif -%}"
        )
    )
    made = only(contract, asked(call(sides=6), call(sides=8), content="Twice."))
    assert made.startswith("Twice.\nfunctools[{")


@pytest.mark.parametrize(
    ("arguments", "row"),
    [
        ("({'tags': c.function.arguments.tags | join(', ')} | tojson)", {"tags": ["x", "y"]}),
        ("({'tags': c.function.arguments.tags[0]} | tojson)", {"tags": ["z"]}),
        ("({'m': c.function.arguments.m | sum(start=[])} | tojson)", {"m": [[1, 2], [3]]}),
        ("({'tags': [c.function.arguments.tags]} | tojson)", {"tags": ["x", "y"]}),
        ("({'tags': c.function.arguments.tags + [0]} | tojson)", {"tags": ["x", "y"]}),
        ("({'tags': [''] + c.function.arguments.tags} | tojson)", {"tags": ["x", "y"]}),
        ("({'f': c.function.arguments.f | tojson} | tojson)", {"f": {"city": "Rome"}}),
        ("({'tags': {}} | tojson)", {"tags": []}),
        ("({'tags': [[]]} | tojson)", {"tags": []}),
        ("([c.function.arguments] | tojson)", {"q": "x"}),
        ("((c.function.arguments or {'strict': true}) | tojson)", {}),
        ("((c.function.arguments or {'extra': none}) | tojson)", {}),
        ("('{\"q\": \"' ~ c.function.arguments.q ~ '\"}')", {"q": "C:\\new\\table"}),
        ("('{\"q\": \"' ~ c.function.arguments.q ~ '\"}')", {"q": 'say "hi" now'}),
        ("({'q': c.function.arguments.q | e} | tojson)", {"q": "a & b"}),
        ("({'q': c.function.arguments.q | trim} | tojson)", {"q": "    x = 1\n"}),
    ],
)
def test_arguments_in_json_read_back_as_the_row_has_them(
    arguments: str, row: dict[str, Any]
) -> None:
    contract = loaded(turns("{{- m.content -}}" + json_call(arguments)))
    assert refused(contract, asked(call(**row)), tools=[TOOL]).code in (
        "target-dropped",
        "target-invented",
    )


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"": "x"},
        {"x": "1", "": "y"},
        {"a": " ", "b": [" ", 0], "c": [[1], [2, {"d": []}]]},
        {"q": '  C:\\new "hi"\n'},
        {"m": [True, False, None], "n": 1.5, "o": {"p": {}}},
        {"city": [0]},
        {"city": [True]},
        {"city": [None]},
    ],
)
def test_arguments_of_every_kind_are_taken(row: dict[str, Any]) -> None:
    only(loaded(turns("{{- m.content -}}" + CALLS)), asked(call(**row)))
    text = json_call("(c.function.arguments | tojson | tojson)")
    assert only(loaded(turns("{{- m.content -}}" + text)), asked(call(q="x", n=2)))


@pytest.mark.parametrize("key", ["a", "e", "tool", "function", "parameter", "arguments"])
@pytest.mark.parametrize("empty", ["", [], {}])
def test_an_argument_that_is_empty_is_not_lost(key: str, empty: Any) -> None:
    contract = loaded(
        turns("{{- m.content -}}" + tags("v if v is string else v | tojson", " if v"))
    )
    for more in ({}, {"b": "x"}, {"b": key}):
        with pytest.raises(UnfaithfulTemplate):
            contract.encode(asked(call(**{key: empty}, **more)), tools=[TOOL])
    only(loaded(turns("{{- m.content -}}" + PLAIN_TAGS)), asked(call(**{key: empty, "b": key})))


@pytest.mark.parametrize(
    ("value", "row"),
    [
        ("v | e", {"q": "a & b"}),
        ("v | replace('\\n', '\\\\n')", {"q": "one\ntwo"}),
        ("v | trim", {"q": "    x = 1\n"}),
        ("v | join(', ')", {"q": [5]}),
        ("v | join(', ')", {"q": []}),
    ],
)
def test_values_in_tags_are_written_as_they_are(value: str, row: dict[str, Any]) -> None:
    refused(loaded(turns("{{- m.content -}}" + tags(value))), asked(call(**row)), tools=[TOOL])


def test_a_value_may_stand_in_cdata() -> None:
    held = "('<![CDATA[' ~ v ~ ']]>') if '&' in v or '\\n' in v else v"
    contract = loaded(turns("{{- m.content -}}" + tags(held)))
    for value in ("a & b", "one\ntwo", "ab"):
        assert value in only(contract, asked(call(q=value)))


def test_false_is_not_proved_by_a_word_of_the_format() -> None:
    typed = PLAIN_TAGS.replace("'<parameter=' ~ k ~ '>", "'<parameter=' ~ k ~ ' string=\"false\">")
    turned = typed.replace("v | tojson", "(not v) | tojson")
    assert typed != turned != PLAIN_TAGS
    only(loaded(turns("{{- m.content -}}" + typed)), asked(call(a=False)))
    refused(loaded(turns("{{- m.content -}}" + turned)), asked(call(a=False)), tools=[TOOL])


@pytest.mark.parametrize(
    "more", [{"function_call": {"name": "roll", "arguments": "{}"}}, {"refusal": "No."}]
)
def test_what_no_template_renders_is_refused(more: dict[str, Any]) -> None:
    contract = loaded(turns("{{- m.content -}}"))
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a", **more}]
    assert refused(contract, messages).code == "unsupported-content"
