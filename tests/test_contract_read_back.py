"""What a client reads back from a completion is the row: no escape, no word beside a call, no
argument lost, added or made another value; and what a format does rightly is taken."""

from __future__ import annotations

from typing import Any

import pytest

from test_contract_proof import CALL, CALLS, TOOL, asked, call, loaded, only, refused, turns
from tiny_contracts import byte_level, chat, supervised_texts
from truetune import PromptContract, UnfaithfulTemplate
from truetune.contract.encoder import Refused
from truetune.contract.policy import Policy
from truetune.data.conversation import Conversation

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


# What a text, an empty object and arguments that are no object become


@pytest.mark.parametrize(
    "row", [{"q": {}}, {"q": []}, {"q": {}, "r": "x"}, {"r": "x", "q": []}], ids=str
)
def test_an_empty_object_between_tags_is_no_empty_text(row: dict[str, Any]) -> None:
    lost = loaded(turns(tags("(v if v is string else v | tojson) if v else ''")))
    assert refused(lost, asked(call(**row)), tools=[TOOL]).code == "target-dropped"
    assert only(lost, asked(call(q=""))).count("\n\n</parameter>") == 1
    assert only(loaded(turns(PLAIN_TAGS)), asked(call(**row))).count("</parameter>") == len(row)


TYPED = (
    "{%- for c in m.tool_calls or [] -%}{{- '<invoke name=\"' ~ c.function.name ~ '\">\\n' -}}"
    "{%- for k, v in c.function.arguments.items() -%}{{- '<parameter name=\"' ~ k ~ '\" "
    "string=\"' ~ ('true' if v is string else 'false') ~ '\">' ~ (VALUE) ~ '</parameter>\\n' -}}"
    "{%- endfor -%}{{- '</invoke>' -}}{%- endfor -%}"
)


def test_a_tag_that_says_text_holds_it_without_quotes() -> None:
    in_quotes = loaded(turns(TYPED.replace("VALUE", "v | tojson")))
    assert refused(in_quotes, asked(call(q="cats")), tools=[TOOL]).code == "target-dropped"
    raw = loaded(turns(TYPED.replace("VALUE", "v if v is string else v | tojson")))
    for row in ({"q": "cats"}, {"q": '"cats"'}, {"q": 5, "r": "x y"}, {"q": [1], "r": True}):
        assert only(raw, asked(call(**row)))


@pytest.mark.parametrize(
    "row",
    [
        {"m": [True, False, None]},
        {"m": [True, False, None], "s": {"a": True}},
        {"s": "\n", "r": " x "},
        {"a": "b", "n": 3, "m": [1, 2.5, {"z": "w w"}], "b": False, "e": {}},
    ],
    ids=str,
)
def test_arguments_as_json_text_inside_json_are_taken(row: dict[str, Any]) -> None:
    contract = loaded(turns(json_call("(c.function.arguments | tojson | tojson)")))
    assert only(contract, asked(call(**row)))
    words = "({'note': 'I like such words'} | tojson | tojson)"
    assert refused(loaded(turns(json_call(words))), asked(call(**row)), tools=[TOOL])


def test_arguments_that_are_text_stand_as_they_are_or_nowhere() -> None:
    def text_call(text: str) -> list[dict[str, Any]]:
        return asked({"type": "function", "function": {"name": "python", "arguments": text}})

    in_json = loaded(turns(json_call("(c.function.arguments | tojson)")))
    for text in ("not json", "[1]", "print(1)"):
        assert "between quotes" in str(refused(in_json, text_call(text), tools=[TOOL]))
    assert '"sides": 6' in only(in_json, text_call('{"sides": 6}'))
    raw = (
        "{%- for c in m.tool_calls or [] -%}{{- '<tool_call>' ~ c.function.name ~ '\\n' ~ "
        "(c.function.arguments if c.function.arguments is string else c.function.arguments | "
        "tojson) ~ '\\n</tool_call>' -}}{%- endfor -%}"
    )
    for text in ("print(1)", "import os\nprint('a')\n"):
        assert f"python\n{text}\n</tool_call>" in only(loaded(turns(raw)), text_call(text))


