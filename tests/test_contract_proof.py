"""Every part of a turn is in its completion, once and in its place, and no words beside them."""

from __future__ import annotations

import datetime
import json
import re
from typing import Any

import pytest

import tiny_contracts as tiny
from template_corpus import own_contract, own_tokenizer, sources
from tiny_contracts import byte_level, chat, require_equation, supervised_texts
from truetune import PromptContract, UnfaithfulTemplate
from truetune.contract.behaviour import think_pairs
from truetune.contract.policy import Policy
from truetune.contract.words import words_in

pytestmark = pytest.mark.filterwarnings("error")

TOOL = {"type": "function", "function": {"name": "roll", "parameters": {"type": "object"}}}


def turns(assistant: str, prompt: str = "<|assistant|>\n", start: str = "") -> str:
    """A template whose assistant turns are written by a block of Jinja."""
    generation = prompt.replace("\n", "\\n")
    return (
        start + "{%- for m in messages -%}{%- if m.role == 'assistant' -%}"
        "{{- '<|assistant|>\\n' -}}" + assistant + "{{- '<|end|>\\n' -}}{%- else -%}"
        "{{- '<|' ~ m.role ~ '|>\\n' ~ m.content ~ '<|end|>\\n' -}}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '" + generation + "' -}}{%- endif -%}"
    )


CALL = (
    '{{- \'<tool_call>{"name": "\' ~ c.function.name ~ \'", "arguments": \' '
    "~ (c.function.arguments | tojson) ~ '}</tool_call>' -}}"
)
CALLS = "{%- for c in m.tool_calls or [] -%}" + CALL + "{%- endfor -%}"


