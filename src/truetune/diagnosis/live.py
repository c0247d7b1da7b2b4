"""Compare a server, by its address, with the contract, without knowing its weights.

input   an address that speaks the chat protocol, the reference's rows
does    compares prompts if the server shows them (llama.cpp, truetune serve, vLLM), then greedy
        replies and whether they end
output  Stage
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from truetune.contract.contract import PromptContract
from truetune.diagnosis.measured import TOKENS, Replies, Stage, rates, unopened
from truetune.diagnosis.said import judge
from truetune.errors import TruetuneError
from truetune.exporting.gguf_proof import Reference, on_prompts
from truetune.findings import Finding, visible
from truetune.servers.cases import Case
from truetune.servers.chat import Answer, complete, first_model, request
from truetune.servers.client import Client, ServerError
from truetune.servers.llama_cpp import LlamaCpp


def live(
    url: str, contract: PromptContract, reference: Reference, cases: Sequence[Case], own: Replies
) -> Stage:
    """Compare what a running server does with the rows.

    Args:
        cases, own: rows, and the greedy replies of what was trained.
    """
    try:
        client = Client(url, seconds=120)
        model = first_model(client)
        note, findings = _prompts(client, model, contract, reference.cases)
        answers = [_reply(client, model, case) for case in cases]
        said = judge(
            url,
            contract,
            cases,
            own,
            answers,
            lambda case: _reply(client, model, case).text,
        )
    except TruetuneError as error:
        return unopened("url", url, error)
    findings += said.findings
    numbers = {
        **rates(said.replies, cases),
        "same_replies": sum(said.same) / max(len(cases), 1),
    }
    return Stage("url", url, None, said.replies, tuple(findings), note=note, numbers=numbers)


def _asked(model: str, case: Case) -> dict[str, Any]:
    """A conversation as a request names it."""
    named = {"model": model} if model else {}
    return {**named, **request(case.messages)}


def _reply(client: Client, model: str, case: Case) -> Answer:
    asked = {**_asked(model, case), **request(case.seen, case.seen_tools)}
    return complete(client, {**asked, "temperature": 0, "max_tokens": TOKENS})


# What servers say of a path that they do not have.
_NO_PATH = (403, 404, 405, 501)


def _tells_prompts(server: LlamaCpp) -> bool:
    """Whether a server has the paths by which llama.cpp shows its prompts, even if it refuses a
    conversation."""
    for ask in (lambda: server.prompt([{"role": "user", "content": "Hi."}]),
                lambda: server.tokenize("Hi.")):  # fmt: skip
        try:
            ask()
        except ServerError as error:
            if error.status in _NO_PATH:
                return False
        except (KeyError, TypeError):
            return False
    return True


def _prompts(
    client: Client, model: str, contract: PromptContract, cases: Sequence[Case]
) -> tuple[str, list[Finding]]:
    """Compare prompts with the contract's, if the server shows them."""
    llama = LlamaCpp(client)
    if _tells_prompts(llama):
        _, findings = on_prompts(llama, contract, cases)
        return "prompts compared through /apply-template and /tokenize", [
            f for f in findings if f.level == "error"
        ]
    wrong = []
    try:
        for case in cases:
            asked = {**_asked(model, case), "add_generation_prompt": True}
            made = client.post("/tokenize", asked)["tokens"]
            if tuple(int(i) for i in made) != case.ids:
                wrong.append(case)
    except (ServerError, KeyError, TypeError, ValueError):
        return "the server does not show its prompts; only replies were compared", []
    if not wrong:
        return "prompts compared through /tokenize", []
    return "prompts compared through /tokenize", [
        Finding(
            "stage-parts",
            "error",
            f"url: the server renders different prompts for {len(wrong)} of {len(cases)} "
            "conversations",
            where=wrong[0].where,
            why="its chat template is different: "
            + visible(wrong[0].text[-120:], keep_newlines=False),
            fix="start it with the chat template that was saved",
        )
    ]