def test_a_message_says_something_and_a_call_has_a_name() -> None:
    contract = loaded(turns("{{- m.content -}}" + CALLS))
    silent = refused(contract, [{"role": "user", "content": "Hi"}, {"role": "assistant"}])
    assert "no content" in str(silent)
    assert "no function name" in str(refused(contract, asked(call(""))))
    bare = asked({"type": "function", "function": {"name": "roll"}})
    del bare[-1]["content"]
    assert '"arguments": {}' in only(contract, bare)


# As Command R7B has it: reasoning stands in front of calls alone, and the prompt closes the think
# block where it is not switched on.
PLANS = (
    "{%- for m in messages -%}{%- if m.role == 'assistant' -%}{{- '<|assistant|>' -}}"
    "{%- if m.tool_calls -%}{{- '<think>' ~ m.reasoning_content ~ '</think>' -}}"
    + CALLS
    + "{%- else -%}{{- '<answer>' ~ m.content ~ '</answer>' -}}{%- endif -%}{{- '<|end|>' -}}"
    "{%- else -%}{{- '<|' ~ m.role ~ '|>' ~ m.content ~ '<|end|>' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}"
    "{%- if not enable_thinking -%}{{- '<think></think>' -}}{%- endif -%}{%- endif -%}"
)


def test_reasoning_that_stands_in_front_of_calls_alone() -> None:
    switched = loaded(PLANS, template_kwargs={"enable_thinking": True})
    planned = asked(call(sides=6), reasoning_content="A plan.")
    assert only(switched, planned).startswith("<think>A plan.</think><tool_call>")
    said = chat("Hi", "Hello.")
    said[-1]["reasoning_content"] = "A plan."
    # Inside of what holds the answer no server looks for reasoning.
    assert "drops the reasoning" in str(refused(switched, said))
    # What stands against a row once the prompt leaves its block open is what has to be mended.
    both = asked(call(sides=6), reasoning_content="A plan.", content="I look.")
    rows = [planned, both, [{"role": "user", "content": "Hi"}, *said]]
    one, two, three = loaded(PLANS).encode_all(
        [Conversation(tuple(row), "rows:1", (TOOL,)) for row in rows]
    )
    assert isinstance(one, Refused)
    assert "--template-arg enable_thinking=true" in str(one.error)
    assert isinstance(two, Refused)
    assert isinstance(three, Refused)
    assert "drops the content of message 1" in str(two.error)
    assert "drops the reasoning of message 2" in str(three.error)
    assert "with --template-arg enable_thinking=true" in str(two.error) + str(three.error)


# What a parser of the format reads otherwise, and what it reads

HELD = "{{- m.content -}}"
GLM = (
    "{%- for c in m.tool_calls or [] -%}{{- '<tool_call>' ~ c.function.name ~ '\\n' -}}"
    "{%- for k, v in c.function.arguments.items() -%}{{- '<arg_key>' ~ (KEY) ~ '</arg_key>\\n"
    "<arg_value>' ~ (VALUE) ~ '</arg_value>\\n' -}}{%- endfor -%}"
    "{{- '</tool_call>' -}}{%- endfor -%}"
)
CDATA = (
    "{%- for c in m.tool_calls or [] -%}{{- '<call name=\"' ~ c.function.name ~ '\">' -}}"
    "{%- for k, v in c.function.arguments.items() -%}{{- '<arg name=\"' ~ k ~ '\"><![CDATA[' ~ "
    "(VALUE) ~ ']]></arg>' -}}{%- endfor -%}{{- '</call>' -}}{%- endfor -%}"
)
LISTED = (
    "{%- if m.tool_calls -%}{{- '[TOOL_CALLS] [' -}}{%- for c in m.tool_calls -%}"
    '{{- \'{"name": "\' ~ c.function.name ~ \'", "arguments": \' ~ '
    "(c.function.arguments | tojson) ~ '}' -}}"
    "{%- if not loop.last -%}{{- SEPARATOR -}}{%- endif -%}"
    "{%- endfor -%}{{- END -}}{%- endif -%}"
)
PYTHON = (
    "{%- for c in m.tool_calls or [] -%}{{- '<calls>[' ~ c.function.name ~ '(' -}}"
    "{%- for k, v in c.function.arguments.items() -%}{{- k ~ '=' ~ (VALUE) -}}"
    "{%- if not loop.last -%}{{- ', ' -}}{%- endif -%}{%- endfor -%}"
    "{{- ')]</calls>' -}}{%- endfor -%}"
)
MARKED = (
    "{%- for c in m.tool_calls or [] -%}{{- '[TOOL_CALLS]' ~ c.function.name ~ '[ARGS]' "
    "~ (c.function.arguments | tojson) -}}{%- endfor -%}"
)
TEXT = "(v if v is string else v | tojson)"
OSLO = {"city": "Oslo", "days": 3}


