"""What the encoding of a row may remark: a note for each word of `Encoded.remarks`."""

from __future__ import annotations

from truetune.findings import Finding

REMARKS = {
    "stripped": Finding(
        code="answer-stripped",
        level="note",
        what="the template strips whitespace around answers",
        why="the model is trained on the answer as the template writes it",
    ),
    "respaced": Finding(
        code="answer-respaced",
        level="note",
        what="the whitespace that the template writes around answers differs from that of the rows",
        why="the model is trained on the answer as the template writes it",
    ),
    "normalised": Finding(
        code="answer-normalised",
        level="note",
        what="the tokenizer's normaliser changes characters in answers",
        why="the model cannot write text that its tokenizer cannot represent",
    ),
    "framed": Finding(
        code="answer-framed",
        level="note",
        what="the template adds its own markers around answers; the model learns to write them",
        why="some chat formats name a channel or a recipient before the answer",
    ),
    "stop-appended": Finding(
        code="answer-stop-appended",
        level="note",
        what="the template writes nothing at the end of answers; the model's own end token is "
        "appended",
        why="without a stop token a served answer would never end",
    ),
    "reasoning-empty": Finding(
        code="answer-reasoning-empty",
        level="note",
        what="the think block that the prompt opens is closed immediately, because of "
        "--reasoning empty",
        why="the model learns not to think",
    ),
    "thinking-unlearned": Finding(
        code="answer-thinking-unlearned",
        level="note",
        what="the model is trained on answers without reasoning where the template lets it think",
        why="the model will learn not to think there",
    ),
    "prompt-realigned": Finding(
        code="answer-prompt-realigned",
        level="note",
        what=(
            "the template renders earlier turns of a complete conversation differently from the "
            "prompts that a server sends; training uses those prompts"
        ),
        why="a server sends only the prompt",
    ),
    "reordered": Finding(
        code="answer-reordered",
        level="note",
        what="the template reorders the arguments of tool calls",
        why="the call is the same; the model learns the template's order",
    ),
    "arguments-as-text": Finding(
        code="answer-arguments-as-text",
        level="note",
        what="the template writes the arguments of tool calls as JSON text inside JSON",
        why="a server whose parser expects an object there returns them as text",
    ),
    "template-words": Finding(
        code="answer-template-words",
        level="note",
        what="the template adds words to answers, and the model is trained on them "
        "because of --template-words keep",
        why="the rows do not contain them, but the model learns to write them",
    ),
    "history-parsed": Finding(
        code="answer-history-parsed",
        level="note",
        what=(
            "later prompts are rendered for a client that sends reasoning_content back; if the "
            "server has no reasoning parser, they will contain the reasoning in another form"
        ),
        why="the template renders reasoning in its own field differently from reasoning inside "
        "the content",
    ),
    "seam": Finding(
        code="answer-seam",
        level="note",
        what="the end of the prompt and the beginning of the answer would have merged into one "
        "token; they are tokenized separately",
        why="a server sends the prompt alone, so the answer starts with a token of its own",
    ),
}
