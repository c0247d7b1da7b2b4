"""The rows that every stage of a model is asked, as they are served.

input   a contract, conversations
does    renders each as the contract serves it; chooses the positions at which predictions are read;
        compares a server's prompts and predictions with those of the contract and of a model
output  Case, SamePrompts, a Reading of a server
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from truetune.compare import Probe, Reading
from truetune.contract.contract import PromptContract
from truetune.contract.encode import Encoded
from truetune.contract.shape import in_json, with_arguments
from truetune.data.conversation import Conversation
from truetune.errors import UnfaithfulTemplate
from truetune.servers.client import ServerError
from truetune.servers.llama_cpp import LlamaCpp
from truetune.servers.protocol import lost
from truetune.servers.scripts import SCRIPTS
from truetune.system.lazy import torch

# Cases, and positions of a row's answer at which predictions are read beside the first.
MOST_CASES, _POSITIONS = 50, 3
# Tokens of the likeliest ones that a server is asked for: more than are compared, so that a small
# difference leaves all of those among them.
_ASKED = 256
_QUESTIONS = (
    *("What is 17 + 25?", "Write one sentence about a river.", "Who are you?", "Say hello."),
    *(
        "List three colours.",
        "Translate 'good morning' into French.",
        "What is the capital of Peru?",
    ),
    *("Why is the sky blue?", "Write a haiku about winter.", "Explain recursion in one sentence."),
    *("Give me a synonym of 'quick'.", "What comes after Tuesday?", "Count from one to five."),
    *("Is water wet? Answer yes or no.", "Name an animal that flies.", "How far is the moon?"),
    *("Write a line of Python that prints 1.", "What rhymes with 'day'?", "Spell 'necessary'."),
    *("Summarise: the cat sat on the mat.", "What is half of 90?", "Who wrote Hamlet?"),
)
_CHATS: tuple[tuple[tuple[str, str], ...], ...] = (
    (("user", "Hi."), ("assistant", "Hello! How can I help?"), ("user", "What is a sonnet?")),
    (("system", "You are terse."), ("user", "Name two rivers.")),
    (("user", "  leading and trailing spaces \n"),),
    (
        *(("user", "One?"), ("assistant", "Two."), ("user", "Three?"), ("assistant", "Four.")),
        *(("user", "Five?"), ("assistant", "Six."), ("user", "And then?")),
    ),
    (
        *(("system", "You count."), ("user", "One?"), ("assistant", "Two."), ("user", "Three?")),
        *(("assistant", "Four."), ("user", "And then?")),
    ),
)


@dataclass(frozen=True)
class Case:
    """One conversation as it is served.

    Attributes:
        where: its row.
        messages: as a client sends them.
        tools, template_kwargs: sent with them.
        text, ids: the served prompt.
        probe: the prompt, and the row's answer behind it, with the positions that are read.
        expected: the row's answer; None if there is none.
        seen, seen_tools: messages and tools without those that the template does not render, which
            a server may refuse to lose; the prompt is the same.
    """

    where: str
    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[dict[str, Any], ...] | None
    template_kwargs: Mapping[str, Any]
    text: str
    ids: tuple[int, ...]
    probe: Probe
    expected: str | None
    seen: tuple[Mapping[str, Any], ...]
    seen_tools: tuple[dict[str, Any], ...] | None


def cases_of(
    contract: PromptContract,
    conversations: Sequence[Conversation],
    *,
    most: int = MOST_CASES,
    longest: int = 1024,
) -> list[Case]:
    """Conversations as they are served, plus fixed ones; those that the template refuses are
    omitted.

    Args:
        longest: tokens of a prompt and its answer.
    """
    found: list[Case] = []
    own = [c for c in conversations if c.text is None and c.messages]
    encoded = contract.encode_all(own, loss_on="last") if own else []
    for conversation, result in zip(own, encoded, strict=True):
        if len(found) >= most:
            break
        answers = [i for i, m in enumerate(conversation.messages) if m["role"] == "assistant"]
        end = answers[-1] if answers else len(conversation.messages)
        case = _case(contract, conversation, end, result if isinstance(result, Encoded) else None)
        if case and len(case.probe.ids) <= longest:
            found.append(case)
    for conversation in _fixed():
        if len(found) >= most:
            break
        case = _case(contract, conversation, len(conversation.messages), None)
        if case and len(case.probe.ids) <= longest:
            found.append(case)
    return found


def _fixed() -> list[Conversation]:
    asked = [
        *[tuple({"role": r, "content": t} for r, t in chat) for chat in _CHATS],
        *[({"role": "user", "content": text},) for text in _QUESTIONS],
        *[({"role": "user", "content": text},) for text in SCRIPTS.values()],
    ]
    return [Conversation(m, where=f"fixed prompt {i}") for i, m in enumerate(asked, 1)]


def _case(
    contract: PromptContract, conversation: Conversation, end: int, encoded: Encoded | None
) -> Case | None:
    messages = conversation.messages[:end]
    if not messages:
        return None
    try:
        text = contract.prompt_text(messages, conversation.tools, conversation.template_kwargs)
        sent = contract.policy.past(contract.prepared(messages))
        seen, seen_tools = _seen(contract, sent, conversation)
    except UnfaithfulTemplate:
        return None
    (ids,) = contract.tokens.encode([text])
    if not ids:
        return None
    probe = Probe(tuple(ids), (len(ids) - 1,))
    expected = None
    if encoded is not None and len(encoded.examples) == 1:
        (example,) = encoded.examples
        targets = [i - 1 for i, on in enumerate(example.mask) if on]
        if targets and tuple(example.ids[: targets[0] + 1]) == tuple(ids):
            step = max((len(targets) - 1) // _POSITIONS, 1)
            at = sorted({targets[0], *targets[::-1][: _POSITIONS * step : step]})
            probe = Probe(tuple(example.ids), tuple(at))
            expected = str(conversation.messages[end]["content"])
    return Case(
        conversation.where,
        tuple(_sent(message) for message in sent),
        conversation.tools,
        conversation.template_kwargs,
        text,
        tuple(ids),
        probe,
        expected,
        tuple(_sent(message) for message in seen),
        seen_tools,
    )


def _seen(
    contract: PromptContract, sent: Sequence[Mapping[str, Any]], conversation: Conversation
) -> tuple[list[dict[str, Any]], tuple[dict[str, Any], ...] | None]:
    """Messages and tools without those that the template does not render."""

    def render(messages: Sequence[Mapping[str, Any]], tools: Any) -> str:
        return contract.prompt_text(messages, tools, conversation.template_kwargs)

    found = lost(render, sent, conversation.tools)
    left = [
        {key: value for key, value in message.items() if key not in found}
        for message in sent
        if message["role"] not in found
    ]
    tools = None if "tools" in found else conversation.tools
    if found and render(left, tools) != render(sent, conversation.tools):
        return [dict(message) for message in sent], conversation.tools
    return left, tools


def _sent(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as the protocol has it: arguments of calls are JSON texts."""
    made = {name: value for name, value in message.items() if name not in ("train", "text")}
    return with_arguments(made, in_json)


