"""Parse a request of OpenAI's chat protocol. Parameters that would change the reply are refused if
they are not supported, never ignored."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from truetune.errors import TruetuneError, UsageError
from truetune.findings import near, visible
from truetune.model.draw import Sampling

Messages: TypeAlias = Sequence[Mapping[str, Any]]

# New tokens if a request does not limit them.
TOKENS = 1024
# As OpenAI allows.
_MOST_STOPS = 4
_ROLES = ("system", "developer", "user", "assistant", "tool")


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Parameters that are served.
_SERVED = _names(
    "messages model max_tokens max_completion_tokens temperature top_p top_k repetition_penalty "
    "seed stop stream stream_options tools tool_choice chat_template_kwargs"
)
# Parameters that do not change the reply.
_HARMLESS = _names(
    "user metadata store parallel_tool_calls service_tier safety_identifier prediction "
    "prompt_cache_key prompt_cache_options prompt_cache_retention"
)
# Parameters that would change it, and the values with which they do not; null never does.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "min_p": (0,),
    "repeat_penalty": (1,),
    "functions": ([],),
    "function_call": ("auto", "none"),
    "modalities": (["text"],),
    "audio": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}
# What llama.cpp's server knows beside them.
LLAMA_CPP = _names(
    "logprobs top_logprobs logit_bias response_format frequency_penalty presence_penalty min_p "
    "repeat_penalty repeat_last_n n_predict n_probs min_keep n_keep n_discard n_indent typical_p "
    "top_n_sigma xtc_probability xtc_threshold dynatemp_range dynatemp_exponent dry_multiplier "
    "dry_base dry_allowed_length dry_penalty_last_n dry_sequence_breakers mirostat mirostat_tau "
    "mirostat_eta adaptive_target adaptive_decay samplers ignore_eos grammar json_schema "
    "cache_prompt id_slot t_max_predict_ms timings_per_token return_tokens return_progress "
    "post_sampling_probs reasoning_format reasoning_effort reasoning_budget_tokens"
)


class Refused(Exception):
    """A request that is not answered, as the protocol reports it.

    Attributes:
        status: of HTTP.
        param: the parameter at fault, "" for none.
        code: OpenAI's, "" for none.
    """

    def __init__(self, message: str, *, status: int = 400, param: str = "", code: str = "") -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        details = {"message": str(self), "type": kind, "param": self.param or None}
        return {"error": {**details, "code": self.code or None}}


def no_such_path(method: str, path: str) -> Refused:
    return Refused(
        f"there is nothing at {method} {visible(path[:200], keep_newlines=False)}: this server has "
        "POST /v1/chat/completions, GET /v1/models and GET /health",
        status=404,
        code="unknown_url",
    )


def no_such_model(name: str, names: Sequence[str]) -> Refused:
    return Refused(
        f"the model {_shown(name)} does not exist here: this server serves {_shown(names[0])}",
        status=404,
        param="model",
        code="model_not_found",
    )


@dataclass(frozen=True)
class ChatRequest:
    """What a chat request asks for.

    Attributes:
        messages: content as one text each.
        tools: None for none.
        arguments: of the template.
        sampling: with a fresh seed if the request has none.
        stops: texts that end the reply.
        stream, with_usage: as events, and with a last one that counts tokens.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    arguments: Mapping[str, Any]
    sampling: Sampling
    stops: tuple[str, ...]
    stream: bool
    with_usage: bool


def read_chat(
    asked: Mapping[str, Any], names: Sequence[str], more: frozenset[str] = frozenset()
) -> ChatRequest:
    """Read a request.

    Args:
        names: under which the model is served, the listed one first.
        more: parameters that this server knows beside the usual ones.

    Raises:
        Refused: something of it cannot be served.
    """
    _require_model(asked.get("model"), names)
    messages, tools, arguments = read_messages(asked)
    _require_known(asked, more)
    _require_tool_choice(asked, tools, more)
    options = asked.get("stream_options") or {}
    if not isinstance(options, dict):
        raise _wrong("stream_options", options, "an object")
    return ChatRequest(
        messages,
        tools,
        arguments,
        _sampling(asked),
        _stops(asked.get("stop")),
        _flag(asked, "stream"),
        bool(options.get("include_usage")),
    )


