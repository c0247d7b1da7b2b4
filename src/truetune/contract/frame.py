"""What is around the turns of a conversation, as the server of a tokenizer would have it.

input   a tokenizer, its chat template (or another one), the ids on which a server stops
does    renders conversations of sentinel words by the contract's own probe, and looks at what
        is before, between and after them
output  Frame: plain ids and texts; empty if the tokenizer has no template
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from truetune.contract.behaviour import (
    Q2,
    A,
    Q,
    R,
    Surroundings,
    answer,
    surroundings,
    user,
)
from truetune.contract.contract import PromptContract
from truetune.contract.stops import answer_stop, closing_stop
from truetune.contract.tokens import Tokens
from truetune.errors import TruetuneError, UnfaithfulTemplate

_THINK = ("<think>", "</think>")


@dataclass(frozen=True)
class Frame:
    """What the served template writes around the turns of a conversation.

    Attributes:
        tokens: the tokenizer seen from the contract.
        has_template: whether the rest was found in a template.
        served_stops: ids on which a server ends an answer.
        terminator: the id that the template writes after an answer; None if it writes none.
        answer_start: the text that is before every answer, in history and in served prompts
            alike, without outer whitespace; "" if it is not known.
        user_start: the same before the second user turn.
        answer_start_ids, user_start_ids: their ids, where they are the same in every context.
        opening_ids: the ids of what is at the beginning of a conversation and nowhere else;
            () if there is nothing of the kind.
        think: the markers around reasoning.
        keeps_reasoning: whether reasoning of an earlier turn is still there in a later prompt;
            None if the template takes none.
        bos: the id that served prompts begin with, doubled or not; None if there is none.
        own_stop_is_terminator: the server stops on what the template writes after an answer, in
            history at least: the model was tuned to it.
        contract: that renders the served template; None if there is no template.
        broken: why the served template cannot be run at all; None if it can.
    """

    tokens: Tokens
    served_stops: frozenset[int]
    has_template: bool = False
    terminator: int | None = None
    answer_start: str = ""
    user_start: str = ""
    answer_start_ids: tuple[int, ...] = ()
    user_start_ids: tuple[int, ...] = ()
    opening_ids: tuple[int, ...] = ()
    think: tuple[str, str] = _THINK
    keeps_reasoning: bool | None = None
    bos: int | None = None
    own_stop_is_terminator: bool = False
    contract: PromptContract | None = None
    broken: UnfaithfulTemplate | None = None

    @property
    def ends(self) -> frozenset[int]:
        """Ids that end an answer for somebody: the server, the template or the tokenizer."""
        eos = self.tokens.tokenizer.eos_token_id
        return self.served_stops | {i for i in (self.terminator, eos) if i is not None}

    @property
    def chat_ids(self) -> list[int]:
        """Ids that the template writes around turns and nothing else does, the answer's end
        included."""
        text = f"{self.answer_start}\n{self.user_start}"
        written = set(self.tokens.encode([text])[0]) if self.has_template else set()
        ends = {self.terminator} if self.terminator is not None else set()
        # What opens a text or ends a document is trained in pretraining already.
        plain = {self.tokens.tokenizer.bos_token_id}
        return sorted((written & self.tokens.special_ids | ends) - plain)

    @classmethod
    def probe(
        cls,
        tokenizer: Any,
        *,
        stop_ids: Sequence[int] | None = None,
        chat_template: str | None = None,
    ) -> Frame:
        """Render the sentinels.

        Args:
            tokenizer: a transformers tokenizer.
            stop_ids: on which a server ends an answer; None takes the tokenizer's end token.
            chat_template: what is served, if it is not the tokenizer's own.
        """
        eos = tokenizer.eos_token_id
        served = frozenset(stop_ids if stop_ids is not None else [] if eos is None else [eos])
        tokens = Tokens(tokenizer)
        contract, broken = _contract(tokenizer, chat_template)
        if contract is None:
            return cls(tokens, served, bos=_own_bos(tokens), broken=broken)
        return _probed(contract, tokens, served)

    @classmethod
    def of_contract(cls, contract: PromptContract) -> Frame:
        """What a contract serves; the think markers are those that it writes itself where it
        does."""
        found = cls.probe(
            contract.tokenizer, stop_ids=contract.stop_ids, chat_template=contract.chat_template
        )
        own = contract.policy.think_markers if contract.policy.reasoning == "inline" else None
        return dataclasses.replace(found, think=own or found.think, contract=contract)


def _contract(
    tokenizer: Any, chat_template: str | None
) -> tuple[PromptContract | None, UnfaithfulTemplate | None]:
    """(the contract, None), or (None, why a template that is there cannot be run)."""
    if chat_template is None and not tokenizer.chat_template:
        return None, None
    try:
        contract = PromptContract.load(tokenizer, chat_template)
        contract.renderer.render([{"role": "user", "content": "?"}], add_generation_prompt=True)
    except UnfaithfulTemplate as error:
        # What it refuses of a conversation of ours it may take of others; what the sandbox refuses
        # of so plain a one, it refuses of all.
        refuses = error.code == "template-refuses" and not error.what.endswith("is unsafe.")
        return (contract, None) if refuses else (None, error)
    return contract, None


def _probed(contract: PromptContract, tokens: Tokens, served: frozenset[int]) -> Frame:
    behaviour = contract.behaviour()
    around: Surroundings = surroundings(contract.renderer, behaviour)
    ids = tokens.encode([around.whole])[0] if around.whole else []
    bos = tokens.tokenizer.bos_token_id
    marks = behaviour.markers
    opening = tuple(tokens.encode([around.opening])[0]) if around.opening else ()
    return Frame(
        tokens=tokens,
        served_stops=served,
        has_template=True,
        terminator=closing_stop(behaviour, tokens, contract.stop_ids),
        answer_start=around.answer_start,
        user_start=around.user_start,
        answer_start_ids=_stable_ids(around.answer_start, ids, tokens, around.whole),
        user_start_ids=_stable_ids(around.user_start, ids, tokens, around.whole),
        opening_ids=opening if tokens.special_ids.intersection(opening) else (),
        think=(marks.open, marks.close) if marks and marks.open.startswith("<") else _THINK,
        keeps_reasoning=around.keeps_reasoning,
        bos=bos if ids[:1] == [bos] else None,
        own_stop_is_terminator=answer_stop(behaviour, tokens, contract.stop_ids) in served,
        contract=contract,
    )


def _stable_ids(text: str, ids: Sequence[int], tokens: Tokens, whole: str) -> tuple[int, ...]:
    """Ids of a marker, if they are found in a rendered conversation as often as the text is."""
    if not text:
        return ()
    found = tuple(tokens.encode([text])[0])
    at = [i for i in range(len(ids) - len(found) + 1) if tuple(ids[i : i + len(found)]) == found]
    # Only between tokens that nothing can merge with is a marker the same in every context.
    special = any(token in tokens.special_ids for token in found)
    return found if special and len(at) == whole.count(text) else ()


def _own_bos(tokens: Tokens) -> int | None:
    """The id that the tokenizer puts before every text automatically."""
    bos = tokens.tokenizer.bos_token_id
    ids = tokens.tokenizer("a", verbose=False)["input_ids"]
    return bos if bos is not None and list(ids[:1]) == [bos] else None


# ------------------------------------------------------------------ where turns can be cut


@dataclass(frozen=True)
class Separators:
    """What a template writes around the texts of turns, under one set of arguments.

    Attributes:
        head: before the first question if there is no system message.
        system: before a system message and between it and the question; None if the template
            takes none.
        question: before a later question, without what ends the answer before it.
        answered: between a question and its answer, in history.
        asked: between an answer and the next question.
        served: after the last question of a served prompt.
    """

    head: str
    system: tuple[str, str] | None
    question: str
    answered: str
    asked: str
    served: str


def separators(
    contract: PromptContract, arguments: Mapping[str, Any], bos: str
) -> Separators | None:
    """The separators of served prompts; None if the sentinels do not come out in their order."""
    system = {"role": "system", "content": R}
    plain, later, opened = (
        as_served(contract, arguments, talk, bos)
        for talk in ([user()], [user(), answer(), user(Q2)], [system, user()])
    )
    if plain is None or later is None or plain.count(Q) != 1:
        return None
    if not (0 <= later.find(Q) < later.find(A) < later.find(Q2)):
        return None
    head, served = plain.split(Q)
    between = later.partition(A)[2].partition(Q2)[0]
    parts = None
    if opened and opened.count(R) == 1 and opened.find(R) < opened.find(Q):
        parts = opened.partition(R)[0], opened.partition(R)[2].partition(Q)[0]
    end = contract.behaviour(arguments).answer_end[0]
    opening = between.removeprefix(end) if end and between.startswith(end) else ""
    if not opening:
        # What a later question has in common with the first one.
        before = parts[1] if parts else head
        opening = os.path.commonprefix([between[::-1], before[::-1]])[::-1]  # noqa: RUF071
    return Separators(head, parts, opening, later.partition(Q)[2].partition(A)[0], between, served)


def as_served(
    contract: PromptContract,
    arguments: Mapping[str, Any],
    messages: Sequence[Mapping[str, Any]],
    bos: str,
) -> str | None:
    """The served prompt as its ids read, begin token off; None if the template refuses."""
    ids = served_ids(contract, arguments, messages)
    return None if ids is None else contract.tokens.decode(ids).removeprefix(bos)


def served_ids(
    contract: PromptContract, arguments: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]
) -> list[int] | None:
    """The ids of a served prompt; None if the template refuses."""
    try:
        text = contract.prompt_text(messages, None, arguments or None)
    except TruetuneError:
        return None
    return list(contract.tokens.encode([text])[0])
