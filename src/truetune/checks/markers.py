"""What tokenizer and template write around a conversation, found by rendering sentinels.

input   a tokenizer, its chat template (or another one), the ids on which a server stops
does    renders sentinel conversations and looks at what stands before, between and after them
output  Markers: plain ids and texts; empty where the tokenizer has no template
who     the label families, which never read a template's source
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from truetune.contract.contract import PromptContract
from truetune.contract.tokens import Tokens
from truetune.errors import UnfaithfulTemplate

_ASKED, _SAID, _NEXT, _LAST, _THOUGHT = (
    "qqsentinelqq",
    "aasentinelaa",
    "bbsentinelbb",
    "ccsentinelcc",
    "ddsentineldd",
)
_THINK = ("<think>", "</think>")


@dataclass(frozen=True)
class Markers:
    """Around the turns of a conversation.

    Attributes:
        tokens: the tokenizer seen from the contract.
        has_template: whether the rest was found in a template.
        served_stops: ids on which a server ends an answer.
        terminator: the id that the template writes after an answer; None where it writes none.
        answer_start: the text that stands before every answer, in history and in served prompts
            alike, without outer whitespace; "" where it is not known.
        user_start: the same before the second user turn.
        answer_start_ids, user_start_ids: their ids, where they are the same in every context.
        think: the markers around reasoning.
        keeps_reasoning: whether reasoning of an earlier turn is still there in a later prompt;
            None where the template takes none.
        bos: the id that served prompts begin with, doubled or not; None where there is none.
        own_stop_is_terminator: the model's own stop set holds the terminator: it was tuned to it.
        contract: that renders the served template; None where there is no template.
        broken: why the served template cannot be run at all; None where it can.
    """

    tokens: Tokens
    has_template: bool
    served_stops: frozenset[int]
    terminator: int | None
    answer_start: str
    user_start: str
    answer_start_ids: tuple[int, ...]
    user_start_ids: tuple[int, ...]
    think: tuple[str, str]
    keeps_reasoning: bool | None
    bos: int | None
    own_stop_is_terminator: bool
    contract: PromptContract | None = None
    broken: UnfaithfulTemplate | None = None

    @property
    def ends(self) -> frozenset[int]:
        """Ids that end an answer for somebody: the server, the template or the tokenizer."""
        eos = self.tokens.tokenizer.eos_token_id
        others = {i for i in (self.terminator, eos) if i is not None}
        return self.served_stops | others

    @classmethod
    def probe(
        cls,
        tokenizer: Any,
        *,
        stop_ids: Sequence[int] | None = None,
        chat_template: str | None = None,
    ) -> Markers:
        """Render the sentinels.

        Args:
            tokenizer: a transformers tokenizer.
            stop_ids: on which a server ends an answer; None takes the tokenizer's end token.
            chat_template: what is served, where it is not the tokenizer's own.
        """
        eos = tokenizer.eos_token_id
        served = frozenset(stop_ids if stop_ids is not None else [] if eos is None else [eos])
        tokens = Tokens(tokenizer)
        contract, broken = _contract(tokenizer, chat_template)
        if contract is None:
            return _without_template(tokens, served, broken)
        return _probed(contract, tokens, served)

    @classmethod
    def of_contract(cls, contract: PromptContract) -> Markers:
        """What a contract serves; the think markers are those that it writes itself where it
        does."""
        found = cls.probe(
            contract.tokenizer, stop_ids=contract.stop_ids, chat_template=contract.chat_template
        )
        own = contract.policy.think_markers if contract.policy.reasoning == "inline" else None
        return dataclasses.replace(found, think=own or found.think, contract=contract)


def served_stop_ids(generation_config: Any, tokenizer: Any) -> tuple[int, ...]:
    """The ids on which a server ends an answer, as transformers has it: those of the generation
    config, else the tokenizer's end token.

    Args:
        generation_config: a GenerationConfig, a mapping, or None.
    """
    if isinstance(generation_config, Mapping):
        found = generation_config.get("eos_token_id")
    else:
        found = getattr(generation_config, "eos_token_id", None)
    if found is None:
        found = tokenizer.eos_token_id
    if found is None:
        return ()
    return tuple(int(i) for i in found) if isinstance(found, list | tuple) else (int(found),)


def _contract(
    tokenizer: Any, chat_template: str | None
) -> tuple[PromptContract | None, UnfaithfulTemplate | None]:
    """(the contract, None), or (None, why a template that is there cannot be run)."""
    if chat_template is None and not tokenizer.chat_template:
        return None, None
    try:
        contract = PromptContract.load(tokenizer, chat_template)
        contract.renderer.render(_TWO_TURNS[:1], add_generation_prompt=True)
    except UnfaithfulTemplate as error:
        # What it refuses of a conversation of ours it may take of others.
        return (contract, None) if error.code == "template-refuses" else (None, error)
    return contract, None


def _without_template(
    tokens: Tokens, served: frozenset[int], broken: UnfaithfulTemplate | None
) -> Markers:
    return Markers(
        tokens=tokens,
        has_template=False,
        served_stops=served,
        terminator=None,
        answer_start="",
        user_start="",
        answer_start_ids=(),
        user_start_ids=(),
        think=_THINK,
        keeps_reasoning=None,
        bos=_own_bos(tokens),
        own_stop_is_terminator=False,
        broken=broken,
    )


def _probed(contract: PromptContract, tokens: Tokens, served: frozenset[int]) -> Markers:
    start, user = _turn_starts(contract)
    whole = _rendered(contract, _TWO_TURNS) or ""
    ids = tokens.encode([whole])[0] if whole else []
    written = _written(contract, tokens)
    bos = tokens.tokenizer.bos_token_id
    begins = bos if ids[:1] == [bos] else None
    return Markers(
        tokens=tokens,
        has_template=True,
        served_stops=served,
        terminator=written,
        answer_start=start,
        user_start=user,
        answer_start_ids=_stable_ids(start, ids, tokens, whole.count(start)),
        user_start_ids=_stable_ids(user, ids, tokens, whole.count(user)),
        think=_think_markers(contract),
        keeps_reasoning=_keeps_reasoning(contract),
        bos=begins,
        own_stop_is_terminator=written is not None and written in served,
        contract=contract,
    )


_TWO_TURNS = [
    {"role": "user", "content": _ASKED},
    {"role": "assistant", "content": _SAID},
    {"role": "user", "content": _NEXT},
    {"role": "assistant", "content": _LAST},
]


def _rendered(contract: PromptContract, messages: Sequence[Mapping[str, Any]]) -> str | None:
    try:
        return contract.renderer.render(messages)
    except UnfaithfulTemplate:
        return None


def _turn_starts(contract: PromptContract) -> tuple[str, str]:
    """What stands before every answer, and before a later user turn."""
    history = _rendered(contract, _TWO_TURNS)
    if history is None:
        return "", ""
    try:
        served = contract.prompt_text(_TWO_TURNS[:1]).partition(_ASKED)[2]
    except UnfaithfulTemplate:
        return "", ""
    before_answer = _between(history, _ASKED, _SAID)
    before_last = _between(history, _NEXT, _LAST)
    start = _common_beginning(served, before_answer, before_last)
    return start.strip(), _between(history, _SAID, _NEXT).strip()


def _common_beginning(*texts: str) -> str:
    length = 0
    for chars in zip(*texts, strict=False):
        if len(set(chars)) > 1:
            break
        length += 1
    return texts[0][:length]


def _between(text: str, left: str, right: str) -> str:
    return text.partition(left)[2].partition(right)[0]


def _written(contract: PromptContract, tokens: Tokens) -> int | None:
    """The token after an answer: a special token, or one that somebody stops on."""
    text = _rendered(contract, _TWO_TURNS[:2])
    tail = (text or "").partition(_SAID)[2]
    for token in tokens.encode([tail])[0] if tail else []:
        if token in tokens.special_ids or token in contract.stop_ids:
            return token
        if tokens.decode([token]).strip():
            return None
    return None


def _stable_ids(text: str, ids: Sequence[int], tokens: Tokens, times: int) -> tuple[int, ...]:
    """Ids of a marker, if they are found in a rendered conversation as often as the text is."""
    if not text:
        return ()
    found = tuple(tokens.encode([text])[0])
    at = [i for i in range(len(ids) - len(found) + 1) if tuple(ids[i : i + len(found)]) == found]
    # Only between tokens that nothing can merge with is a marker the same in every context.
    special = any(token in tokens.special_ids for token in found)
    return found if special and len(at) == times else ()


def _think_markers(contract: PromptContract) -> tuple[str, str]:
    """What the template writes around reasoning that stands in a field of its own."""
    turn = {"role": "assistant", "content": _SAID, "reasoning_content": _THOUGHT}
    text = _rendered(contract, [_TWO_TURNS[0], turn])
    if text is None or _THOUGHT not in text or _SAID not in text:
        return _THINK
    before = _between(text, _ASKED, _THOUGHT).strip()
    after = _between(text, _THOUGHT, _SAID).strip()
    opening = before.rpartition("\n")[2].strip()
    return (opening, after) if opening.startswith("<") and after else _THINK


def _keeps_reasoning(contract: PromptContract) -> bool | None:
    opening, closing = _think_markers(contract)
    inline = {"role": "assistant", "content": f"{opening}\n{_THOUGHT}\n{closing}\n\n{_SAID}"}
    field = {"role": "assistant", "content": _SAID, "reasoning_content": _THOUGHT}
    kept: bool | None = None
    for turn in (field, inline):
        last = _rendered(contract, [_TWO_TURNS[0], turn])
        later = _rendered(contract, [_TWO_TURNS[0], turn, *_TWO_TURNS[2:]])
        if last is None or later is None or _THOUGHT not in last:
            continue
        kept = _THOUGHT in later
        if not kept:
            return False
    return kept


def _own_bos(tokens: Tokens) -> int | None:
    """The id that the tokenizer puts before every text of its own accord."""
    bos = tokens.tokenizer.bos_token_id
    ids = tokens.tokenizer("a", verbose=False)["input_ids"]
    return bos if bos is not None and list(ids[:1]) == [bos] else None
