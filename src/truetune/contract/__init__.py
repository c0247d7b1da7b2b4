"""Template, tokenizer, stop set and template arguments as one value; token examples and proof."""

from truetune.contract.chat_template import ChatTemplate
from truetune.contract.contract import PromptContract, Refused
from truetune.contract.encode import LOSS_ON, Encoded, LossOn
from truetune.contract.example import SFTExample
from truetune.contract.policy import Policy
from truetune.contract.specials import control_tokens, find_controls

__all__ = [
    "LOSS_ON",
    "ChatTemplate",
    "Encoded",
    "LossOn",
    "Policy",
    "PromptContract",
    "Refused",
    "SFTExample",
    "control_tokens",
    "find_controls",
]
