"""Judge a server's replies by those of the trained model, and name what the server does to them.

input   the rows, the trained model's greedy replies and the server's answers to the same rows
does    puts together what parsers of the server took apart; counts known answers, paired; looks for
        stop tokens as text, empty replies, a limit of length, another case or other whitespace
output  Replies, findings
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from truetune.contract.contract import PromptContract
from truetune.diagnosis.measured import Replies, rates
from truetune.findings import Finding, visible
from truetune.servers.cases import Case
from truetune.servers.chat import Answer

# Letters that a format may put around a part of a reply: <think>, </tool_call>.
_MARK = 24
# Rows that are asked twice where replies differ, to see whether the server samples.
AGAIN = 3


@dataclass(frozen=True)
class Said:
    """What a server replied.

    Attributes:
        replies: with reasoning and calls where the trained model's replies hold them.
        same: which are the trained model's, except for outer whitespace.
        findings: what differs.
    """

    replies: Replies
    same: tuple[bool, ...]
    findings: tuple[Finding, ...]


def judge(
    url: str,
    contract: PromptContract,
    cases: Sequence[Case],
    own: Replies,
    answers: Sequence[Answer],
    again: Callable[[Case], str],
) -> Said:
    """Compare a server's answers with the trained model's replies.

    Args:
        url: of the server.
        again: the server's reply to the same row, asked once more.
    """
    texts = tuple(map(_whole, own.texts, answers))
    replies = Replies(
        tuple(tuple(ids) for ids in contract.tokens.encode(texts)),
        tuple(answer.ended for answer in answers),
        texts,
    )
    same = tuple(a.strip() == b.strip() for a, b in zip(own.texts, texts, strict=True))
    wrong = _Wrong(url, contract, own, texts, answers, _fallen(own, replies, cases))
    findings = wrong.findings(cases, same, again)
    return Said(replies, same, tuple(findings))


def _whole(own: str, answer: Answer) -> str:
    """The text of an answer; the trained model's own reply where the answer holds the same, taken
    apart by the server's parsers into reasoning, text and calls."""
    named = [str((call.get("function") or {}).get("name") or "") for call in answer.calls]
    if named and all(name and name in own for name in named):
        return own
    reasoning, text = answer.reasoning.strip(), answer.text.strip()
    if not (reasoning and text) or reasoning not in own:
        return answer.text
    before, _, rest = own.partition(reasoning)
    between, found, behind = rest.partition(text)
    marks = (before.strip(), between.strip(), behind.strip())
    return own if found and all(len(mark) <= _MARK for mark in marks) else answer.text


def _fallen(own: Replies, replies: Replies, cases: Sequence[Case]) -> str:
    """By how much known answers are right less often, "" if the intervals overlap."""
    before, now = (rates(found, cases).get("match") for found in (own, replies))
    if not before or not now or before["low"] <= now["high"]:
        return ""
    return "the share of known answers that are right falls from {} to {}".format(
        *(
            f"{100 * m['share']:.0f} % ({100 * m['low']:.0f} to {100 * m['high']:.0f})"
            for m in (before, now)
        )
    )


def _folded(text: str) -> str:
    return "".join(text.split())


