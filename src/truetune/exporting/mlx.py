"""Write a model folder for MLX with mlx_lm, and verify it.

input   a whole model folder, opened in float32, its contract, rows of the run
does    has mlx_lm convert the folder in a child process, load the result and compute on the CPU;
        compares prompts as ids, stop tokens and predictions with transformers
output  WrittenMLX
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from truetune.compare import Reading
from truetune.contract.contract import PromptContract
from truetune.contract.shape import as_object, with_arguments
from truetune.data.conversation import Conversation
from truetune.errors import CheckFailed, UsageError
from truetune.exporting.gguf import PROOF, small_enough
from truetune.exporting.gguf_proof import Apart, Budget, Reference, apart_of, reference_of
from truetune.findings import Finding, near, visible
from truetune.model.load import LoadedModel
from truetune.run_dir import write_json
from truetune.system import child
from truetune.system.lazy import torch

_WORKER = "truetune.exporting.mlx_worker"
# What mlx_lm's `convert` gets, and how far the result may be: see `gguf_proof.Budget`.
QUANTS: dict[str, tuple[dict[str, Any], Budget]] = {
    "f32": ({"dtype": "float32"}, Budget(1e-4, 2e-3)),
    "f16": ({"dtype": "float16"}, Budget(5e-3, 2e-2)),
    "bf16": ({"dtype": "bfloat16"}, Budget(5e-2, 0.15)),
    "8bit": ({"quantize": True, "q_bits": 8}, Budget(5e-2, 0.2)),
    "6bit": ({"quantize": True, "q_bits": 6}, Budget(0.1, 0.4)),
    "5bit": ({"quantize": True, "q_bits": 5}, Budget(0.2, 0.7)),
    "4bit": ({"quantize": True, "q_bits": 4}, Budget(0.3, 1.2)),
}


@dataclass(frozen=True)
class WrittenMLX:
    """A folder for MLX.

    Attributes:
        folder: of it.
        quant: one of `QUANTS`.
        prompts: conversations whose ids are equal.
        stops: ids on which mlx_lm ends a reply, of those of the contract.
        apart: predictions.
        findings: warnings.
    """

    folder: Path
    quant: str
    prompts: int
    stops: tuple[int, ...]
    apart: Apart
    findings: tuple[Finding, ...]

    def as_dict(self) -> dict[str, Any]:
        """What proof.json holds."""
        return {
            "holds": True,
            "quant": self.quant,
            "prompts": self.prompts,
            "stops": list(self.stops),
            "predictions": asdict(self.apart),
            "findings": [finding.as_dict() for finding in self.findings],
        }


def require_mlx(quant: str) -> None:
    """Raise if mlx_lm is missing or does not support a type.

    Raises:
        UsageError: see above.
    """
    if any(importlib.util.find_spec(name) is None for name in ("mlx", "mlx_lm")):
        raise UsageError(
            "--to mlx needs mlx_lm, which is not installed",
            why="it writes and verifies the folder",
            fix="pip install 'truetune[mlx]' (macOS, or Linux on a CPU)",
            code="extra-missing",
        )
    if quant not in QUANTS:
        meant = near(quant, QUANTS)
        raise UsageError(
            f"unknown quantisation {quant!r}",
            where="--quant",
            why=f"did you mean {meant[0]}?" if meant else "",
            fix=f"for mlx, use one of {', '.join(QUANTS)}",
            code="mlx-quant",
        )


def is_mlx(folder: Path) -> bool:
    """Whether a folder holds quantised weights as mlx_lm writes them."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    held = config.get("quantization") if isinstance(config, dict) else None
    method = (config.get("quantization_config") or {}) if held else {}
    return isinstance(held, dict) and "group_size" in held and "quant_method" not in method