def long_probe(ids: Sequence[int], length: int) -> Probe:
    """A long row of random tokens: errors in rotary embeddings and windows show only at long
    distances.

    Args:
        ids: to draw from.
    """
    drawn = random.Random(1).choices(list(ids), k=length)
    at = sorted({length - 1 - step * (length - 1) // 6 for step in range(6)})
    return Probe(tuple(drawn), tuple(at))


@dataclass(frozen=True)
class Prompts:
    """A server's prompts compared with the contract's.

    Attributes:
        refused: cases that the server's template refuses, with its words.
        texts: (case, the server's text) where it is different.
        ids: (case, the server's ids) where they are different.
    """

    refused: tuple[tuple[Case, str], ...]
    texts: tuple[tuple[Case, str], ...]
    ids: tuple[tuple[Case, tuple[int, ...]], ...]

    @property
    def equal(self) -> bool:
        """Whether the model gets the same prompts: the ids decide."""
        return not self.refused and not self.ids


def compare_prompts(
    server: LlamaCpp,
    cases: Sequence[Case],
    template_kwargs: Mapping[str, Any] | None = None,
    *,
    first: str = "",
) -> Prompts:
    """Have a server render each case.

    Args:
        template_kwargs: sent with each, over the case's own.
        first: text of the token that begins texts, which llama.cpp leaves to its tokenizer.
    """
    refused, texts, ids = [], [], []
    for case in cases:
        try:
            text = server.prompt(
                case.messages, case.tools, {**case.template_kwargs, **(template_kwargs or {})}
            )
            made = tuple(server.tokenize(text, add_special=True))
        except ServerError as error:
            if not error.status:
                raise
            refused.append((case, error.what))
            continue
        if text not in (case.text, case.text.removeprefix(first)):
            texts.append((case, text))
        if made != case.ids:
            ids.append((case, made))
    return Prompts(tuple(refused), tuple(texts), tuple(ids))


def read_server(server: LlamaCpp, probes: Sequence[Probe], top: torch.Tensor) -> Reading:
    """Read a server's predictions, as `compare.read` does for a model.

    Args:
        top: ids (P, K) to be kept.
    """
    rows, greedy = [], []
    places = [(probe, at) for probe in probes for at in probe.positions]
    for (probe, at), wanted in zip(places, top.tolist(), strict=True):
        found = server.predict(probe.ids[: at + 1], max(_ASKED, 2 * len(wanted)))
        # A token that is not among the likeliest is at most as likely as the last of them.
        least = min(found.logprobs.values())
        known = torch.tensor([found.logprobs.get(i, least) for i in wanted], dtype=torch.float64)
        rest = (1 - known.exp().sum()).clamp(min=1e-9).log()
        rows.append(torch.cat([known, rest[None]]).float())
        greedy.append(found.token)
    return Reading(top, torch.stack(rows), torch.tensor(greedy), 0.0, "")