@dataclass(frozen=True)
class _Wrong:
    url: str
    contract: PromptContract
    own: Replies
    texts: Sequence[str]
    answers: Sequence[Answer]
    fallen: str

    def findings(
        self, cases: Sequence[Case], same: Sequence[bool], again: Callable[[Case], str]
    ) -> list[Finding]:
        """The finding of the first cause that explains most of the replies."""
        number = len(cases)
        pairs = list(zip(self.own.texts, self.texts, strict=True))
        empty = [i for i, (a, b) in enumerate(pairs) if a.strip() and not b.strip()]
        if 2 * len(empty) > number:
            taken = sum(bool(self.answers[i].reasoning.strip()) for i in empty)
            return [
                self._parts(
                    f"{len(empty)} of {number} replies are empty",
                    "the server's reasoning parser removes them: their text is in reasoning_content"
                    if 2 * taken > len(empty)
                    else "a reasoning or tool parser of the server removes them, or the server "
                    "stops at their first token",
                    "start the server without a reasoning or tool parser that the model's replies "
                    "do not fit",
                )
            ]
        ending, times = self._ending(pairs)
        if 2 * times > number:
            return [self._ends_with(ending, times)]
        unended = [i for i, on in enumerate(self.own.stopped) if on and not self.answers[i].ended]
        if 2 * len(unended) > sum(self.own.stopped):
            cut = [
                i
                for i in unended
                if self.texts[i].strip()
                and pairs[i][0].strip().startswith(pairs[i][1].strip())
                and not same[i]
            ]
            if 2 * len(cut) > len(unended):
                most = max(self.answers[i].tokens for i in cut)
                tokens = f" of {most} tokens" if most else ""
                return [
                    self._parts(
                        f"{len(cut)} of {number} replies are cut off",
                        f"the server has a limit{tokens} for new tokens: each is the beginning of "
                        "the trained model's reply, and more tokens were requested",
                        "raise the server's limit for new tokens, or its context",
                    )
                ]
            return [
                self._parts(
                    f"{len(unended)} of {sum(self.own.stopped)} replies that ended by themselves "
                    "no longer end",
                    "the server's stop tokens or prompts are not those of training",
                    "start it with the generation_config.json and the chat template that were "
                    "saved",
                )
            ]
        if 2 * sum(same) >= number and not self.fallen:
            return []
        return [self._other(cases, same, again, pairs)]

    def _other(
        self,
        cases: Sequence[Case],
        same: Sequence[bool],
        again: Callable[[Case], str],
        pairs: Sequence[tuple[str, str]],
    ) -> Finding:
        """Replies whose texts differ."""
        what = (
            f"{len(same) - sum(same)} of {len(same)} greedy replies differ from those of the "
            f"trained model"
        )
        fix = "check the server's settings, and any proxy between it and its clients"
        if all(" ".join(a.split()) == " ".join(b.split()) for a, b in pairs) or all(
            _folded(a) == _folded(b) for a, b in pairs
        ):
            why, certain = "the server changes whitespace: nothing else differs", False
        elif all(_folded(a).casefold() == _folded(b).casefold() for a, b in pairs):
            why, certain = "the server changes upper and lower case: nothing else differs", True
        else:
            certain = False
            first = [i for i, equal in enumerate(same) if not equal][:AGAIN]
            if any(again(cases[i]) != self.answers[i].text for i in first):
                why = (
                    "the server samples although greedy replies were requested: asked twice, it "
                    "gives two replies"
                )
                fix = "start it without a sampling temperature of its own"
            else:
                why = (
                    "the server uses other weights or fewer bits, renders other prompts, or "
                    "changes replies"
                )
                fix = (
                    "compare its files with the run: truetune diagnose RUN --gguf FILE or "
                    "--merged DIR"
                )
        if self.fallen or certain:
            return self._parts(what, why, fix)
        return Finding(
            "replies-differ", "warning", f"url: {what}", where=self.url, why=why, fix=fix
        )

    def _ending(self, pairs: Sequence[tuple[str, str]]) -> tuple[str, int]:
        """The text that most replies that ended have behind them, and how many: a stop token, or
        what stands behind the trained model's own reply."""
        found = self.contract.tokenizer.convert_ids_to_tokens(list(self.contract.stop_ids))
        stops = [text for text in map(str, found) if text.strip()]
        seen: Counter[str] = Counter()
        for (own, text), answer in zip(pairs, self.answers, strict=True):
            one, other = own.strip(), text.strip()
            more = other[len(one) :].strip() if one and other.startswith(one) else ""
            ends = [s for s in stops if other.endswith(s) and not one.endswith(s)]
            if answer.ended and (ends or more):
                seen[ends[0] if ends else more] += 1
        return seen.most_common(1)[0] if seen else ("", 0)

    def _ends_with(self, ending: str, times: int) -> Finding:
        shown = visible(ending[:_MARK], keep_newlines=False)
        what = f"{times} of {len(self.texts)} replies end with the text {shown}"
        tokens = self.contract.tokens
        if tokens.single_id(ending) in {*self.contract.stop_ids, *tokens.special_ids}:
            why = (
                "the server returns the stop token as text: skip_special_tokens is off, or it "
                "does not treat the token as a special one"
            )
            fix = (
                "leave skip_special_tokens on (special tokens are not printed), and start the "
                "server with the tokenizer files that were saved"
            )
        else:
            why = (
                "the server, or a proxy in front of it, adds this text to the model's reply, for "
                "example the stop token of another model's template"
            )
            fix = (
                "start the server with the chat template that was saved, and without text of its "
                "own"
            )
        return self._parts(what, why, fix)

    def _parts(self, what: str, why: str, fix: str) -> Finding:
        fallen = f"; {self.fallen}" if self.fallen else ""
        return Finding(
            "stage-parts", "error", f"url: {what}{fallen}", where=self.url, why=why, fix=fix
        )
