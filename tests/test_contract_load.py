"""What a contract is made of: template, stop set, arguments, and how it is saved and recognised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tiny_contracts as tiny
from tiny_contracts import byte_level, chat, prefix_space, require_equation, supervised_texts
from truetune import PromptContract, UnfaithfulTemplate
from truetune.data.conversation import Conversation
from truetune.errors import UsageError

pytestmark = pytest.mark.filterwarnings("error")

ROW = chat("Hello", "yes")
END, S = "<|end|>", "</s>"


def load(template: str | None = None, **arguments: Any) -> PromptContract:
    return PromptContract.load(byte_level(), template, **arguments)


def ids(*tokens: str) -> tuple[int, ...]:
    return tuple(byte_level().convert_tokens_to_ids(list(tokens)))


# ---------------------------------------------------------------- template


def test_where_the_template_comes_from(tmp_path: Path) -> None:
    own = load()
    assert (own.chat_template, own.origin) == (tiny.PLAIN, "the model's own")
    assert load("auto").chat_template == tiny.PLAIN
    source = load(tiny.TRIMMING)
    assert (source.chat_template, source.origin) == (tiny.TRIMMING, "given as source")
    file = tmp_path / "my.jinja"
    file.write_text(tiny.TOOLS, encoding="utf-8")
    named = load(str(file))
    assert (named.chat_template, named.origin) == (tiny.TOOLS, f"file {file}")
    built_in = load("chatml-lite")
    assert built_in.origin == "built-in chatml-lite"
    bare = byte_level()
    bare.chat_template = None
    default = PromptContract.load(bare)
    assert default.origin == "built-in instruction-response, because the model has none"
    assert default.prompt_text(chat("Hello")) == "### Instruction:\nHello\n\n### Response:\n"
    several = byte_level()
    several.chat_template = {"tool_use": tiny.TOOLS, "default": tiny.TRIMMING}
    assert PromptContract.load(several).chat_template == tiny.TRIMMING


def test_a_template_that_does_not_exist() -> None:
    with pytest.raises(UsageError, match=r"instruction-response, chatml-lite") as caught:
        load("no/such.jinja")
    assert caught.value.code == "no-such-template"


@pytest.mark.parametrize("source", ["{% if %}", "{{ x", "{% for a in b %}", "{{ x | nofilter }}"])
@pytest.mark.parametrize("stop", [None, "</s>"])
def test_a_template_that_is_not_jinja(source: str, stop: str | None) -> None:
    with pytest.raises(UnfaithfulTemplate, match="not valid Jinja"):
        load(tiny.PLAIN + source, stop=stop)


def test_a_folder_is_loaded_with_its_template(tmp_path: Path) -> None:
    byte_level().save_pretrained(tmp_path)
    for source in (tmp_path, str(tmp_path)):
        contract = PromptContract.load(source)
        assert contract.chat_template == tiny.PLAIN
        assert contract.encode(ROW)[0] == load().encode(ROW)[0]
        assert contract.fingerprint() == PromptContract.load(source).fingerprint()


# ---------------------------------------------------------------- stop set


def test_auto_adds_the_token_that_the_template_writes() -> None:
    same = load()
    assert (same.stop_ids, same.findings) == (ids(END), ())
    other = load(tiny.END_OF_TEXT)
    assert other.stop_ids == ids(END, S)
    (note,) = other.findings
    assert (note.code, note.level) == ("stop-added", "note")
    assert "'</s>'" in note.what
    assert "'<|end|>'" in note.why
    assert load(tiny.END_OF_TEXT, stop="auto").stop_ids == ids(END, S)
    none = load(tiny.OPEN_ENDED)
    assert (none.stop_ids, none.findings) == (ids(END), ())
    # Nothing stands behind a last answer: what begins the next turn ends it.
    assert load(tiny.NO_TERMINATOR).stop_ids == ids(END, "<|user|>")


def test_auto_looks_past_whitespace_and_no_further() -> None:
    spaced = tiny.PLAIN.replace("m.content ~ '<|end|>", "m.content ~ '\\n </s>")
    assert load(spaced).stop_ids == ids(END, S)
    text = tiny.PLAIN.replace("m.content ~ '<|end|>", "m.content ~ ' OVER </s>")
    assert load(text).stop_ids == ids(END)
    contract = PromptContract.load(prefix_space(), tiny.END_OF_TEXT)
    assert [contract.tokens.decode([i]) for i in contract.stop_ids] == [END, S]


def test_explicit_stops_are_added_as_text_or_id() -> None:
    (number,) = ids(S)
    for stop in (S, [S], [number], [S, number], [END, S]):
        contract = load(tiny.END_OF_TEXT, stop=stop)
        assert contract.stop_ids == ids(END, S)
        assert contract.findings == ()
    # Explicit means that nothing is guessed.
    contract = load(tiny.END_OF_TEXT, stop="<|user|>")
    assert contract.stop_ids == ids(END, "<|user|>")
    with pytest.raises(UnfaithfulTemplate, match="does not end with a stop token"):
        contract.encode(ROW)


def test_a_stop_of_ones_own_ends_the_answer() -> None:
    template = tiny.NO_TERMINATOR.replace("m.content ~ '", "m.content ~ '<|pad|>")
    contract = load(template, stop="<|pad|>")
    encoded = contract.encode(ROW)
    require_equation(contract, ROW, encoded)
    assert supervised_texts(contract, encoded) == ["yes<|pad|>"]


@pytest.mark.parametrize("stop", ["<|nope|>", "Question? Answer!", "", [END, "<|nope|>"]])
def test_a_stop_that_is_no_token(stop: Any) -> None:
    with pytest.raises(UsageError, match="is not one token") as caught:
        load(stop=stop)
    assert caught.value.code == "stop-not-a-token"
    with pytest.raises(UsageError, match="is not one token"):
        PromptContract.load(prefix_space(), stop="\u6f22")


@pytest.mark.parametrize("stop", [-1, len(byte_level()), 10**9])
def test_an_id_outside_the_vocabulary(stop: int) -> None:
    with pytest.raises(UsageError, match="is not one token"):
        load(stop=[stop])
    assert load(stop=[len(byte_level()) - 1]).stop_ids[-1] == len(byte_level()) - 1


def test_the_models_own_stops(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.save_pretrained(tmp_path)
    end, s, user, pad = ids(END, S, "<|user|>", "<|pad|>")
    assert PromptContract.load(tmp_path).stop_ids == (end,)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": user}))
    # The template's own stop is added where the model's differ.
    assert PromptContract.load(tmp_path).stop_ids == (user, end)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [s, pad, end]}))
    contract = PromptContract.load(tmp_path)
    assert (contract.stop_ids, contract.findings) == ((s, pad, end), ())
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": s}))
    assert PromptContract.load(tmp_path).stop_ids == (s, end)
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": True}))
    assert PromptContract.load(tmp_path).stop_ids == (user, end)
    # A loaded tokenizer remembers its folder.
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert PromptContract.load(loaded).stop_ids == (user, end)


@pytest.mark.parametrize("origin", ["gone", "no/such", "/no/such/folder"])
def test_a_tokenizer_whose_folder_is_gone_has_its_own_end(origin: str) -> None:
    tokenizer = byte_level()
    tokenizer.name_or_path = origin
    assert PromptContract.load(tokenizer).stop_ids == ids(END)


# ---------------------------------------------------------------- template arguments


def test_fit_chooses_the_argument_under_which_plain_rows_fit() -> None:
    plain = load(tiny.HYBRID)
    with pytest.raises(UnfaithfulTemplate):
        plain.encode(ROW)
    fitted = plain.fit([ROW, chat("Question?", "no")])
    assert fitted.template_kwargs == {"thinking": False}
    encoded = fitted.encode(ROW)
    require_equation(fitted, ROW, encoded)
    assert supervised_texts(fitted, encoded) == ["yes<|end|>"]
    (note,) = fitted.findings
    assert (note.code, note.level) == ("template-argument", "note")
    assert '{"thinking": false}' in note.what
    assert plain.template_kwargs == {}


def test_fit_leaves_alone_what_fits_and_what_was_chosen() -> None:
    reasoned = chat("Sum?", "yes")
    reasoned[1]["reasoning_content"] = "maybe"
    for contract, rows in (
        (load(tiny.HYBRID), [reasoned]),
        (load(tiny.HYBRID), []),
        (load(tiny.HYBRID), [Conversation((), "", text="Hello")]),
        (load(tiny.HYBRID, template_kwargs={"thinking": True}), [ROW]),
        (load(tiny.HYBRID, template_kwargs={}), [ROW]),
        (load(), [ROW]),
        (load(tiny.NO_TERMINATOR), [ROW]),
    ):
        fitted = contract.fit(rows)
        assert fitted.template_kwargs == contract.template_kwargs
        assert fitted.findings == contract.findings


def test_fit_takes_the_value_that_refuses_the_fewest() -> None:
    reasoned = chat("Sum?", "yes")
    reasoned[1]["reasoning_content"] = "maybe"
    assert load(tiny.HYBRID).fit([ROW, ROW, reasoned]).template_kwargs == {"thinking": False}
    assert load(tiny.HYBRID).fit([ROW, reasoned, reasoned]).template_kwargs == {}


def test_a_row_may_carry_its_own_arguments() -> None:
    contract = load(tiny.HYBRID)
    row = Conversation(tuple(ROW), "f:1", template_kwargs={"thinking": False})
    encoded = contract.encode(row)
    assert supervised_texts(contract, encoded) == ["yes<|end|>"]
    served = contract.prompt_ids(ROW[:1], template_kwargs={"thinking": False})
    assert encoded[0].ids[: len(served)] == served
    assert served != contract.prompt_ids(ROW[:1])
    fitted = contract.fit([ROW])
    own = Conversation(tuple(ROW), "f:1", template_kwargs={"thinking": True})
    # Asked for by hand: the answer alone is trained, and that is told.
    unlearned = fitted.encode(own)
    assert supervised_texts(contract, unlearned) == ["yes<|end|>"]
    assert unlearned.remarks == ("thinking-unlearned",)


def test_arguments_are_what_nobody_provides() -> None:
    assert load(tiny.HYBRID).renderer.variables() == ["thinking"]
    assert load(tiny.TOOLS).renderer.variables() == []
    assert load(tiny.DATED).renderer.variables() == ["date_string"]
    marked = "{% generation %}{{ deep }}{% endgeneration %}" + tiny.PLAIN
    assert load(marked).renderer.variables() == ["deep"]


def test_variables_can_be_asked_first(tmp_path: Path) -> None:
    """In a fresh process: nothing else has loaded Jinja's extensions yet."""
    import subprocess
    import sys

    code = (
        "from truetune.contract.render import Renderer;"
        "print(Renderer('{{ a }}', {}, {}).variables())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "['a']", done.stderr


def test_a_date_can_be_pinned() -> None:
    pinned = load(tiny.DATED, template_kwargs={"date_string": "1 Jan"})
    assert pinned.prompt_text(chat("Hello")).startswith("Today: 1 Jan\n")
    require_equation(pinned, ROW, pinned.encode(ROW))
    assert load(pinned.saved_template()).prompt_text(ROW) == pinned.prompt_text(ROW)


# ---------------------------------------------------------------- the saved template


def test_the_saved_template_serves_what_was_trained() -> None:
    fitted = load(tiny.HYBRID).fit([ROW])
    saved = load(fitted.saved_template())
    assert saved.template_kwargs == {}
    assert saved.prompt_ids(ROW[:1]) == fitted.prompt_ids(ROW[:1])
    assert saved.encode(ROW)[0] == fitted.encode(ROW)[0]
    # An argument that is given wins.
    for value in (True, False):
        explicit = saved.prompt_text(ROW[:1], template_kwargs={"thinking": value})
        assert explicit == load(tiny.HYBRID, template_kwargs={"thinking": value}).prompt_text(
            ROW[:1]
        )
    assert load(tiny.HYBRID).saved_template() == tiny.HYBRID


VALUES: dict[str, Any] = {
    "flag": False,
    "none": None,
    "text": "\u00e9\U0001f600 'a' \"b\" \\ \n {% x %} {{ y }} %}",
    "number": 1.5e-7,
    "nested": {"a": [None, True, "\U0001f600"], "b": {}},
}


@pytest.mark.parametrize("name", VALUES)
def test_any_value_is_baked_in_as_it_is(name: str) -> None:
    template = tiny.PLAIN + "{{ x is none }}{{ x | tojson }}{{ x }}"
    contract = load(template, template_kwargs={"x": VALUES[name]})
    baked = load(contract.saved_template())
    assert baked.prompt_text(ROW) == contract.prompt_text(ROW)


@pytest.mark.parametrize(
    "beginning", ["", " ", "\n", "\n\n", "  {% if true %}\n", "{% if true %}", "{#- x -#} ", "x\n"]
)
def test_the_beginning_of_the_template_stays(beginning: str) -> None:
    end = "{% endif %}" if "{% if" in beginning else ""
    template = beginning + "A{{ x }}" + end + "{% macro m() %}{{ x }}{% endmacro %}{{ m() }}"
    contract = load(template, template_kwargs={"x": 1, "y": 2}, stop=END)
    assert load(contract.saved_template(), stop=END).prompt_text(ROW) == contract.prompt_text(ROW)


# ---------------------------------------------------------------- the fingerprint


def test_the_fingerprint_changes_with_each_part() -> None:
    other = byte_level()
    other.add_tokens(["<more>"])
    prints = {
        "plain": load().fingerprint(),
        "template": load(tiny.TRIMMING).fingerprint(),
        "argument": load(template_kwargs={"x": True}).fingerprint(),
        "other value": load(template_kwargs={"x": False}).fingerprint(),
        "stop": load(stop=S).fingerprint(),
        "tokenizer": PromptContract.load(other).fingerprint(),
    }
    assert len(set(prints.values())) == len(prints)
    assert load().fingerprint() == prints["plain"]
    assert load(stop=[END]).fingerprint() == prints["plain"]


def test_the_fingerprint_does_not_change_with_use() -> None:
    contract = load()
    before = contract.fingerprint()
    contract.encode(ROW)
    contract.tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)
    assert contract.fingerprint() == before
    assert len(contract.tokens.encode(["Hello world, yes"])[0]) > 2


def test_what_contract_json_holds() -> None:
    contract = load(tiny.HYBRID).fit([ROW])
    facts = json.loads(json.dumps(contract.as_dict()))
    assert facts["fingerprint"] == contract.fingerprint()
    assert facts["template"] == {"origin": "given as source", "source": tiny.HYBRID}
    assert facts["template_kwargs"] == {"thinking": False}
    assert facts["stop"] == [{"id": ids(END)[0], "token": END}]
    assert facts["tokenizer"]["size"] == len(contract.tokenizer)


def test_a_pad_id_there_always_is() -> None:
    assert (load().pad_id,) == ids("<|pad|>")
    without = byte_level()
    without.pad_token = None
    assert (PromptContract.load(without).pad_id,) == ids(END)