def write_mlx(
    source: Path,
    loaded: LoadedModel,
    contract: PromptContract,
    folder: Path,
    *,
    quant: str,
    conversations: Sequence[Conversation] = (),
    on_stage: Callable[[str], None] | None = None,
) -> WrittenMLX:
    """Write a folder and verify it.

    Args:
        source: a whole model folder.
        loaded: the same in float32.
        folder: must not exist.
        conversations: rows on which it is verified, besides fixed prompts.

    Raises:
        UsageError: an architecture that mlx_lm does not know.
        CheckFailed: mlx_lm computes something else; nothing is left.
    """
    tell = on_stage or (lambda _: None)
    config = loaded.transformers_model.config.get_text_config(decoder=True)
    tell("computing the model's own predictions")
    reference = reference_of(loaded, contract, conversations, int(config.max_position_embeddings))
    kinds = ["f32", quant] if quant != "f32" and small_enough(
        loaded.transformers_model, folder.parent
    ) else [quant]  # fmt: skip
    for kind in kinds:
        tell(f"writing {kind} and verifying it with mlx_lm on the CPU, which may take minutes")
        try:
            made = _proved(source, contract, reference, folder, kind)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        if kind != quant:
            shutil.rmtree(folder)
    for code in folder.glob("*.py"):
        # mlx_lm copies a model's own code, which was neither run nor proved.
        code.unlink()
    write_json(folder / PROOF, {**made.as_dict(), "proved_in_float32": kinds[0] == "f32"})
    return made


def _proved(
    source: Path, contract: PromptContract, reference: Reference, folder: Path, kind: str
) -> WrittenMLX:
    how, budget = QUANTS[kind]
    wanted = reference.reading
    asked = {
        "source": str(source.resolve()),
        "folder": str(folder),
        "how": how,
        "cases": [
            {
                "messages": [with_arguments(message, as_object) for message in case.messages],
                "tools": list(case.tools) if case.tools else None,
                "arguments": dict(case.template_kwargs),
            }
            for case in reference.cases
        ],
        "probes": [[list(probe.ids), list(probe.positions)] for probe in reference.probes],
        "top": wanted.top.tolist(),
    }
    said = child.ask_json(_WORKER, asked)
    if "error" in said:
        raise UsageError(
            f"mlx_lm cannot convert or load this model: {visible(said['error'][:300])}",
            why="it does not know this architecture, or the folder is incomplete",
            fix="use another server with the merged model: truetune export RUN --to merged",
            code="mlx-failed",
        )
    known = torch.tensor(said["logprobs"], dtype=torch.float64)
    rest = (1 - known.exp().sum(dim=-1)).clamp(min=1e-9).log()
    reading = Reading(
        wanted.top,
        torch.cat([known, rest[:, None]], dim=-1).float(),
        torch.tensor(said["greedy"]),
        0.0,
        "",
    )
    apart = apart_of(wanted, reading)
    stops = tuple(i for i in contract.stop_ids if i in said["stops"])
    wrong = [
        case
        for case, ids in zip(reference.cases, said["prompts"], strict=True)
        if tuple(ids) != case.ids
    ]
    errors = []
    if wrong:
        what = f"{len(wrong)} of {len(reference.cases)} conversations"
        errors.append(_error(f"mlx_lm renders different prompts for {what}", wrong[0].where))
    if missing := [i for i in contract.stop_ids if i not in stops]:
        errors.append(_error(f"mlx_lm does not end a reply on {contract.tokens.named(missing)}"))
    if not apart.relative <= budget.most:
        errors.append(
            _error(
                "mlx_lm does not compute what transformers computes: log-probabilities differ by "
                f"{apart.relative:.2g} of the logits' spread, but {budget.most:.2g} is allowed"
            )
        )
    if errors:
        raise CheckFailed("the MLX folder does not match the model and was removed", errors)
    warnings: tuple[Finding, ...] = ()
    if apart.relative > budget.usual:
        warnings = (
            Finding(
                "mlx-loses-much",
                "warning",
                f"too few bits for this model: log-probabilities differ by "
                f"{apart.relative:.2g} of "
                f"the logits' spread, and {100 * apart.greedy:.0f} % of the likeliest tokens are "
                "equal",
                why=f"{budget.usual:.2g} is usual for this type; small models suffer more",
                fix="use more bits, for example --quant 8bit",
            ),
        )
    return WrittenMLX(folder, kind, len(reference.cases), stops, apart, warnings)


def _error(what: str, where: str = "") -> Finding:
    return Finding(
        "mlx-differs",
        "error",
        what,
        where=where,
        why="mlx_lm reads the folder differently from transformers",
        fix="use another server with the merged model: truetune export RUN --to merged",
    )
