"""truetune: supervised fine-tuning where what is trained is what is served.

Names are loaded on first use, so that importing the package costs nothing.
"""

import importlib

# Not from typing: `python -m truetune` executes this file while the working folder still stands
# before Python's own modules (see __main__.py), of which only some are loaded by then.
TYPE_CHECKING = False

__version__ = "0.1.0"

_HOMES = {
    "ChatTemplate": "truetune.contract.chat_template",
    "SFTExample": "truetune.contract.example",
    "PromptContract": "truetune.contract.contract",
    "Encoded": "truetune.contract.contract",
    "pad_and_collate": "truetune.compute.batch",
    "masked_cross_entropy": "truetune.compute.loss",
    "SFTTrainer": "truetune.engine.trainer",
    "audit": "truetune.auditing.audit",
    "HealthCallback": "truetune.auditing.health",
    "train": "truetune.facade",
    "check": "truetune.facade",
    "chat": "truetune.facade",
    "verify": "truetune.facade",
    "diagnose": "truetune.facade",
    "serve": "truetune.facade",
    "export": "truetune.facade",
    "inspect": "truetune.facade",
    "evaluate": "truetune.facade",
    "evaluate_tasks": "truetune.facade",
    "report": "truetune.facade",
    "watch": "truetune.facade",
    "push": "truetune.facade",
    "Finding": "truetune.findings",
    "TruetuneError": "truetune.errors",
    "UnfaithfulTemplate": "truetune.errors",
}

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from truetune.auditing.audit import audit as audit
    from truetune.auditing.health import HealthCallback as HealthCallback
    from truetune.compute.batch import pad_and_collate as pad_and_collate
    from truetune.compute.loss import masked_cross_entropy as masked_cross_entropy
    from truetune.contract.chat_template import ChatTemplate as ChatTemplate
    from truetune.contract.contract import Encoded as Encoded
    from truetune.contract.contract import PromptContract as PromptContract
    from truetune.contract.example import SFTExample as SFTExample
    from truetune.engine.trainer import SFTTrainer as SFTTrainer
    from truetune.errors import TruetuneError as TruetuneError
    from truetune.errors import UnfaithfulTemplate as UnfaithfulTemplate
    from truetune.facade import chat as chat
    from truetune.facade import check as check
    from truetune.facade import diagnose as diagnose
    from truetune.facade import evaluate as evaluate
    from truetune.facade import evaluate_tasks as evaluate_tasks
    from truetune.facade import export as export
    from truetune.facade import inspect as inspect
    from truetune.facade import push as push
    from truetune.facade import report as report
    from truetune.facade import serve as serve
    from truetune.facade import train as train
    from truetune.facade import verify as verify
    from truetune.facade import watch as watch
    from truetune.findings import Finding as Finding


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'truetune' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