def call(name: str = "roll", **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def asked(*calls: dict[str, Any], content: str = "", **more: Any) -> list[dict[str, Any]]:
    turn = {"role": "assistant", "content": content, "tool_calls": list(calls), **more}
    return [{"role": "user", "content": "Roll the dice."}, turn]


def loaded(template: str | None, **arguments: Any) -> PromptContract:
    return PromptContract.load(byte_level(), template, **arguments)


def refused(contract: PromptContract, messages: Any, **arguments: Any) -> UnfaithfulTemplate:
    with pytest.raises(UnfaithfulTemplate) as caught:
        contract.encode(messages, **arguments)
    return caught.value


def only(contract: PromptContract, messages: Any) -> str:
    encoded = contract.encode(messages, [TOOL])
    require_equation(contract, messages, encoded, [TOOL])
    return supervised_texts(contract, encoded)[-1]


# ---------------------------------------------------------------- each part, once, in its place


def test_calls_and_content_that_are_written_are_taken() -> None:
    contract = loaded(turns("{{- m.content -}}" + CALLS))
    assert only(contract, asked(call(sides=6), call(sides=6), content="Twice.")) == (
        'Twice.<tool_call>{"name": "roll", "arguments": {"sides": 6}}</tool_call>'
        '<tool_call>{"name": "roll", "arguments": {"sides": 6}}</tool_call><|end|>'
    )
    odd = call(a="a", b=[1, "1", True, None, {"c": ""}], d=0, e=-2.5, f='q"\\\n\u00e9', g={}, h=[])
    assert '"b": [1, "1", true, null, {"c": ""}], "d": 0, "e": -2.5' in only(contract, asked(odd))


@pytest.mark.parametrize(
    ("assistant", "messages", "named"),
    [
        # The second of two equal calls, which the first one covers.
        (
            "{%- for c in (m.tool_calls or [])[:1] -%}" + CALL + "{%- endfor -%}",
            asked(call(sides=6), call(sides=6)),
            "'roll'",
        ),
        # Content that stands in an argument as well.
        (
            "{%- if m.tool_calls -%}" + CALLS + "{%- else -%}{{- m.content -}}{%- endif -%}",
            asked(call("weather", place="Keth"), content="Keth"),
            "the content",
        ),
        # Values that stand in the words of the format.
        (CALLS.replace("| tojson", "| list | tojson"), asked(call(x="a", y=1)), "'a'"),
        (CALLS.replace("| tojson", "| list | tojson"), asked(call(x=True)), "True"),
        # A name that stands in a value.
        (CALLS.replace("c.function.name", "'x'"), asked(call("roll", a="roll")), "'roll'"),
        # Reasoning that stands in the content.
        ("{{- m.content -}}", [*chat("Hi", "yes no")], None),
    ],
)
def test_a_part_that_another_one_covers(assistant: str, messages: Any, named: str | None) -> None:
    contract = loaded(turns(assistant))
    if named is None:
        messages[1]["reasoning_content"] = "yes"
        named = "the reasoning"
    error = refused(contract, messages, tools=[TOOL])
    assert error.code == "target-dropped"
    assert named in error.what


@pytest.mark.parametrize(
    ("assistant", "messages"),
    [
        ("{%- for c in m.tool_calls | reverse -%}" + CALL + "{%- endfor -%}", "calls"),
        ("{{- m.content -}}<think>\n{{- m.reasoning_content or 'x' -}}\n</think>", "reasoning"),
        (
            "{%- for c in m.tool_calls -%}{{- c.function.name ~ '(' -}}"
            "{%- for k in c.function.arguments -%}{{- k ~ ',' -}}{%- endfor -%}"
            "{%- for v in c.function.arguments.values() | list | reverse -%}{{- v ~ ',' -}}"
            "{%- endfor -%}){%- endfor -%}",
            "values",
        ),
    ],
)
def test_parts_in_another_order_are_refused(assistant: str, messages: str) -> None:
    rows = {
        "calls": asked(call(sides=6), call(sides=8)),
        "reasoning": [*chat("Hi"), tiny.chat("", "No.")[1] | {"reasoning_content": "Hm."}],
        "values": asked(call(a="one", b="two")),
    }
    error = refused(loaded(turns(assistant)), rows[messages])
    # This template's marker behind an answer ends it: the reasoning stands behind the stop.
    assert error.code == ("target-behind-stop" if messages == "reasoning" else "target-dropped")


def test_sorted_arguments_are_the_same_call_and_told() -> None:
    contract = loaded(
        turns(
            "{%- for c in m.tool_calls -%}{{- '<call>' ~ c.function.name -}}"
            "{%- for k, v in c.function.arguments | dictsort -%}{{- '<' ~ k ~ '>' ~ v -}}"
            "{%- endfor -%}{%- endfor -%}"
        )
    )
    encoded = contract.encode(asked(call(b="x", a="y")))
    assert supervised_texts(contract, encoded) == ["<call>roll<a>y<b>x<|end|>"]
    assert encoded.remarks == ("reordered",)
    assert contract.encode(asked(call(a="y", b="x"))).remarks == ()


def test_numbers_and_switches_that_become_text_are_refused() -> None:
    texts = (
        "{%- for c in m.tool_calls -%}{{- '<tool_call>{\"name\": \"' ~ c.function.name ~ '\"' -}}"
        "{%- for k, v in c.function.arguments.items() -%}{{- ', \"' ~ k ~ '\": \"' ~ v ~ '\"' -}}"
        "{%- endfor -%}}</tool_call>{%- endfor -%}"
    )
    for value in (6, 2.5, True):
        error = refused(loaded(turns(texts)), asked(call(sides=value)), tools=[TOOL])
        assert error.code == "target-dropped"
        assert "as text" in error.what
    assert '"sides": "6"' in only(loaded(turns(texts)), asked(call(sides="6")))
    # A tag's attribute has quotes whatever is in it.
    tags = (
        "{%- for c in m.tool_calls -%}{{- '<call name=\"' ~ c.function.name ~ '\">' -}}"
        "{%- for k, v in c.function.arguments.items() -%}"
        "{{- '<arg key=\"' ~ k ~ '\" value=\"' ~ v ~ '\"/>' -}}"
        "{%- endfor -%}</call>{%- endfor -%}"
    )
    assert 'value="6"' in only(loaded(turns(tags)), asked(call(sides=6)))


@pytest.mark.parametrize("value", ["-{{ v|tojson }}", "{{ v|tojson }}0", "{{ v|tojson }}.0"])
def test_a_number_that_becomes_another_one_is_refused(value: str) -> None:
    written = (
        "{{ m.content }}{% for c in m.tool_calls %}<call><name>{{ c.function.name }}</name>"
        "{% for k, v in c.function.arguments.items() %}<par><key>{{ k }}</key><val>VALUE</val>"
        "</par>{% endfor %}</call>{% endfor %}"
    )
    rows = asked(call(sides=5))
    assert "<val>5</val>" in only(loaded(turns(written.replace("VALUE", "{{ v|tojson }}"))), rows)
    error = refused(loaded(turns(written.replace("VALUE", value))), rows)
    assert error.code == "target-dropped"
    assert "a different number" in error.what


# Values between tags, and between the quotes of JSON that is written by hand.
IN_TAGS = (
    "{{ m.content }}{% for c in m.tool_calls %}<call><name>{{ c.function.name }}</name>"
    "{% for k, v in c.function.arguments.items() %}<par><key>{{ k }}</key><val>VALUE</val></par>"
    "{% endfor %}</call>{% endfor %}"
)
IN_QUOTES = (
    '{%- for c in m.tool_calls -%}{{- \'<tool_call>{"name": "\' ~ c.function.name ~ \'", '
    '"arguments": {\' -}}{%- for k, v in c.function.arguments.items() -%}'
    "{{- '\"' ~ k ~ '\": \"' ~ VALUE ~ '\"' -}}{%- if not loop.last -%}{{- ', ' -}}{%- endif -%}"
    "{%- endfor -%}{{- '}}</tool_call>' -}}{%- endfor -%}"
)


@pytest.mark.parametrize(
    ("written", "arguments", "code"),
    [
        (IN_TAGS.replace("VALUE", "{{ v or 'NA' }}"), {"city": ""}, "target-invented"),
        (CALLS.replace("arguments |", "arguments or none) | "), {}, "target-invented"),
        (CALLS.replace("arguments |", "arguments or {'city': 'Rome'}) |"), {}, "target-invented"),
        (IN_TAGS.replace("VALUE", "{{ (v or [1]) | tojson }}"), {"d": []}, "target-invented"),
        (IN_TAGS.replace("VALUE", "0{{ v }}"), {"sides": 0}, "target-dropped"),
        (IN_TAGS.replace("VALUE", "-{{ v }}"), {"sides": 0}, "target-dropped"),
        (IN_TAGS.replace("VALUE", "{{ v }}.0"), {"sides": 0}, "target-dropped"),
    ],
)
def test_what_becomes_of_empty_values_and_zero(
    written: str, arguments: dict[str, Any], code: str
) -> None:
    written = written.replace("(c.function.arguments or", "((c.function.arguments or")
    assert refused(loaded(turns(written)), asked(call(**arguments)), tools=[TOOL]).code == code


@pytest.mark.parametrize("name", ["plain", "hybrid_switch", "string_arguments", "next_role_ends"])
def test_empty_values_and_zero_as_templates_write_them(name: str) -> None:
    contract = own_contract(name).fit([asked(call(a="b"))], [TOOL])
    for arguments in (
        {},
        {"a": ""},
        {"a": " "},
        {"a": {}},
        {"a": []},
        {"a": 0},
        {"a": 0.0},
        {"a": {"b": []}},
    ):
        row = asked(call(**arguments, z="z"), call(**arguments))
        encoded = contract.encode(row, [TOOL])
        require_equation(contract, row, encoded, [TOOL])
        if name != "next_role_ends":
            assert json.dumps(arguments) in supervised_texts(contract, encoded)[0]


@pytest.mark.parametrize(
    "value",
    ["{{ v }}!", "{{ v }}.0", "-{{ v }}", "${{ v }}", "{{ v }},", "{{ v }}...", "The {{ v }}"],
)
def test_a_text_that_becomes_another_one_between_tags(value: str) -> None:
    error = refused(loaded(turns(IN_TAGS.replace("VALUE", value))), asked(call(city="Rome")))
    assert error.code in ("target-dropped", "target-invented")


AS_IT_IS = "(v if v is string else v | tojson)"
VALUES: tuple[Any, ...] = (
    *("Rome", 3, True, None, 0, "", " ", [], {}),
    *(["a"], {"a": "b"}, [True, 1], [1, None], [0, 1], [[1], []], [True, None], {"a": [1, ""]}),
)


@pytest.mark.parametrize(
    "value", ["'['~V", "V~']'", "'{'~V", "'['~V~']'", "'('~V~')'", "'='~V", "'/'~V", "V~'{x}'"]
)
def test_a_bracket_or_sign_beside_a_value_between_tags_is_refused(value: str) -> None:
    spoilt = loaded(turns(IN_TAGS.replace("VALUE", f"{{{{ {value.replace('V', AS_IT_IS)} }}}}")))
    whole = loaded(turns(IN_TAGS.replace("VALUE", f"{{{{ {AS_IT_IS} }}}}")))
    for held in VALUES:
        error = refused(spoilt, asked(call(city=held)), tools=[TOOL])
        assert error.code in ("target-dropped", "target-invented")
        text = held if isinstance(held, str) else json.dumps(held)
        assert f"<val>{text}</val>" in only(whole, asked(call(city=held)))


@pytest.mark.parametrize(
    "more",
    [
        "<tool_call></tool_call>",
        "\n<tool_call>\n</tool_call>",
        "<tool_call>\n{}\n</tool_call>",
        "<tool_call>",
        "</tool_call>",
        "<|call|><|/call|>",
        "<|other><other|>",
        "[CALL][/CALL]",
        "{}",
    ],
)
def test_a_marker_without_its_other_side_and_a_pair_around_nothing_are_refused(more: str) -> None:
    added = "{%- if m.tool_calls -%}{{- '" + more.replace("\n", "\\n") + "' -}}{%- endif -%}"
    rows = (
        asked(call(sides=6)),
        asked(call(), content="I roll."),
        asked(call(a="", b=[]), call(c={"d": {}})),
    )
    for written in (CALLS + added, added + CALLS):
        for row in rows:
            contract = loaded(turns("{{- m.content -}}" + written))
            assert refused(contract, row, tools=[TOOL]).code == "target-invented"
    for row in rows:
        assert only(loaded(turns("{{- m.content -}}" + CALLS)), row)


def test_calls_behind_the_stop_of_a_template_that_looks_names_up_are_refused() -> None:
    looked_up = (
        "{%- for c in m.tool_calls or [] -%}{%- if c.function.name in ['roll'] -%}"
        + CALL
        + "{%- endif -%}{%- endfor -%}"
    )
    ends = loaded(turns("{{- m.content ~ ('<|end|>' if m.tool_calls else '') -}}" + looked_up))
    whole = loaded(turns("{{- m.content -}}" + looked_up))
    for arguments in ({}, {"a": True}, {"a": ""}, {"a": 1}, {"a": {"b": []}}):
        for content in ("", "I roll."):
            row = asked(call(**arguments), content=content)
            assert refused(ends, row, tools=[TOOL]).code == "target-behind-stop"
            assert json.dumps(arguments) in only(whole, row)


def test_a_marker_with_its_brackets_turned_outwards_holds_values() -> None:
    turned = "]<]mark[>["
    written = (
        f"{{{{- m.content -}}}}{{%- for c in m.tool_calls or [] -%}}{turned}<call name="
        f'"{{{{ c.function.name }}}}">{{%- for k, v in c.function.arguments.items() -%}}'
        f"{turned}<{{{{ k }}}}>{{{{ {AS_IT_IS} }}}}{turned}</{{{{ k }}}}>{{%- endfor -%}}"
        f"{turned}</call>{{%- endfor -%}}"
    )
    contract = loaded(turns(written))
    for held in VALUES:
        assert f"<a>{held if isinstance(held, str) else json.dumps(held)}]<]" in only(
            contract, asked(call(a=held), content="I roll.")
        )


@pytest.mark.parametrize("said", ["'('~V~')'", "'['~V~']'", "'\"'~V~'\"'", "V~'|'", "'`'~V"])
def test_brackets_and_quotes_around_content_beside_a_call_are_refused(said: str) -> None:
    row = asked(call(a=1), content="Twice.")
    contract = loaded(turns("{{- " + said.replace("V", "m.content") + " -}}" + CALLS))
    assert refused(contract, row, tools=[TOOL]).code == "target-invented"
    marked = turns("{{- m.content -}}[calls]" + CALLS)
    assert "Twice.[calls]<tool_call>" in only(loaded(marked), row)


@pytest.mark.parametrize("sign", ["!", ".0", "-", "...", " ", "\\\\n", " sir"])
def test_a_text_or_name_that_becomes_another_one_between_quotes(sign: str) -> None:
    row = asked(call(city="Rome"))
    for value in (f"v ~ '{sign}'", f"'{sign}' ~ v"):
        error = refused(loaded(turns(IN_QUOTES.replace("VALUE", value))), row, tools=[TOOL])
        assert error.code in ("target-dropped", "target-invented")
    named = CALLS.replace("c.function.name", f"c.function.name ~ '{sign}'")
    assert refused(loaded(turns(named)), row, tools=[TOOL]).code.startswith("target-")


@pytest.mark.parametrize(
    "value",
    [
        "{{ v }}",
        "\n{{ v }}\n",
        "'{{ v }}'",
        "{{ v | tojson }}",
        "<b>{{ v }}</b>",
        "<![CDATA[{{ v }}]]>",
    ],
)
def test_what_may_hold_a_text_between_tags(value: str) -> None:
    contract = loaded(turns(IN_TAGS.replace("VALUE", value)))
    for text in ("Rome", "Rome!", "-5", " Rome ", "a <i> c"):
        assert text in only(contract, asked(call(city=text)))


def test_outer_whitespace_of_a_text_between_quotes_is_the_rows_own() -> None:
    for text in (" Rome", "Rome!\n", "\u00a0Rome\t"):
        assert json.dumps(text) in only(loaded(turns(CALLS)), asked(call(city=text))).replace(
            "\u00a0", "\\u00a0"
        )


@pytest.mark.parametrize(
    "pairs", ["arguments.items() | list", "arguments | dictsort", "arguments | dictsort | list"]
)
def test_arguments_as_a_list_of_pairs_are_refused(pairs: str) -> None:
    contract = loaded(turns(CALLS.replace("arguments", pairs, 2).replace(pairs, "arguments", 1)))
    for arguments in ({"b": "x", "a": 1}, {"a": "x"}, {"a": True}, {}):
        error = refused(contract, asked(call(**arguments)), tools=[TOOL])
        assert error.code == "target-dropped"
        assert "as pairs" in error.what
    pair = only(loaded(turns(CALLS)), asked(call(pairs=[["b", "x"], ["a", 1]])))
    assert '[["b", "x"], ["a", 1]]' in pair


BY_HAND = IN_QUOTES.replace("'\": \"' ~ VALUE ~ '\"'", "'\": ' ~ VALUE")


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("v", "Rome"),
        ("v", True),
        ("v", None),
        ("v", ["a", "b"]),
        ("v", {"a": "b"}),
        ("(v | tojson)[1:]", "Rome"),
    ],
)
def test_a_call_that_is_no_json_is_refused(written: str, value: Any) -> None:
    row = asked(call(city=value))
    error = refused(loaded(turns(BY_HAND.replace("VALUE", written))), row, tools=[TOOL])
    assert error.code == "target-dropped"
    assert json.dumps(value) in only(loaded(turns(BY_HAND.replace("VALUE", "v | tojson"))), row)


