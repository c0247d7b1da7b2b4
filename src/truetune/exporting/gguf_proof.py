"""Verify a GGUF file: llama.cpp must produce the same prompts, ids and predictions with it as
transformers with the model.

input   a file, the model it was written from, its contract, conversations
does    serves the file by llama.cpp in a child process; compares ids of texts in twenty scripts,
        prompts as text and as ids, the tokens that end a reply, and log-probabilities
output  Proof; a file that fails it does not get its name
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from truetune.compare import Probe, Reading, divergence, read
from truetune.contract.contract import PromptContract
from truetune.data.conversation import Conversation
from truetune.exporting.gguf_ids import Compared, compare_ids, texts_of
from truetune.findings import Finding, visible
from truetune.model.load import LoadedModel
from truetune.servers.cases import Case, cases_of, compare_prompts, long_probe, read_server
from truetune.servers.llama_cpp import LlamaCpp, serving


@dataclass(frozen=True)
class Budget:
    """How far llama.cpp may differ from transformers in float32 if nothing is wrong.

    Attributes:
        usual: in units of the logits' spread (`Apart.relative`): about three times what the type
            costs the embedded base. More is a warning: the model does not tolerate so few bits.
        most: twice what it costs the sharpest of the random models that were tried. More is an
            error.
    """

    usual: float
    most: float


# What the types cost is measured in docs/serving.md.
BUDGETS = {
    "f32": Budget(5e-5, 5e-5),
    "f16": Budget(2e-3, 5e-3),
    "bf16": Budget(2e-2, 5e-2),
    "q8_0": Budget(4e-2, 0.1),
    "q6_k": Budget(0.1, 0.3),
    "q5_k_m": Budget(0.2, 0.6),
    "q5_k_s": Budget(0.2, 0.6),
    "q5_1": Budget(0.2, 0.6),
    "q5_0": Budget(0.2, 0.6),
    "q4_k_m": Budget(0.3, 1.2),
    "q4_k_s": Budget(0.3, 1.2),
    "q4_1": Budget(0.3, 1.2),
    "q4_0": Budget(0.3, 1.2),
}
# llama.cpp looks up GELU in a table of half-precision numbers.
_GELU = Budget(2e-3, 2e-3)


def budget_of(quant: str, config: Any) -> Budget:
    """The budget of a type for one model."""
    names = ("hidden_activation", "hidden_act")
    activation = next((str(v) for n in names if (v := getattr(config, n, None))), "")
    return _GELU if quant == "f32" and "gelu" in activation else BUDGETS[quant]


@dataclass(frozen=True)
class Apart:
    """How far a reading from llama.cpp is from the model's.

    Attributes:
        mean, largest: divergence in nats.
        relative: what differences of log-probability are in units of the spread of the model's
            logits, as a root mean square: the same for a sharp model and a flat one.
        logprob: largest difference of log-probability among the likeliest tokens.
        greedy: share of the positions with the same likeliest token.
        positions: compared.
    """

    mean: float
    largest: float
    relative: float
    logprob: float
    greedy: float
    positions: int


# Below this the log-probability of a token is rounding: float32 has seven digits.
_LEAST = -14.0


def apart_of(reference: Reading, other: Reading) -> Apart:
    """Compare two readings of the same positions.

    The divergence of a position is half the variance of the differences of log-probabilities, as
    in `compare.distance`, over the tokens that are likely enough to have one.
    """
    own_PK, its_PK = (r.logprobs[:, :-1].double() for r in (reference, other))
    counted_PK = own_PK > _LEAST
    apart_PK = (its_PK - own_PK) * counted_PK
    found_P = divergence(own_PK.exp() * counted_PK, apart_PK)
    mean = float(found_P.mean())
    return Apart(
        mean,
        float(found_P.max()),
        (2 * mean) ** 0.5 / max(reference.spread, 1e-12),
        float(apart_PK.abs().max()),
        float((reference.greedy == other.greedy).double().mean()),
        len(found_P),
    )


@dataclass(frozen=True)
class Proof:
    """The result of the comparison with llama.cpp.

    Attributes:
        texts: ids of texts.
        prompts: cases whose prompts are equal.
        template_kwargs: template arguments under which they are; {} for none.
        stops: ids on which llama.cpp ends a reply, of those of the contract.
        apart: predictions.
        findings: errors where something differs, and notes.
        build: of llama.cpp.
    """

    texts: Compared
    prompts: int
    template_kwargs: dict[str, Any]
    stops: tuple[int, ...]
    apart: Apart | None
    findings: tuple[Finding, ...]
    build: str = ""

    @property
    def holds(self) -> bool:
        return all(finding.level != "error" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """What proof.json holds."""
        return {
            "holds": self.holds,
            "llama.cpp": self.build,
            "texts": self.texts.texts,
            "texts_in_another_unicode_form": len(self.texts.normalised),
            "prompts": self.prompts,
            "template_kwargs": self.template_kwargs,
            "stops": list(self.stops),
            "predictions": asdict(self.apart) if self.apart else None,
            "findings": [finding.as_dict() for finding in self.findings],
        }


@dataclass(frozen=True)
class Reference:
    """What transformers computes with a model; files are compared with it.

    Attributes:
        cases: conversations as they are served.
        probes: where predictions are read.
        reading: of the model, in float32.
    """

    cases: list[Case]
    probes: list[Probe]
    reading: Reading


def reference_of(
    loaded: LoadedModel,
    contract: PromptContract,
    conversations: Sequence[Conversation],
    context: int,
) -> Reference:
    """The model's own predictions of conversations and of a long row.

    Args:
        loaded: in float32.
        conversations: rows of the run; fixed prompts are added.
        context: tokens up to which the two compute the same.
    """
    cases = cases_of(contract, conversations, longest=min(context, 1024) - 1)
    rows = loaded.transformers_model.get_input_embeddings().weight.shape[0]
    special = {*contract.tokenizer.all_special_ids, *contract.tokens.special_ids}
    known = [i for i in contract.tokenizer.get_vocab().values() if i < rows and i not in special]
    probes = [case.probe for case in cases]
    probes.append(long_probe(sorted(known), min(context - 1, _LONG)))
    return Reference(cases, probes, read(loaded, probes))


def prove(
    path: Path,
    contract: PromptContract,
    reference: Reference,
    budget: Budget,
    *,
    adapter: Path | None = None,
) -> Proof:
    """Compare a file with the model it was written from.

    Args:
        adapter: a file of an adapter that llama.cpp adds to it.

    Raises:
        LlamaError: llama.cpp cannot load it.
    """
    with serving(path, adapter=adapter) as server:
        texts, arguments, stops, findings = compare_served(server, contract, reference)
        wanted = reference.reading
        apart = apart_of(wanted, read_server(server, reference.probes, wanted.top))
        findings += judge(apart, budget)
        build = str(server.props().get("build_info", ""))
    return Proof(texts, len(reference.cases), arguments, stops, apart, tuple(findings), build)


# Tokens of the long row.
_LONG = 384


def compare_served(
    server: LlamaCpp, contract: PromptContract, reference: Reference
) -> tuple[Compared, dict[str, Any], tuple[int, ...], list[Finding]]:
    """Texts as ids, prompts and stop tokens: the texts, the template arguments under which prompts
    are equal, the stop tokens on which the server ends a reply, and what differs."""
    texts = compare_ids(server, contract, texts_of(contract))
    arguments, found = on_prompts(server, contract, reference.cases)
    asked = reference.cases[0].ids if reference.cases else reference.probes[0].ids
    stops = tuple(i for i in contract.stop_ids if server.ends_on(asked, i))
    return texts, arguments, stops, [*on_texts(texts), *found, *on_stops(contract, stops)]


def on_texts(texts: Compared) -> list[Finding]:
    found = []
    if texts.wrong:
        found.append(
            Finding(
                "gguf-ids-differ",
                "error",
                f"llama.cpp gives different ids for {len(texts.wrong)} of {texts.texts} texts",
                where=repr(texts.wrong[0][:60]),
                count=len(texts.wrong),
                why="its pre-tokenizer or a token of the vocabulary differs",
                fix="use another server with the merged model: truetune export RUN --to merged",
            )
        )
    if texts.normalised:
        found.append(
            Finding(
                "gguf-unicode-form",
                "note",
                f"{len(texts.normalised)} of {texts.texts} texts get different ids unless they "
                "are in the tokenizer's Unicode normal form",
                where=repr(texts.normalised[0][:60]),
                count=len(texts.normalised),
                why="the tokenizer composes characters first (NFC), but llama.cpp does not",
                fix="send composed text, as keyboards produce it",
            )
        )
    return found


def on_prompts(
    server: LlamaCpp, contract: PromptContract, cases: Sequence[Case]
) -> tuple[dict[str, Any], list[Finding]]:
    """The template arguments under which the prompts are the contract's, and what differs."""
    first = contract.tokenizer.bos_token or ""
    best = None
    tried: list[dict[str, Any]] = [{}]
    for name in contract.renderer.variables():
        tried += [{name: value} for value in contract.values_of(name)]
    for arguments in tried:
        found = compare_prompts(server, cases, arguments, first=first)
        if found.equal:
            return arguments, _served_with(arguments) if arguments else []
        if best is None:
            best = found
    assert best is not None
    if best.refused:
        case, said = best.refused[0]
        what = f"llama.cpp's template engine rejects {len(best.refused)} of {len(cases)} prompts"
        why = visible(said, keep_newlines=False)
    else:
        case, _ = best.ids[0]
        what = (
            f"llama.cpp renders different prompts for {len(best.ids)} of {len(cases)} conversations"
        )
        text = next((text for one, text in best.texts if one is case), None)
        why = (
            "the text is the same, but its ids differ"
            if text is None
            else f"the contract: {_end(case.text)}\nllama.cpp:    {_end(text)}"
        )
    return {}, [
        Finding(
            "gguf-prompt-differs",
            "error",
            what,
            where=case.where,
            count=len(best.refused) or len(best.ids),
            why=why,
            fix="use another server with the merged model: truetune export RUN --to merged",
        )
    ]


