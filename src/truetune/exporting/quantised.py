"""Write a plain model folder with quantised weights, as transformers and vLLM load it.

input   a merged model folder, and for GPTQ the rows on which it is calibrated, as ids
does    has bitsandbytes, torchao or llm-compressor quantise the weights in a child process; keeps
        tokenizer, template and generation_config byte for byte
output  WrittenQuantised; the caller compares it with the model before it renames the folder
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from truetune.errors import UsageError
from truetune.exporting.copied import copy_files
from truetune.findings import Finding, near, visible
from truetune.model.source import ModelFiles, locate
from truetune.model.weights import main_dtype, read_headers, weight_files
from truetune.run_dir import flush_folder, settle
from truetune.system import child

_WORKER = "truetune.exporting.quantise_worker"


@dataclass(frozen=True)
class Quant:
    """One way to quantise.

    Attributes:
        kind: the package that does it.
        how: what that package calls it.
    """

    kind: Literal["bitsandbytes", "torchao", "llmcompressor"]
    how: str

    @property
    def extra(self) -> str:
        return "llm-compressor" if self.kind == "llmcompressor" else self.kind

    @property
    def calibrated(self) -> bool:
        """Whether it needs calibration rows."""
        return self.kind == "llmcompressor"


QUANTS = {
    "nf4": Quant("bitsandbytes", "4bit"),
    "int8": Quant("bitsandbytes", "8bit"),
    "torchao-int8": Quant("torchao", "Int8WeightOnlyConfig"),
    "gptq-w4a16": Quant("llmcompressor", "W4A16"),
    "gptq-w8a8": Quant("llmcompressor", "W8A8"),
}


@dataclass(frozen=True)
class WrittenQuantised:
    """A quantised folder.

    Attributes:
        folder: of it.
        matrices: that are quantised.
        num_bytes, plain_bytes: of the weights, quantised and before.
        versions: of the libraries.
        findings: what of the model's other files was not copied.
    """

    folder: Path
    matrices: int
    num_bytes: int
    plain_bytes: int
    versions: dict[str, str]
    findings: tuple[Finding, ...] = ()


def require_quantiser(quant: str) -> None:
    """Raise if a type is unknown or its package is missing.

    Raises:
        UsageError: see above.
    """
    found = QUANTS.get(quant)
    if found is None:
        meant = near(quant, QUANTS)
        raise UsageError(
            f"unknown quantisation {quant!r}",
            where="--quant",
            why=f"did you mean {meant[0]}?" if meant else _ELSEWHERE.get(quant, ""),
            fix=f"for a model folder, use one of {', '.join(QUANTS)}",
            code="quantised-type",
        )
    if importlib.util.find_spec(found.kind) is None:
        raise UsageError(
            f"--quant {quant} needs {found.kind}, which is not installed",
            where="--quant",
            why="it quantises the weights",
            fix=f"pip install 'truetune[{found.extra}]'"
            + (" in an environment of its own: it needs transformers 5.17 or older"
               if found.calibrated else ""),
            code="extra-missing",
        )  # fmt: skip


# What is asked for, and is not written; docs/serving.md has what was tried.
_ELSEWHERE = {
    "awq": "llm-compressor's AWQ needs a GPU",
    "awq-w4a16": "llm-compressor's AWQ needs a GPU",
    "torchao-int4": "torchao packs 4-bit weights for one kind of GPU only",
    "gptq": "choose gptq-w4a16 or gptq-w8a8",
    **dict.fromkeys(("q8_0", "q4_k_m", "q4_0", "q6_k", "f16"), "that is a type of GGUF files"),
}


def write_quantised(
    source: Path,
    folder: Path,
    quant: str,
    *,
    rows: Sequence[Sequence[int]] = (),
    device: str = "cpu",
) -> WrittenQuantised:
    """Quantise a model folder.

    Args:
        source: a plain model folder.
        folder: must not exist.
        quant: one of `QUANTS`.
        rows: ids to calibrate on, for GPTQ.
        device: where to quantise.

    Raises:
        UsageError: the library cannot quantise this model; nothing is left.
    """
    how = QUANTS[quant]
    plain = locate(source, weights=True)
    tensors = read_headers(weight_files(plain))
    asked = {
        "kind": how.kind,
        "how": how.how,
        "source": str(source.resolve()),
        "folder": str(folder.resolve()),
        "device": device,
        "dtype": main_dtype(tensors) or "bfloat16",
        "rows": [list(ids) for ids in rows],
    }
    try:
        said = child.ask_json(_WORKER, asked)
        if "error" in said:
            raise _unable(quant, visible(_short(said["error"]), keep_newlines=False))
        findings = _keep_other_files(plain, folder)
        made = read_headers(weight_files(locate(folder, weights=True)))
        whole = {"int8", "uint8", "int32"}
        matrices = sum(1 for name, facts in made.items() if _is_matrix(name, facts, whole))
        if not matrices:
            raise _unable(quant, "none of its layers is a linear layer that can be quantised")
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                # llm-compressor leaves weights that only this user may read.
                file.chmod((folder / "config.json").stat().st_mode)
                settle(file)
        flush_folder(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return WrittenQuantised(
        folder,
        matrices,
        sum(facts.num_bytes for facts in made.values()),
        sum(facts.num_bytes for facts in tensors.values()),
        dict(said["versions"]),
        tuple(findings),
    )


def _short(error: str, most: int = 160) -> str:
    """Shorten an error to its beginning and its end: libraries explain the error there, and print
    code in between."""
    return error if len(error) <= 2 * most else f"{error[:most]} ... {error.strip()[-most:]}"


# Names that quantised matrices have: plain (bitsandbytes), packed (compressed-tensors), as a part
# of a torchao tensor.
_MATRIX = (".weight", ".weight_packed", "._weight_qdata")


def _is_matrix(name: str, facts: Any, types: set[str]) -> bool:
    return facts.dtype in types and len(facts.shape) == 2 and name.endswith(_MATRIX)


def _unable(quant: str, why: str) -> UsageError:
    return UsageError(
        f"{QUANTS[quant].kind} cannot quantise this model",
        where=f"--quant {quant}",
        why=why,
        fix="use another type, or --to gguf; --to merged without --quant writes the unquantised "
        "model",
        code="quantised-failed",
    )


# What is kept of the plain model's folder, byte for byte; its other files speak of plain weights.
_KEPT = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("*.model", "chat_template.jinja", "additional_chat_templates/*.jinja"),
    *("generation_config.json", "LICENSE*"),
)


def _keep_other_files(source: ModelFiles, folder: Path) -> list[Finding]:
    """Tokenizer, template and generation_config as they are; nothing else that a library left."""
    for file in folder.iterdir():
        if file.name != "config.json" and ".safetensors" not in file.name:
            # llm-compressor writes a recipe.yaml, which is the name of a run's recipe.
            file.unlink()
    return copy_files(source, folder, _KEPT)