def test_a_call_without_its_last_bracket_is_refused() -> None:
    error = refused(
        loaded(turns(CALLS.replace("}</tool", "</tool"))), asked(call(a="b")), tools=[TOOL]
    )
    assert "cannot be read" in error.what


@pytest.mark.parametrize(
    ("written", "more"),
    [
        (CALLS, '<tool_call>{"name": "log", "arguments": {}}</tool_call>'),
        (IN_TAGS.replace("VALUE", "{{ v }}"), "<call><name>log</name></call>"),
        (CALLS.replace("<tool_call>", "<tool_call><tool_call>"), ""),
    ],
)
def test_a_call_or_a_marker_that_the_template_adds_is_refused(written: str, more: str) -> None:
    for messages in (asked(call(a="b")), asked(call(a="b"), call())):
        assert refused(loaded(turns(written + more)), messages).code == "target-invented"
    whole = loaded(turns(written.replace("<tool_call><tool_call>", "<tool_call>")))
    assert only(whole, asked(call(a="b"), call(a="b"))).count("roll") == 2


def test_values_that_are_cut_where_servers_give_objects_are_refused() -> None:
    either = (
        "{%- for c in m.tool_calls or [] -%}{{- '<call>' ~ c.function.name -}}"
        "{%- if c.function.arguments is string -%}{{- c.function.arguments -}}{%- else -%}"
        "{{- '{' -}}{%- for k, v in c.function.arguments.items() -%}"
        "{{- '\"' ~ k ~ '\": \"' ~ VALUE ~ '\"' -}}{%- endfor -%}{{- '}' -}}{%- endif -%}"
        "</call>{%- endfor -%}"
    )
    row = asked(call(place="Keth"))
    assert '<call>roll{"place": "Keth"}' in only(loaded(turns(either.replace("VALUE", "v"))), row)
    error = refused(loaded(turns(either.replace("VALUE", "(v | string)[:3]"))), row, tools=[TOOL])
    assert error.code == "target-dropped"