def read_messages(
    asked: Mapping[str, Any],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None, Mapping[str, Any]]:
    """Messages, tools and template arguments of a request.

    Raises:
        Refused: they are not what the protocol defines.
    """
    messages = asked.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused("messages must be a list with at least one message", param="messages")
    tools = asked.get("tools") or None
    if tools is not None and not _are_objects(tools):
        raise _wrong("tools", tools, "a list of objects")
    arguments = asked.get("chat_template_kwargs") or {}
    if not isinstance(arguments, dict):
        raise _wrong("chat_template_kwargs", arguments, "an object")
    return [_message(message, i) for i, message in enumerate(messages)], tools, arguments


def lost(
    render: Callable[[Messages, Any], str], messages: Messages, tools: Any
) -> dict[str, tuple[int, ...]]:
    """What of a conversation does not reach the prompt, with the messages concerned: `tools`,
    `tool_calls`, or a role. Users and assistants are taken to reach it.

    Args:
        render: makes the prompt of messages and tools.

    Raises:
        TruetuneError: the conversation has no prompt.
    """
    calls = tuple(i for i, message in enumerate(messages) if message.get("tool_calls"))
    places: dict[str, list[int]] = {}
    for i, message in enumerate(messages):
        if message.get("content") and message["role"] not in ("user", "assistant"):
            places.setdefault(message["role"], []).append(i)
    if not (tools or calls or places):
        return {}
    whole = render(messages, tools)

    def is_lost(changed: Messages, its: Any) -> bool:
        try:
            return render(changed, its) == whole
        except TruetuneError:
            return False

    found: dict[str, tuple[int, ...]] = {}
    if tools and is_lost(messages, None):
        found["tools"] = ()
    if calls and is_lost([_other_calls(message) for message in messages], tools):
        found["tool_calls"] = calls
    for role, its in places.items():
        changed = [
            {**message, "content": f"{message['content']}x"} if i in its else message
            for i, message in enumerate(messages)
        ]
        if is_lost(changed, tools):
            found[role] = tuple(its)
    return found


def require_rendered(
    render: Callable[[Messages, Any], str], messages: Messages, tools: Any
) -> None:
    """Refuse what the model would not see.

    Raises:
        Refused: something of the request does not reach the prompt.
        TruetuneError: as `lost`.
    """
    for what, places in lost(render, messages, tools).items():
        subject = what if what in ("tools", "tool_calls") else f"messages with the role {what}"
        raise Refused(
            f"the model's chat template does not render {visible(subject, keep_newlines=False)}, "
            "so the model would not see them: leave them out, or write them into a user message",
            param=f"messages[{places[0]}]" if places else what,
        )


