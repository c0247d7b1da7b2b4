"""Control tokens inside the text of rows.

input   conversations, a contract
does    finds the tokens that the template builds prompts of, written out in a message's text
output  the rows' positions, and one finding a row: which token, in which field

A tokenizer turns `<|im_end|>` in a user's message into the control token, in training as on a
server: the message ends there and whatever follows speaks in a role of its own choice. transformers
can make such text harmless (`sanitize_control_tokens`), but does not by default.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from truetune.data.conversation import Conversation
from truetune.findings import Finding

if TYPE_CHECKING:
    from truetune.contract.contract import PromptContract


def control_tokens(contract: PromptContract) -> tuple[str, ...]:
    """Texts of the tokens that carry the structure of prompts, longest first.

    They are the tokenizer's special tokens, the stop set, and the added tokens that stand in a
    rendered conversation; markers around reasoning are none, because rows may hold them.
    """
    tokens, seen = contract.tokens, contract.behaviour()
    rendered = "".join([seen.user_end, *seen.answer_end, *seen.call_end, seen.call_between])
    with contextlib.suppress(ValueError):
        rendered += contract.prompt_text([{"role": "user", "content": "?"}])
    added = getattr(contract.tokenizer, "added_tokens_decoder", {})
    ids = {*contract.stop_ids, *contract.tokenizer.all_special_ids}
    ids |= {token for token, entry in added.items() if entry.special}
    ids |= {token for token in tokens.encode([rendered])[0] if token in tokens.special_ids}
    thinking = {marker for pair in seen.pairs for marker in pair}
    texts = {tokens.decode([token]) for token in ids} - thinking
    # A token that its own text does not lead to does no harm there.
    real = (t for t in texts if len(t.strip()) > 1 and tokens.single_id(t) is not None)
    return tuple(sorted(real, key=len, reverse=True))


@dataclass(frozen=True)
class Control:
    """A control token in the text of a row."""

    token: str
    field: str
    role: str


def first_controls(
    texts: Sequence[str], conversations: Iterable[Conversation]
) -> dict[int, Control]:
    """The first of these texts in each row that holds one, by the row's position."""
    if not texts:
        return {}
    pattern = re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))
    return {
        position: Control(hit.group(), field, role)
        for position, conversation in enumerate(conversations)
        for field, role, hit in _first(pattern, conversation)
    }


def _first(
    pattern: re.Pattern[str], conversation: Conversation
) -> Iterator[tuple[str, str, re.Match[str]]]:
    """(field, role, hit) of the first one in a row."""
    for field, role, text in _said(conversation):
        if hit := pattern.search(text):
            yield field, role, hit
            return


def _said(conversation: Conversation) -> Iterator[tuple[str, str, str]]:
    """(field, role, text) of everything that is said."""
    if conversation.text is not None:
        yield "text", "", conversation.text
    for index, message in enumerate(conversation.messages):
        for name in ("content", "reasoning_content"):
            if text := message.get(name):
                yield f"messages[{index}].{name}", str(message.get("role", "")), text


def find_controls(
    contract: PromptContract, conversations: Sequence[Conversation], *, refuse: bool
) -> dict[int, Finding]:
    """A finding for each row that holds a control token in a message's text, by its position.

    Args:
        refuse: whether such a row is an error, to be mended or dropped.
    """
    chats = [
        conversation if conversation.text is None else _SILENT for conversation in conversations
    ]
    found = first_controls(control_tokens(contract), chats)
    return {at: _finding(conversations[at], control, refuse) for at, control in found.items()}


# In plain text a control token is what its author wrote for the model.
_SILENT = Conversation((), where="")


def _finding(conversation: Conversation, control: Control, refuse: bool) -> Finding:
    return Finding(
        code="control-token-in-content",
        level="error" if refuse else "warning",
        what=f"the text of a {control.role} turn holds the control token {control.token!r}",
        where=f"{conversation.where}, {control.field}",
        why="the tokenizer turns it into the token itself, in training and on servers that do "
        "not sanitise text: the turn ends, or the speaker changes, there",
        fix="remove it from the row"
        if refuse
        else "remove it from the rows, or refuse such rows with --content-specials error",
    )