def test_content_behind_the_calls_is_refused() -> None:
    row = asked(call(sides=6), content="I roll.")
    error = refused(loaded(turns(CALLS + "{{- m.content -}}")), row, tools=[TOOL])
    assert error.code == "target-dropped"
    assert "after its tool calls" in error.what
    assert "I roll.<tool_call>" in only(loaded(turns("{{- m.content -}}" + CALLS)), row)


THOUGHT = (
    "{%- if m.reasoning_content -%}{{- '<think>\\n' ~ m.reasoning_content ~ '\\n</think>\\n\\n' -}}"
    "{%- endif -%}{{- m.content -}}" + CALLS
)


@pytest.mark.parametrize(
    "turn",
    [
        {"reasoning_content": "Hm. </think> ha", "content": "Yes"},
        {"reasoning_content": "Hm.", "content": "Yes <think>so</think> no"},
        {"content": "Yes </think> no"},
        {"content": "Yes <think>so</think> no"},
        {"content": "<think>so</think> no <think>"},
        {"content": "<think>without an end"},
        {"content": "", "tool_calls": [call(a="x</think>y")]},
        {"content": "", "tool_calls": [call(a="x</tool_call>y")]},
        {"content": "A <tool_call> now", "tool_calls": [call(a="x")]},
    ],
)
def test_a_marker_inside_a_part_is_refused(turn: dict[str, Any]) -> None:
    row = [*chat("Hi"), {"role": "assistant", **turn}]
    error = refused(loaded(turns(THOUGHT)), row, tools=[TOOL])
    assert error.code == "target-dropped"
    assert "marker" in error.what


