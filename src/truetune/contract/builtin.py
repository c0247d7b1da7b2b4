"""The templates that ship with truetune, for models that have none.

`instruction-response` is the default for them: it ends an answer on the model's own end token and
needs no new token. `chatml-lite` needs the tokens <|user|>, <|assistant|> and <|end|>, which the
embedded base reserves. `user-assistant-think` writes reasoning between <think> and </think> before
the answer, as plain text or as tokens of the model's own; the prompt does not open the block.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

DEFAULT = "instruction-response"
NAMES = ("instruction-response", "chatml-lite", "user-assistant-think")


def builtin_template(name: str, tokenizer: Any) -> str:
    """Jinja source of a built-in template for this tokenizer.

    A tokenizer that begins every text with a BOS of its own was trained to see one, so the
    template writes it; chat prompts are tokenized without added specials.

    Raises:
        KeyError: an unknown name.
    """
    if name not in NAMES:
        raise KeyError(name)
    source = resources.files("truetune.contract") / "templates" / f"{name}.jinja"
    text = source.read_text(encoding="utf-8")
    first = tokenizer("a")["input_ids"][:1]
    adds_bos = tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]
    return "{{- bos_token -}}\n" + text if adds_bos else text