def _served_with(arguments: dict[str, Any]) -> list[Finding]:
    import json

    return [
        Finding(
            "gguf-template-arguments",
            "warning",
            "llama.cpp renders the same prompts as in training only if a template argument is set",
            where=json.dumps(arguments),
            why="it sets this argument to its own value, which replaces the template's default",
            fix=f"serve it with --chat-template-kwargs '{json.dumps(arguments)}', or with truetune "
            "serve, which sets it",
        )
    ]


def _end(text: str) -> str:
    return repr(text[-160:])


def on_stops(contract: PromptContract, stops: Sequence[int]) -> list[Finding]:
    missing = [i for i in contract.stop_ids if i not in stops]
    if not missing:
        return []
    return [
        Finding(
            "gguf-stops-differ",
            "error",
            f"llama.cpp does not end a reply on {contract.tokens.named(missing)}",
            count=len(missing),
            why="a GGUF file can name only three such tokens; llama.cpp recognises some more by "
            "their text",
            fix="train with fewer stop tokens (--stop)",
        )
    ]


def judge(apart: Apart, budget: Budget) -> list[Finding]:
    """Report an error if predictions differ by more than the weights' type explains, and a warning
    if the model tolerates it badly."""
    if not apart.relative <= budget.most:
        return [
            Finding(
                "gguf-numbers-differ",
                "error",
                "llama.cpp does not compute what transformers computes: log-probabilities differ "
                f"by {apart.relative:.2g} of the logits' spread, but {budget.most:.2g} is allowed",
                why="a tensor or a setting of the architecture is not written as llama.cpp reads "
                "it",
                fix="report it with the model's config.json; truetune export RUN --to merged "
                "writes a model for other servers",
            )
        ]
    if apart.relative <= budget.usual:
        return []
    return [
        Finding(
            "gguf-loses-much",
            "warning",
            f"too few bits for this model: log-probabilities differ by {apart.relative:.2g} of "
            f"the "
            f"logits' spread, and {100 * apart.greedy:.0f} % of the likeliest tokens are equal",
            why=f"{budget.usual:.2g} is usual for this type; small models suffer more",
            fix="use more bits, for example --quant q8_0; truetune diagnose shows the effect on "
            "replies",
        )
    ]