def test_markers_of_no_format_and_the_rows_own_block_are_text() -> None:
    plain = loaded(turns("{{- m.content -}}" + CALLS))
    for content in ("Yes </think> no", "Yes <think>so</think> no", "a <b> c"):
        assert content in only(plain, chat("Hi", content))
    assert "<think>so</think> no" in only(
        loaded(turns(THOUGHT)), chat("Hi", "<think>so</think> no")
    )
    behind = {"role": "assistant", "reasoning_content": "Hm.", "content": "Yes </think> no"}
    assert "Yes </think> no" in only(loaded(turns(THOUGHT)), [*chat("Hi"), behind])
    opened = loaded(tiny.OPENS_THINKING)
    assert only(opened, chat("Hi", "so\n</think>\n\nno")) == "so\n</think>\n\nno<|end|>"
    assert "x<tool>y" in only(loaded(turns(THOUGHT)), asked(call(a="x<tool>y")))


def test_other_whitespace_around_a_block_is_told() -> None:
    own = own_contract("hybrid_switch")
    for content in ("<think>Hm.</think>Yes.", "<think>\nHm.\n</think>\n\n\n\n  Yes."):
        assert "respaced" in own.encode(chat("Hi", content)).remarks
    assert "respaced" not in own.encode(chat("Hi", "<think>\nHm.\n</think>\n\nYes.")).remarks


@pytest.mark.parametrize(
    "arguments",
    [
        "{{- dict(c.function.arguments, units='metric') | tojson -}}",
        "{{- {'in': dict(c.function.arguments, units='metric') | tojson} | tojson -}}",
        "{%- for k, v in dict(c.function.arguments, units='metric').items() -%}"
        "{{- '<key>' ~ k ~ '</key><value>' ~ v ~ '</value>' -}}{%- endfor -%}",
        "{%- for k, v in dict(c.function.arguments, units='metric').items() -%}"
        "{{- '<parameter=' ~ k ~ '>' ~ v ~ '</parameter>' -}}{%- endfor -%}",
        "({%- for k, v in dict(c.function.arguments, units='metric').items() -%}"
        "{{- k ~ '=' ~ v | tojson ~ ', ' -}}{%- endfor -%})",
    ],
)
def test_an_argument_that_the_template_adds_is_refused(arguments: str) -> None:
    each = "{%- for c in m.tool_calls -%}{{- '<call>' ~ c.function.name -}}"
    made = each + arguments + "{{- '</call>' -}}{%- endfor -%}"
    error = refused(loaded(turns(made)), asked(call(place="Keth", days=3)), tools=[TOOL])
    assert error.code == "target-invented"
    assert "units" in error.what
    plain = made.replace("dict(c.function.arguments, units='metric')", "c.function.arguments")
    assert "Keth" in only(loaded(turns(plain)), asked(call(place="Keth", days=3)))


