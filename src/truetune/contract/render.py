"""Messages to text: a chat template with its arguments, rendered as an inference server renders it.

Rendering goes through transformers' own sandbox and preparation of messages, because that is what
servers built on it run; there is no second way of making prompt text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from truetune.errors import UnfaithfulTemplate

# What transformers or a server gives every template; anything else a template reads is an argument.
PROVIDED = frozenset(
    """messages tools documents add_generation_prompt continue_final_message bos_token eos_token
    pad_token unk_token sep_token cls_token mask_token additional_special_tokens raise_exception
    strftime_now namespace range dict lipsum cycler joiner loop true false none True False None
    image_token video_token audio_token add_vision_id""".split()  # noqa: SIM905
)


class Renderer:
    """A template source bound to a tokenizer's special tokens and the run's arguments.

    Args:
        source: Jinja source.
        special_tokens: names to texts, as `tokenizer.special_tokens_map` gives them.
        arguments: template arguments of the run.
    """

    def __init__(
        self, source: str, special_tokens: Mapping[str, Any], arguments: Mapping[str, Any]
    ) -> None:
        self.source = source
        self.special_tokens = dict(special_tokens)
        self.arguments = dict(arguments)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation.

        Raises:
            UnfaithfulTemplate: the template refuses these messages, or fails on them.
        """
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        # transformers deletes fields that are None before rendering.
        chat = [{k: v for k, v in message.items() if v is not None} for message in messages]
        try:
            texts, _ = render_jinja_template(
                conversations=[chat],
                tools=list(tools) if tools else None,
                chat_template=self.source,
                add_generation_prompt=add_generation_prompt,
                **{**self.special_tokens, **self.arguments, **(arguments or {})},
            )
        except jinja2.TemplateSyntaxError as error:
            raise UnfaithfulTemplate(
                f"the chat template is not valid Jinja: {error.message}",
                where=f"template line {error.lineno}",
                fix="give another one with --chat-template FILE",
            ) from error
        except Exception as error:  # a template is somebody's program: it fails in its own ways
            raise UnfaithfulTemplate(
                f"the chat template refuses this conversation: {error}",
                why="templates may demand certain roles, their order, or fields",
                fix="change the row, or give another template with --chat-template",
            ) from error
        return texts[0]

    def require_valid(self) -> None:
        """Compile the template; what it makes of messages does not matter here.

        Raises:
            UnfaithfulTemplate: it is not valid Jinja.
        """
        import jinja2

        try:
            self.render([{"role": "user", "content": "?"}])
        except UnfaithfulTemplate as error:
            if isinstance(error.__cause__, jinja2.TemplateSyntaxError):
                raise

    def variables(self) -> list[str]:
        """Names that the template reads and nobody provides: its arguments, sorted."""
        import jinja2
        import jinja2.ext
        import jinja2.meta

        class Ignored(jinja2.ext.Extension):
            """`{% generation %}` marks a span for trainers; it is like any block here."""

            tags = {"generation"}  # noqa: RUF012

            def parse(self, parser: Any) -> Any:
                line = next(parser.stream).lineno
                body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
                return jinja2.nodes.Scope(body, lineno=line)

        environment = jinja2.Environment(extensions=[Ignored, "jinja2.ext.loopcontrols"])
        try:
            tree = environment.parse(self.source)
        except jinja2.TemplateSyntaxError:
            return []
        return sorted(jinja2.meta.find_undeclared_variables(tree) - PROVIDED)
