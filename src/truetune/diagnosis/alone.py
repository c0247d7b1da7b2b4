"""Examine a GGUF file without the model that it was made from.

input   a file
does    reads its tensors for numbers that are not finite; has llama.cpp serve it; looks at its own
        template, at the tokens that begin a prompt and end a reply, and at what it replies
output  Stage
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from truetune.behaviour.text import goes_round
from truetune.diagnosis.gguf_cause import look_at
from truetune.diagnosis.measured import Stage, unopened
from truetune.errors import TruetuneError
from truetune.findings import Finding, visible
from truetune.servers.llama_cpp import LlamaCpp, serving

_PROMPTS = ("What is 17 + 25?", "Write one sentence about a river.", "Say hello.")
_ANSWER = "ANSWERED"


def gguf_alone(path: Path, tell: Callable[[str], None]) -> Stage:
    """Examine how a GGUF file behaves when it is served."""
    tell("running llama.cpp")
    try:
        with serving(path) as server:
            return _asked(path, server)
    except TruetuneError as error:
        return unopened("gguf", str(path), error)


def _asked(path: Path, server: LlamaCpp) -> Stage:
    findings: list[Finding] = []
    props = server.props()
    bos = str(props.get("bos_token") or "")
    user = {"role": "user", "content": _PROMPTS[0]}
    held = look_at(path)
    if not held.template:
        findings.append(
            _found(
                path,
                "the file contains no chat template",
                "it was converted without one, so llama.cpp uses a default template",
                "convert it again with the tokenizer files in the model's folder",
            )
        )
    prompt = server.tokenize(server.prompt([user]), add_special=True)
    first = server.tokenize(bos)[:1] if bos else []
    if first and prompt[:2] == [*first, *first]:
        findings.append(
            _found(
                path,
                f"prompts begin with {bos!r} twice",
                "the template writes it, and the tokenizer adds it again",
                "convert it again with add_bos_token set to false",
            )
        )
    chat = [user, {"role": "assistant", "content": _ANSWER}, {"role": "user", "content": "And?"}]
    tail = server.prompt(chat).partition(_ANSWER)[2]
    ids = server.tokenize(tail)[:1]
    special = bool(ids) and not visible(tail[:1]).isalnum() and tail[:1] in "<["
    # llama.cpp's default template writes an end that need not be the file's.
    if special and held.template and not server.ends_on(prompt, ids[0]):
        findings.append(
            _found(
                path,
                "replies do not end on the token that the template writes after an "
                f"answer ({tail.splitlines()[0][:40]!r})",
                "the file specifies a different end token",
                "set tokenizer.ggml.eot_token_id to that token",
            )
        )
    if held.damaged:
        number = len(held.damaged)
        findings.append(
            _found(
                path,
                f"{number} of {held.tensors} tensors contain numbers that are not finite, the "
                f"first is {held.damaged[0]}",
                "the model was damaged before or while it was converted",
                "convert it again from the model; truetune diagnose MODEL --merged DIR shows "
                "whether the folder is sound",
            )
        )
    made = []
    for text in _PROMPTS:
        asked = server.tokenize(
            server.prompt([{"role": "user", "content": text}]), add_special=True
        )
        made.append(server.reply(asked, 96))
    stopped = sum(ended for _, ended in made)
    round_and_round = sum(goes_round(reply, "") for reply, _ in made)
    numbers = {"replies": len(made), "ended": stopped, "going_round": round_and_round}
    if round_and_round == len(made) and not stopped:
        findings.append(
            _found(
                path,
                "every reply repeats itself and does not end",
                "the weights or the template are not those of a chat model",
                "compare it with its model: truetune diagnose MODEL --gguf FILE",
            )
        )
    return Stage(
        "gguf",
        str(path),
        findings=tuple(findings),
        note=f"the file was examined without its model: its chat template, how prompts begin, "
        f"{len(_PROMPTS)} replies, "
        f"whether its end token ends them, and whether its {held.tensors} tensors are finite. To "
        f"compare its weights with the model: truetune diagnose MODEL --gguf FILE",
        numbers=numbers,
    )


def _found(path: Path, what: str, why: str, fix: str) -> Finding:
    return Finding("stage-parts", "error", f"gguf: {what}", where=str(path), why=why, fix=fix)