def test_words_behind_reasoning_are_no_part_of_its_marker() -> None:
    made = (
        "{%- if m.thinking -%}{{- '<|chan|>analysis<|msg|>' ~ m.thinking ~ 'WORDS<|chan|>' -}}"
        "{%- endif -%}{{- 'final<|msg|>' ~ m.content -}}"
    )
    row = [*chat("Hi"), tiny.chat("", "No.")[1] | {"reasoning_content": "Hm."}]
    error = refused(loaded(turns(made.replace("WORDS", "\\nNow I answer."))), row)
    assert error.code == "target-invented"
    assert "Hm.<|chan|>final<|msg|>No." in only(loaded(turns(made.replace("WORDS", ""))), row)


def test_a_part_written_twice_is_refused() -> None:
    contract = loaded(turns("{{- m.content ~ m.content -}}" + CALLS))
    assert refused(contract, asked(call(sides=6), content="Yes.")).code == "target-invented"


def test_a_name_that_the_template_looks_up() -> None:
    builtin = turns(
        "{%- for c in m.tool_calls -%}{%- if c.function.name == 'roll' -%}"
        "{{- '<|tag|>roll(sides=' ~ c.function.arguments.sides ~ ')' -}}{%- else -%}"
        + CALL
        + "{%- endif -%}{%- endfor -%}"
    )
    contract = loaded(builtin)
    assert only(contract, asked(call(sides="six"))) == "<|tag|>roll(sides=six)<|end|>"
    assert refused(contract, asked(call(sides="six", colour="red"))).code == "target-dropped"


def test_content_in_the_place_of_reasoning_is_refused() -> None:
    moved = turns(
        "{%- if m.reasoning_content -%}{{- '<think>' ~ m.reasoning_content ~ '</think>' -}}"
        "{%- endif -%}{%- if m.tool_calls and m.content -%}{{- '<think>' ~ m.content ~ '</think>' "
        "-}}{%- else -%}{{- m.content -}}{%- endif -%}" + CALLS
    )
    error = refused(loaded(moved), asked(call(sides=6), content="Let me see."))
    assert error.code == "target-dropped"
    assert "as reasoning" in error.what
    assert "Let me see." in only(
        loaded(moved), asked(call(sides=6), reasoning_content="Let me see.")
    )


# ---------------------------------------------------------------- words of the template

# What is trained beside an answer like a word: signs, and words that look like a format.
SIGNS = (
    *("- ", "...", "!", "\U0001f600", "* ", "> "),
    *("<have a nice day>", "[GOODBYE]", "<bye>", "<|bye|>", "[BYE NOW]"),
)


@pytest.mark.parametrize(
    ("assistant", "messages"),
    [
        ("{{- m.content ~ ' Is there anything else?</s>' -}}", chat("Hi", "Yes.")),
        ("{{- 'Sure! ' ~ m.content -}}", chat("Hi", "Yes.")),
        ("{{- 'sure\n' ~ m.content -}}", chat("Hi", "Yes.")),
        *((f"{{{{- '{sign}' ~ m.content -}}}}", chat("Hi", "Yes.")) for sign in SIGNS),
        *((f"{{{{- m.content ~ '{sign}' -}}}}", chat("Hi", "Yes.")) for sign in SIGNS),
        *(
            (f"{{{{- m.content ~ '{sign}' -}}}}" + CALLS, asked(call(sides=6), content="Yes."))
            for sign in SIGNS[:4]
        ),
        ("{{- m.content -}}I will now call a tool." + CALLS, asked(call(sides=6))),
        ("{{- m.content -}}" + CALLS + " Done.", asked(call(sides=6))),
        (
            "{{- '<think>' ~ m.reasoning_content ~ '</think>So, my answer: ' ~ m.content -}}",
            [chat("Hi")[0], chat("", "Yes.")[1] | {"reasoning_content": "Hm."}],
        ),
    ],
)
def test_words_that_no_row_holds(assistant: str, messages: Any) -> None:
    error = refused(loaded(turns(assistant)), messages)
    assert error.code == "target-invented"
    assert "--template-words keep" in error.fix
    keeping = loaded(turns(assistant), policy=Policy(template_words="keep"))
    assert "template-words" in keeping.encode(messages).remarks


FORMATS = {
    "<|channel|>final<|message|>\x00": False,
    "\n\x00\n</think>\n\n\x00": False,
    "<|channel>thought\n\x00<channel|>\x00": False,
    '\x00\n<tool_call>\n{"name": "\x00", "arguments": {"\x00": "\x00"}}\n</tool_call>': True,
    '[TOOL_CALLS][{"name": "\x00", "arguments": {"\x00": true}, "id": "a b"}]': True,
    " to=functions.\x00<|channel|>commentary json<|message|>{}": True,
    "<|channel|>analysis<|message|>\x00<|end|><|start|>assistant to=functions.\x00": True,
    "<|call_begin|>function<|sep|>\x00\n```json\n{}\n```<|call_end|>": True,
    '<invoke name="\x00">\n<parameter name="\x00">\x00</parameter>\n</invoke>': True,
    ' functools[{"name": "\x00"}]': True,
    "<|tool_call>call:\x00{\x00:\x00}<tool_call|>": True,
    "<|section|>functions.\x00:0<|argument|>{}": True,
    "<answer>\x00</answer>": False,
}


@pytest.mark.parametrize(("frame", "calls"), FORMATS.items())
def test_formats_are_no_words(frame: str, calls: bool) -> None:
    controls = re.findall(r"<\|?[\w|]+\|?>|</think>", frame)
    assert words_in(frame, controls, calls=calls) == ""
    # Around calls a tag is format for a tokenizer that has no token for it, too.
    assert not calls or words_in(frame, (), calls=calls) == ""


