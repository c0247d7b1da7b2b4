"""A server by its address, held to the contract without knowing its weights.

input   an address that speaks the chat protocol, the reference's rows
does    compares prompts where the server tells them (llama.cpp, truetune serve, vLLM), then greedy
        replies and whether they end
output  Stage
"""

from __future__ import annotations

from collections.abc import Sequence

from truetune.contract.contract import PromptContract
from truetune.diagnosis.measured import TOKENS, Replies, Stage, rates, unopened
from truetune.errors import TruetuneError
from truetune.exporting.gguf_proof import Reference, on_prompts
from truetune.findings import Finding, visible
from truetune.servers.cases import Case
from truetune.servers.chat import complete, first_model, request
from truetune.servers.client import Client, ServerError
from truetune.servers.llama_cpp import LlamaCpp


def live(
    url: str, contract: PromptContract, reference: Reference, cases: Sequence[Case], own: Replies
) -> Stage:
    """What a running server makes of the rows.

    Args:
        cases, own: rows, and the greedy replies of what was trained.
    """
    try:
        client = Client(url, seconds=120)
        model = first_model(client)
        note, findings = _prompts(client, model, contract, reference.cases)
        made = [_reply(client, model, case) for case in cases]
    except TruetuneError as error:
        return unopened("url", url, error)
    texts = tuple(text for text, _ in made)
    ids = tuple(tuple(i) for i in contract.tokens.encode(texts))
    replies = Replies(ids, tuple(stopped for _, stopped in made), texts)
    same = sum(a.strip() == b.strip() for a, b in zip(own.texts, texts, strict=True))
    ended = sum(a and not b for a, b in zip(own.stopped, replies.stopped, strict=True))
    if ended * 2 > sum(own.stopped):
        findings.append(
            Finding(
                "stage-parts",
                "error",
                f"url: {ended} of {sum(own.stopped)} replies that ended by themselves do not end "
                "any more",
                where=url,
                why="the server's stop tokens are not those of training, or its prompts are others",
                fix="give it the generation_config.json and chat template that were saved",
            )
        )
    elif same * 2 < len(cases):
        findings.append(
            Finding(
                "replies-differ",
                "warning",
                f"url: {len(cases) - same} of {len(cases)} greedy replies are others than those of "
                "what was trained",
                where=url,
                why="the server serves other weights, fewer bits, or samples although it was asked "
                "not to",
                fix="hold its files to the run: truetune diagnose RUN --gguf FILE or --merged DIR",
            )
        )
    numbers = {**rates(replies, cases), "same_replies": same / max(len(cases), 1)}
    return Stage("url", url, None, replies, tuple(findings), note=note, numbers=numbers)


def _reply(client: Client, model: str, case: Case) -> tuple[str, bool]:
    asked = request(case.messages, case.tools)
    answer = complete(client, {**asked, "model": model, "temperature": 0, "max_tokens": TOKENS})
    return answer.text, answer.ended


def _prompts(
    client: Client, model: str, contract: PromptContract, cases: Sequence[Case]
) -> tuple[str, list[Finding]]:
    """Prompts against the contract's, where the server tells them."""
    try:
        _, findings = on_prompts(LlamaCpp(client), contract, cases)
        return "prompts by /apply-template and /tokenize", [
            f for f in findings if f.level == "error"
        ]
    except (ServerError, KeyError, TypeError):
        pass
    wrong = []
    try:
        for case in cases:
            asked = {"model": model, "messages": [dict(m) for m in case.messages]}
            made = client.post("/tokenize", {**asked, "add_generation_prompt": True})["tokens"]
            if tuple(int(i) for i in made) != case.ids:
                wrong.append(case)
    except (ServerError, KeyError, TypeError, ValueError):
        return "the server does not tell its prompts; replies alone were compared", []
    if not wrong:
        return "prompts by /tokenize", []
    return "prompts by /tokenize", [
        Finding(
            "stage-parts",
            "error",
            f"url: the server makes other prompts of {len(wrong)} of {len(cases)} conversations",
            where=wrong[0].where,
            why="its chat template is another: "
            + visible(wrong[0].text[-120:], keep_newlines=False),
            fix="start it with the chat template that was saved",
        )
    ]