def with_value(template: str, value: str = TEXT, key: str = "k") -> str:
    return template.replace("VALUE", value).replace("KEY", key)


WRITTEN = {
    "a tag says text of a number": (
        with_value(TYPED).replace("('true' if v is string else 'false')", "'true'"), OSLO
    ),
    "a tag says no text of a text": (
        with_value(TYPED).replace("('true' if v is string else 'false')", "'false'"), OSLO
    ),
    "false becomes null among others": (
        with_value(TYPED, "'null' if v is false else " + TEXT),
        {"t": True, "f": False, "n": None, "z": 0, "s": "text"},
    ),
    "an argument is added with a typed tag": (
        with_value(TYPED).replace(
            "{{- '</invoke>' -}}",
            "{{- '<parameter name=\"unit\" string=\"true\">C</parameter>\\n</invoke>' -}}",
        ),
        OSLO,
    ),
    "a space behind a value": (with_value(GLM, "v ~ ' '"), {"city": "Oslo"}),
    "a line around a typed value": (with_value(TYPED, "'\\n' ~ v ~ '\\n'"), {"city": "Oslo"}),
    "a comma in a section": (with_value(CDATA, "v ~ ','"), {"city": "Oslo"}),
    "brackets in a section": (with_value(CDATA, "'[' ~ v ~ ']'"), {"city": "Oslo"}),
    "a sign behind a number in a section": (with_value(CDATA, "v ~ ';'"), {"n": 3}),
    "an object in a list in a section": (with_value(CDATA, "[v] | tojson"), {"o": {"b": 2}}),
    "a list as text in a section": (with_value(CDATA, "v | tojson | tojson"), {"l": ["a"]}),
    "a colon behind a key": (with_value(GLM, key="k ~ ':'"), OSLO),
    "a space behind a key": (with_value(GLM, key="k ~ ' '"), OSLO),
    "a key in quotes": (with_value(GLM, key="k | tojson"), OSLO),
    "a name with a prefix in its tag": (
        PLAIN_TAGS.replace("<function='", "<function=functions.'"), OSLO
    ),
    "a name with brackets in its tag": (
        PLAIN_TAGS.replace("~ '>\\n' -}}{%- for k", "~ '()>\\n' -}}{%- for k"), OSLO
    ),
    "a list with null": (LISTED.replace("SEPARATOR", "', '").replace("END", "', null]'"), OSLO),
    "a list with a comma at its end": (
        LISTED.replace("SEPARATOR", "', '").replace("END", "', ]'"), OSLO
    ),
    "a list that stays open": (LISTED.replace("SEPARATOR", "', '").replace("END", "''"), OSLO),
    "a bracket too many": (json_call("c.function.arguments | tojson ~ '}'"), OSLO),
    "arguments in arguments": (json_call("{'arguments': c.function.arguments} | tojson"), OSLO),
    "the name as an argument": (
        json_call("dict(c.function.arguments, name=c.function.name) | tojson"), OSLO
    ),
    "the name twice": (
        json_call("c.function.arguments | tojson").replace(
            '\'{"name": "\'', '\'{"name": "x", "name": "\''
        ).replace("<tool_call>{", "<tool_call>{\"name\": \"x\", ") , OSLO
    ),
    "a call for each argument": (
        "{%- for c in m.tool_calls or [] -%}{%- for k, v in c.function.arguments.items() -%}"
        "{{- '<tool_call><function=' ~ c.function.name ~ '><parameter=' ~ k ~ '>' ~ v ~ "
        "'</parameter></function></tool_call>' -}}{%- endfor -%}{%- endfor -%}", OSLO
    ),
    "a text that is empty": (with_value(GLM, "'0' if v is string else v"), {"s": ""}),
    "no arguments as null": (json_call("(c.function.arguments or none) | tojson"), {}),
    "no arguments as a list": (json_call("c.function.arguments | list | tojson"), {}),
    "json's false in python": (with_value(PYTHON, "v | tojson"), {"on": False}),
    "a key that ends its tag": (PLAIN_TAGS, {"a>b": "q"}),
    "a key that ends its attribute": (with_value(TYPED), {'a"b': "q"}),
    "a key that is no keyword": (with_value(PYTHON, "v | tojson"), {"two words": "w"}),
    "a text without a key in python": (
        with_value(PYTHON, "v | tojson").replace("~ '('", "~ '(None, '"), OSLO
    ),
    "a space behind a name between markers": (MARKED.replace("'[ARGS]'", "' [ARGS]'"), OSLO),
    "a number in front of a name between markers": (
        MARKED.replace("'[TOOL_CALLS]'", "'[TOOL_CALLS]#1 '"), OSLO
    ),
    "JSON with escaped single quotes": (
        MARKED.replace("~ (c.function.arguments | tojson)",
                       "~ (c.function.arguments | string | tojson | replace('\"', \"'\"))"), OSLO
    ),
    "a name without quotes in JSON": (
        json_call("c.function.arguments | tojson").replace("\"name\": \"'", "\"name\": '")
        .replace("'\", \"arguments", "', \"arguments"), OSLO
    ),
    "a tag that is closed by another": (
        json_call("c.function.arguments | tojson").replace("<tool_call>", "<toolcall>"), OSLO
    ),
    "a call that is closed and not opened": (
        json_call("c.function.arguments | tojson").replace("<tool_call>", ""), OSLO
    ),
    "a function that is not closed": (PLAIN_TAGS.replace("</function>\\n", ""), OSLO),
    "a value that is not closed": (with_value(GLM).replace("</arg_value>", ""), OSLO),
    "texts as JSON beside Python's True": (
        tags("v | tojson if v is string else v"), {"city": "Oslo", "on": True}
    ),
    "true as a text in a typed tag": (
        with_value(TYPED).replace("('true' if v is string else 'false')",
                                  "('true' if v is string or v is boolean else 'false')"),
        {"city": "Oslo", "on": True},
    ),
    "a call between single quotes": (
        "{%- for c in m.tool_calls or [] -%}{{- \"{'name': '\" ~ c.function.name ~ "
        "\"', 'arguments': \" ~ (c.function.arguments | tojson) ~ '}' -}}{%- endfor -%}", OSLO
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRITTEN)
def test_what_a_parser_reads_otherwise_is_refused(case: str) -> None:
    template, row = WRITTEN[case]
    contract = loaded(turns(HELD + template))
    assert refused(contract, asked(call(**row)), tools=[TOOL]).code.startswith("target-")


def test_what_a_parser_reads_as_the_row_is_taken() -> None:
    rows: list[dict[str, Any]] = [
        OSLO,
        {},
        {"t": True, "f": False, "n": None, "z": 0, "y": 0.0, "s": "text", "e": ""},
        {"o": {"b": 2, "f": [False, {"x": None}]}, "l": ["a", 1, {}], "m": []},
        {"many": [True, False] * 20, "s": " x "},
    ]
    lists = LISTED.replace("SEPARATOR", "', '").replace("END", "']'")
    for template in (with_value(TYPED), with_value(GLM), with_value(CDATA), PLAIN_TAGS, lists):
        contract = loaded(turns(HELD + template))
        for row in rows:
            assert only(contract, asked(call(**row), call(**row)))
    python = loaded(turns(HELD + with_value(PYTHON, "v | tojson if v is string else v")))
    for row in ({"city": "Oslo"}, {"on": False, "n": None, "z": 0, "o": {"b": [True]}}):
        assert only(python, asked(call(**row)))


def test_a_word_behind_reasoning_is_no_channel() -> None:
    thinks = "{%- if m.reasoning_content -%}{{- '<think>' ~ m.reasoning_content ~ '</think>\\n' -}}"
    said = chat("Hi", "Hello.")
    said[-1]["reasoning_content"] = "A plan."
    named = loaded(turns(thinks + "{{- 'final\\n' -}}{%- endif -%}{{- m.content -}}"))
    assert refused(named, said).code == "target-invented"
    plain = loaded(turns(thinks + "{%- endif -%}{{- m.content -}}"))
    assert only(plain, said) == "<think>A plan.</think>\nHello.<|end|>"


@pytest.mark.parametrize(
    "block",
    [
        "'<think>\\n' ~ R ~ '\\n\\n' ~ C",
        "'<think>\\n' ~ R ~ '\\n</thinking>\\n' ~ C",
        "'<think>\\n' ~ R ~ C ~ '\\n</think>\\n'",
        "'<think>\\n' ~ R ~ '\\n<think>\\n' ~ C",
        "'</think>\\n' ~ R ~ '\\n<think>\\n' ~ C",
        "'<think>\\n' ~ R ~ '\\n</think>\\n' ~ C ~ '</think>'",
    ],
)
@pytest.mark.parametrize("calls", [False, True])
def test_reasoning_stands_between_its_markers(block: str, calls: bool) -> None:
    called = (
        '(\'<tool_call>{"name": "\' ~ m.tool_calls[0].function.name ~ \'", "arguments": \' '
        "~ (m.tool_calls[0].function.arguments | tojson) ~ '}</tool_call>')"
    )
    written = block.replace("R", "m.reasoning_content").replace(
        "C", called if calls else "m.content"
    )
    shown = "{%- if m.reasoning_content -%}{{- " + written + " -}}{%- else -%}"
    # The markers are known of the tokenizer, as of most models that think.
    tokenizer = byte_level()
    tokenizer.add_tokens(["<think>", "</think>"])
    template = turns(shown + "{{- m.content -}}{%- endif -%}")
    row = asked(call(sides=6)) if calls else chat("Hi", "Hello.")
    row[-1]["reasoning_content"] = "A plan."
    contract = PromptContract.load(tokenizer, template)
    if calls:
        assert refused(contract, row, tools=[TOOL]).code.startswith("target-")
        return
    try:
        encoded = contract.encode(row)
    except UnfaithfulTemplate as error:
        assert error.code.startswith("target-")  # noqa: PT017
        return
    # Where the field of reasoning does not serve, the block may stand in the content.
    assert encoded.route == "markers in content"
    assert supervised_texts(contract, encoded)[-1].count("</think>") == 1


THINKS = (
    "{%- if m.reasoning_content -%}{{- '<think>' ~ m.reasoning_content ~ '</think>\\n' -}}"
    "{%- endif -%}"
)


@pytest.mark.parametrize("sign", ["[NOTE] ", "<none>"])
def test_a_tag_that_nothing_closes_is_no_format(sign: str) -> None:
    contract = loaded(turns(THINKS + "{{- '" + sign + "' ~ m.content -}}" + CALLS))
    said = chat("Hi", "Hello.")
    said[-1]["reasoning_content"] = "A plan."
    for row in (said, asked(call(sides=6)), asked(call(sides=6), content="Look.")):
        found = refused(contract, row, tools=[TOOL])
        assert found.code == "target-invented"
        assert sign.strip() in found.what


def test_a_call_is_closed_where_the_tokenizer_has_the_token_for_it() -> None:
    template = turns("{{- m.content -}}" + CALLS.replace("</tool_call>", ""))
    tokenizer = byte_level()
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    open_still = PromptContract.load(tokenizer, template)
    assert refused(open_still, asked(call(sides=6)), tools=[TOOL]).code == "target-invented"
    closed = PromptContract.load(tokenizer, turns("{{- m.content -}}" + CALLS))
    assert only(closed, asked(call(sides=6), call(sides=8)))
    # Nor is one closed that nothing opened, or that was opened under another name.
    for opening in ("", "<toolcall>"):
        template = turns("{{- m.content -}}" + CALLS.replace("<tool_call>", opening))
        unopened = PromptContract.load(tokenizer, template)
        assert refused(unopened, asked(call(sides=6)), tools=[TOOL]).code == "target-invented"


def test_tags_and_whitespace_around_a_text_are_remarked() -> None:
    held = loaded(turns(THINKS + "{{- '<b>' ~ m.content ~ '</b>' if m.content -}}" + CALLS))
    said = chat("Hi", "Hello.")
    said[-1]["reasoning_content"] = "A plan."
    for row in (said, asked(call(sides=6), content="Look.")):
        assert held.encode(row, [TOOL]).remarks == ("framed",)
    assert "framed" not in held.encode(asked(call(sides=6)), [TOOL]).remarks
    for around in ("'  ' ~ m.content", "m.content ~ '\\n'"):
        padded = loaded(turns("{{- " + around + " -}}"))
        assert padded.encode(chat("Hi", "Hello.")).remarks == ("respaced",)
    # Formats of many models have one space there.
    assert loaded(turns("{{- ' ' ~ m.content -}}")).encode(chat("Hi", "Hello.")).remarks == ()


def test_behind_reasoning_a_call_may_hold_its_marker() -> None:
    contract = loaded(turns(THINKS + "{{- m.content -}}" + CALLS))
    row = asked(call(text="a</think>b"), reasoning_content="A plan.")
    assert '"a</think>b"' in only(contract, row)
    row[-1]["reasoning_content"] = "A </think> plan."
    assert refused(contract, row, tools=[TOOL]).code == "target-dropped"


def test_arguments_that_are_text_inside_json_are_remarked() -> None:
    twice = loaded(turns(HELD + json_call("c.function.arguments | tojson | tojson")))
    assert twice.encode(asked(call(**OSLO)), [TOOL]).remarks == ("arguments-as-text",)
    once = loaded(turns(HELD + json_call("c.function.arguments | tojson")))
    assert once.encode(asked(call(**OSLO)), [TOOL]).remarks == ()


REACT = (
    "{%- for c in m.tool_calls or [] -%}{{- '\\nAction: ' ~ c.function.name ~ '\\nAction Input: ' "
    "~ (c.function.arguments | tojson) -}}{%- endfor -%}"
)
FENCED = (
    "{%- for c in m.tool_calls or [] -%}{{- '\\n```json\\n' -}}{{- '{\"name\": \"' ~ "
    "c.function.name ~ '\", \"arguments\": ' ~ (c.function.arguments | tojson) ~ '}\\n```' -}}"
    "{%- endfor -%}"
)


def test_formats_of_agents_are_taken_where_the_prompt_announces_them() -> None:
    asking = [{"role": "system", "content": "Write Action: a tool, then Action Input: its JSON."}]
    contract = loaded(turns(HELD + REACT))
    row = asked(call(**OSLO))
    assert only(contract, [*asking, *row]).startswith("\nAction: roll\nAction Input: {")
    assert refused(contract, row, tools=[TOOL]).code == "target-invented"
    fenced = loaded(turns(HELD + FENCED))
    assert "```json" in only(fenced, asked(call(**OSLO), content="Look."))


def test_a_template_without_a_generation_prompt_is_refused_by_that_name() -> None:
    silent = loaded(turns("{{- m.content -}}" + CALLS, prompt=""))
    for row in (chat("Hi", "Hello."), asked(call(sides=6))):
        error = refused(silent, row, tools=[TOOL])
        assert (error.code, "<|assistant|>" in error.what) == ("generation-prompt-missing", True)
    # The advice is the block that is missing.
    block = error.fix.partition(" with ")[2].partition(", or train")[0]
    mended = loaded(turns("{{- m.content -}}" + CALLS, prompt="") + block)
    assert mended.encode(chat("Hi", "Hello.")).remarks == ()
    kept = loaded(
        turns("{{- m.content -}}", prompt=""), policy=Policy(template_words="keep")
    ).encode(chat("Hi", "Hello."))
    assert kept.remarks == ("framed",)
    # It may be missing where there are tools alone.
    template = turns("{{- m.content -}}" + CALLS).replace(
        "if add_generation_prompt", "if add_generation_prompt and not tools"
    )
    contract = loaded(template)
    assert contract.encode(chat("Hi", "Hello."))
    assert refused(contract, asked(call(sides=6)), tools=[TOOL]).code == "generation-prompt-missing"
    # Where a question ends otherwise than an answer, that end is the prompt.
    instructed = (
        "{%- for m in messages -%}{{- '[INST] ' ~ m.content ~ ' [/INST]' if m.role == 'user' else "
        "' ' ~ m.content ~ '<|end|>' -}}{%- endfor -%}"
    )
    assert loaded(instructed).encode(chat("Hi", "Hello."))


def test_what_holds_the_text_of_every_turn_is_not_its_end() -> None:
    template = (
        "{%- for m in messages -%}{{- '<|' ~ m.role ~ '|>\\n<|plain|>' ~ m.content ~ "
        "'<|/plain|><|end|>\\n' -}}{%- endfor -%}{%- if add_generation_prompt -%}"
        "{{- '<|assistant|>\\n' -}}{%- endif -%}"
    )
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|plain|>", "<|/plain|>"]})
    tokenizer.eos_token = "<|pad|>"
    for source in (template, template.replace("'<|assistant|>\\n'", "'<|assistant|>\\n<|plain|>'")):
        encoded = PromptContract.load(tokenizer, source).encode(chat("Hi", "Hello."))
        (example,) = encoded.examples
        trained = [i for i, on in zip(example.ids, example.mask, strict=True) if on]
        assert tokenizer.decode(trained).endswith("Hello.<|/plain|><|end|>")


def test_a_call_may_say_what_the_question_said() -> None:
    contract = loaded(turns("{{- m.content -}}" + CALLS, prompt="<|assistant|>\n\n"))
    for said in ("roll", "sides", "6", "{", "Go."):
        row = asked(call(sides=6))
        row[0]["content"] = said
        assert "prompt-realigned" in contract.encode(row, [TOOL]).remarks


def test_a_switch_under_which_a_row_is_refused_too_is_no_advice() -> None:
    template = turns("{{- m.content if not m.tool_calls -}}" + CALLS).replace(
        "{{- '<|assistant|>\\n' -}}{%- endif -%}",
        "{{- '<|assistant|>\\n' ~ ('' if plainly else '<think>') -}}{%- endif -%}",
    )
    contract = loaded("{# </think> #}" + template)
    error = refused(contract, asked(call(sides=6), content="Look."), tools=[TOOL])
    assert (error.code, "--template-arg plainly=true" in error.why) == ("target-dropped", True)
    assert "omit the content" in error.fix
    # A row that the switch takes is told of it.
    error = refused(contract, asked(call(sides=6)), tools=[TOOL])
    assert (error.code, "--template-arg plainly=true" in error.fix) == ("thinking-only", True)


def test_markers_of_the_row_are_no_frame_and_stripped_reasoning_is_remarked() -> None:
    contract = loaded(turns("{{- ' ' ~ m.content -}}") + "{# <think></think> #}")
    said = chat("Hi", "<think>\nA plan.\n</think>\n\nHello.")
    assert contract.encode(said).remarks == ()
    stripping = loaded(
        turns(
            THINKS.replace("m.reasoning_content ~", "m.reasoning_content | trim ~")
            + "{{- m.content -}}"
        )
    )
    row = chat("Hi", "Hello.")
    row[-1]["reasoning_content"] = "\nA plan.\n"
    assert "stripped" in stripping.encode(row).remarks