@pytest.mark.parametrize(
    ("frame", "calls"),
    [
        ("Answer: \x00", False),
        ("\x00 Anything else?<sep>", False),
        ("<think>\x00</think>Then \x00", False),
        ("\u597d\u7684\x00", False),
        ("Sure, <tool_call>\x00</tool_call>", True),
        ("\x00 I call <tool_call>\x00</tool_call>", True),
        ('{"name": "\x00", "note": "I call a tool"}', True),
        ("<tool_call>\x00</tool_call> Done.", True),
        ("Action: \x00", True),
        ('<tool_call>{"name": "\x00_v2"}</tool_call>', True),
        ("<tool_call>my\x00</tool_call>", True),
        ('<tool_call>{"name": "\x00"}</tool_call>[GOODBYE]', True),
        ('<have a nice day><tool_call>{"name": "\x00"}</tool_call>', True),
        ("<think>\x00</think>\x00<bye>", False),
    ],
)
def test_words_are_no_format(frame: str, calls: bool) -> None:
    assert words_in(frame, (), calls=calls)


def test_a_label_that_the_prompt_announces_and_a_recipient_are_format() -> None:
    fenced = "Action:\n```json\n[\x00]```"
    assert words_in(fenced, (), calls=True)
    assert not words_in(fenced, (), calls=True, prompt="Write 'Action:' then")
    assert not words_in("Action: \x00", (), calls=True, prompt="Write 'Action:' and then")
    assert not words_in("all\n\x00", (), calls=False, recipient="\n")
    assert not words_in("all\n\n  \x00", (), calls=False, recipient="\n")
    assert words_in("all\n\x00", (), calls=False)


# ---------------------------------------------------------------- think markers in use


def test_a_marker_counts_with_its_other_side_only() -> None:
    switch = "<|think|>\n\0<|channel>thought\n\0<channel|>"
    assert think_pairs(switch, ["<|think|>", "<|channel>", "<channel|>"]) == []
    assert think_pairs("</think>", []) == []
    assert think_pairs("</think>", ["<think>", "</think>"]) == [("<think>", "</think>")]
    assert think_pairs("<think>\0</think>", []) == [("<think>", "</think>")]
    # A prompt that opens the block shows it in use, and leaves the end of it to the model.
    assert think_pairs("<thinking>", [], "x<thinking>\n") == [("<thinking>", "</thinking>")]
    assert think_pairs("<thinking>", [], "x") == []


# ---------------------------------------------------------------- history


def reasoned(*contents: str) -> list[dict[str, Any]]:
    rows = chat(*contents)
    for number, message in enumerate(rows[1::2]):
        message["reasoning_content"] = f"thought {number}"
    return rows


IN_PARTS = turns(
    "{%- if m.content is string -%}{{- m.content -}}{%- else -%}{%- for p in m.content -%}"
    "{%- if p.type == 'thinking' -%}{{- '<think>' ~ p.thinking ~ '</think>' -}}{%- else -%}"
    "{{- p.text -}}{%- endif -%}{%- endfor -%}{%- endif -%}"
)


def test_history_is_what_a_client_sends_back() -> None:
    contract = loaded(IN_PARTS)
    messages = reasoned("a", "b", "c", "d")
    encoded = contract.encode(messages)
    # With a parser on the server the field comes back, and this template writes none of it.
    assert contract.tokens.decode(encoded[1].ids[: encoded[1].mask.index(1)]) == (
        "<|user|>\na<|end|>\n<|assistant|>\nb<|end|>\n<|user|>\nc<|end|>\n<|assistant|>\n"
    )
    assert supervised_texts(contract, encoded) == [
        "<think>thought 0</think>b<|end|>",
        "<think>thought 1</think>d<|end|>",
    ]
    assert "history-parsed" in encoded.remarks
    assert "history-parsed" not in contract.encode(messages[:2]).remarks


def test_history_keeps_the_content_as_it_was_received() -> None:
    contract = loaded(tiny.OPENS_THINKING.replace("m.content", "m.content.split('</think>')[-1]"))
    messages = chat("a", "<think>\nb\n</think>\n\nc", "d", "<think>\ne\n</think>\n\nf")
    encoded = contract.encode(messages)
    served = contract.prompt_ids(messages[:3])
    assert contract.tokens.decode(served).count("\n\nc<|end|>") == 1
    assert encoded[1].ids[: len(served)] == served


def test_what_is_trimmed_in_history_only_is_trained_as_it_was_last() -> None:
    trims = turns("{{- (m.content if loop.last else m.content | trim) -}}")
    contract = loaded(trims)
    messages = chat("a", " b \n", "c", "d")
    encoded = contract.encode(messages)
    require_equation(contract, messages, encoded)
    assert supervised_texts(contract, encoded) == [" b \n<|end|>", "d<|end|>"]


def test_questions_trimmed_in_history_only() -> None:
    trims = tiny.PLAIN.replace("m.content", "(m.content if loop.last else m.content | trim)")
    contract = loaded(trims)
    messages = chat(" a \n", "b", "c ", "d")
    encoded = contract.encode(messages)
    require_equation(contract, messages, encoded)
    assert supervised_texts(contract, encoded) == ["b<|end|>", "d<|end|>"]