def _other_calls(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message whose calls have other names."""
    made = []
    for call in message.get("tool_calls") or ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            call = {**call, "function": {**function, "name": f"{function.get('name')}x"}}
        made.append(call)
    return {**message, "tool_calls": made} if made else message


def _message(message: Any, index: int) -> dict[str, Any]:
    """A message with its content as one text."""
    place = f"messages[{index}]"
    if not isinstance(message, dict):
        raise _wrong(place, message, "an object with role and content", param="messages")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        one_of = ", ".join(_ROLES)
        raise Refused(f"{place} needs a role, one of {one_of}", param=f"{place}.role")
    param = f"{place}.content"
    if isinstance(content, list):
        if not all(isinstance(p, dict) and p.get("type") == "text" for p in content):
            raise Refused(f"{place} contains parts that are not text, which this server does not "
                          "support", param=param)  # fmt: skip
        if not all(isinstance(part.get("text"), str) for part in content):
            raise Refused(f"{place} contains a part whose text is missing", param=param)
        content = "".join(part["text"] for part in content) if content else None
    if content is None:
        # Calls and reasoning may stand alone.
        if role != "assistant" or not (
            message.get("tool_calls") or message.get("reasoning_content")
        ):
            raise Refused(
                f"{place} ({visible(role[:40], keep_newlines=False)}) has no content: give it text",
                param=param,
            )
        content = ""
    if not isinstance(content, str):
        raise _wrong(param, content, "a string or a list of parts", param=param)
    return {**message, "content": content}


def _require_model(model: Any, names: Sequence[str]) -> None:
    """Clients for one model send none, or an empty one."""
    if model is None or model == "":
        return
    if not isinstance(model, str):
        raise _wrong("model", model, "a string")
    if model not in names:
        raise no_such_model(model, names)


def _require_known(asked: Mapping[str, Any], more: Iterable[str]) -> None:
    """Refuse parameters that would be ignored although they change the reply."""
    known = {*_SERVED, *_HARMLESS, *more}
    for name, value in asked.items():
        if name in known or value is None:
            continue
        if name not in _WITHOUT_EFFECT:
            meant = near(name, sorted(known))
            raise Refused(
                f"{visible(name[:80], keep_newlines=False)} is not a parameter of this server"
                + (f"; did you mean {meant[0]}?" if meant else ""),
                param=name,
                code="unknown_parameter",
            )
        if value not in _WITHOUT_EFFECT[name]:
            raise Refused(
                f"{name} is not supported by this server: leave it out",
                param=name,
                code="unsupported_parameter",
            )


def _require_tool_choice(asked: Mapping[str, Any], tools: Any, more: frozenset[str]) -> None:
    choice = asked.get("tool_choice")
    # llama.cpp makes the model keep to it.
    if choice in (None, "auto") or (choice == "none" and not tools) or more:
        return
    raise Refused(
        'tool_choice is not supported by this server unless it is "auto": the model decides',
        param="tool_choice",
        code="unsupported_parameter",
    )


def _sampling(asked: Mapping[str, Any]) -> Sampling:
    limit = TOKENS
    for name in ("max_tokens", "max_completion_tokens"):
        if asked.get(name) is not None:
            limit = _whole(asked, name)
            if limit < 1:
                raise Refused(f"{name} is {limit}, but must be at least 1", param=name)
    # -1 asks llama.cpp and vLLM for a fresh one too.
    seed = None if asked.get("seed") is None else _whole(asked, "seed")
    try:
        return Sampling(
            max_new_tokens=limit,
            temperature=_number(asked, "temperature", 0.0),
            top_p=_number(asked, "top_p", 1.0),
            top_k=max(_whole(asked, "top_k"), 0),
            repetition_penalty=_number(asked, "repetition_penalty", 1.0),
            seed=secrets.randbits(31) if seed is None or seed == -1 else seed,
        )
    except UsageError as error:
        raise Refused(error.what.removeprefix("sampling: ")) from None


def _number(asked: Mapping[str, Any], name: str, default: float) -> float:
    value = asked.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(name, value, "a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _wrong(name, value, "a finite number")
    return number


def _whole(asked: Mapping[str, Any], name: str) -> int:
    number = _number(asked, name, 0)
    if number != int(number):
        raise _wrong(name, asked[name], "a whole number")
    # Not by way of a float, which has 53 bits.
    return int(asked.get(name) or 0)


def _flag(asked: Mapping[str, Any], name: str) -> bool:
    value = asked.get(name)
    if not isinstance(value, bool | None):
        raise _wrong(name, value, "true or false")
    return bool(value)


def _stops(stop: Any) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(stops, list) or not all(isinstance(text, str) for text in stops):
        raise _wrong("stop", stop, "a string or a list of strings")
    if len(stops) > _MOST_STOPS:
        raise Refused(
            f"stop has {len(stops)} strings, at most {_MOST_STOPS} are allowed", param="stop"
        )
    return tuple(text for text in stops if text)


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _wrong(name: str, value: Any, wanted: str, *, param: str = "") -> Refused:
    return Refused(f"{name} is {_shown(value)}, but must be {wanted}", param=param or name)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return visible(text if len(text) <= 80 else text[:80] + "\u2026", keep_newlines=False)