def test_a_line_break_that_only_a_prompt_has() -> None:
    apart = turns("{{- m.content -}}" + CALLS).replace(
        "{{- '<|' ~ m.role ~ '|>\\n' ~ m.content ~ '<|end|>\\n' -}}",
        "{{- '<|' ~ m.role ~ '|>\\n' ~ m.content ~ '<|end|>' ~ "
        "('\\n' if not (m.role == 'tool' and loop.last) else '') -}}",
    )
    contract = loaded(apart)
    messages = [
        *asked(call(sides=6)),
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "Four."},
    ]
    encoded = contract.encode(messages)
    require_equation(contract, messages, encoded)
    assert supervised_texts(contract, encoded)[-1] == "Four.<|end|>"


def test_a_prompt_that_opens_reasoning_with_words() -> None:
    words = turns(
        "{%- if m.reasoning_content -%}{{- m.reasoning_content ~ '\\n[BEGIN FINAL RESPONSE]\\n' "
        "-}}{%- endif -%}{{- m.content -}}",
        prompt="<|assistant|>\nHere are my steps:\n",
    )
    contract = loaded(words)
    messages = reasoned("a", "b")
    encoded = contract.encode(messages)
    require_equation(contract, messages, encoded)
    assert supervised_texts(contract, encoded) == ["thought 0\n[BEGIN FINAL RESPONSE]\nb<|end|>"]
    assert refused(contract, chat("a", "b")).code == "thinking-only"


def test_the_keys_of_a_call_stand_as_in_the_row() -> None:
    whole = turns("{%- for c in m.tool_calls -%}{{- '<call>' ~ (c | tojson) -}}{%- endfor -%}")
    function = {"arguments": {"sides": 6}, "name": "roll"}
    row = asked({"id": "x1", "function": function, "type": "function"})
    contract = loaded(whole)
    assert supervised_texts(contract, contract.encode(row)) == [
        '<call>{"id": "x1", "function": {"arguments": {"sides": 6}, "name": "roll"}, '
        '"type": "function"}<|end|>'
    ]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"role": None}, "unknown-role"),
        ({"tool_calls": [call(day=datetime.date(2026, 1, 1))]}, "bad-tool-call"),
        ({"content": "half \ud83d"}, "invalid-text"),
        ({"reasoning_content": "a", "thinking": "b"}, "unsupported-content"),
    ],
)
def test_messages_that_cannot_be_said_are_refused(change: dict[str, Any], code: str) -> None:
    row = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **change}]
    row = [{k: v for k, v in m.items() if v is not None} for m in row]
    assert refused(loaded(tiny.TOOLS), row).code == code
    row = [{**row[0], **{k: v for k, v in row[1].items() if k == "content"}}, chat("", "b")[1]]
    if code == "invalid-text":
        assert refused(loaded(tiny.TOOLS), row).code == code


def test_an_error_names_the_message_as_the_row_counts_it() -> None:
    merging = loaded(tiny.PLAIN, policy=Policy(system="merge"))
    row = chat("a", "b", "c", "d<|end|>e", system="s")
    assert "message 4" in refused(merging, row).what
    assert "message 3" in refused(merging, row[1:]).what


def test_a_long_row_is_the_row_and_is_encoded_once() -> None:
    contract = loaded(None)
    row = chat(*(f"turn {n} of a long conversation about nothing at all" for n in range(160)))
    fitted = contract.fit([row])
    assert fitted.encoder.kept
    encoded = fitted.encode(row)
    require_equation(contract, row, encoded)
    assert list(encoded) == list(loaded(None).encode(row))
    assert len(encoded[0].ids) > 4_000
    whole = contract.tokens.encode([contract.tokens.decode(encoded[0].ids)])[0]
    assert whole == encoded[0].ids


def test_branches_of_a_long_row_share_what_they_have_in_common() -> None:
    contract = loaded(tiny.END_OF_TEXT)
    row = chat(*"abcdefghijklmnop")
    encoded = contract.encode(row)
    require_equation(contract, row, encoded)
    for index, parent in enumerate(encoded.parents):
        if parent is not None:
            best = max(common(encoded[i].ids, encoded[index].ids) for i in range(index))
            assert encoded.shared[index] == best


def common(a: list[int], b: list[int]) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


@pytest.mark.parametrize("city", ["", {}, [], "a"])
def test_tags_around_an_empty_value_that_ends_a_turn_are_format(city: Any) -> None:
    written = (
        "{{- m.content -}}{%- for c in m.tool_calls or [] -%}{{- '<call>' ~ c.function.name -}}"
        "{%- for key, value in c.function.arguments.items() -%}{{- '<key>' ~ key ~ '</key><value>' "
        "~ (value if value is string else value | tojson) ~ '</value>' -}}{%- endfor -%}"
        "{{- '</call>' -}}{%- endfor -%}"
    )
    only(loaded(turns(written)), asked(call(city=city)))


def test_a_block_without_an_opening_marker_cuts_no_plain_answer() -> None:
    """A marker that is written as nothing stands in every text."""
    source = sources("typed_parts")
    assert isinstance(source, str)
    contract = PromptContract.load(own_tokenizer("typed_parts"), source.replace("[THINK]", ""))
    assert contract.encode(chat("Hi", "Yes"))[0].num_supervised
