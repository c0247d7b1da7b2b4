"""Find the first stage between training and a server at which a model changes.

input   a run, a model or adapter folder, or a GGUF file; folders and files made from it, a server
does    runs the same rows through every stage and compares prompts (text and ids), predictions,
        greedy replies and stops with what was trained; says what was done at the first stage that
        differs
output  Diagnosis
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from truetune.data.load import load
from truetune.diagnosis.alone import gguf_alone
from truetune.diagnosis.folder import folder_stage
from truetune.diagnosis.gguf_stage import file_stage
from truetune.diagnosis.live import live
from truetune.diagnosis.measured import (
    Stage,
)
from truetune.diagnosis.work import Tell, Work
from truetune.errors import ModelError, UsageError
from truetune.exporting.gguf_proof import (
    Apart,
)
from truetune.exporting.mlx import is_mlx
from truetune.findings import Finding
from truetune.model.source import ADAPTER_CONFIG, locate
from truetune.model.tokenizer import locate_base
from truetune.run_dir import opened
from truetune.servers.client import Client, ServerError
from truetune.servers.llama_cpp import require_gguf
from truetune.verification.artifact import run_of
from truetune.verification.rows import read_rows

STAGES = ("base", "adapter", "model", "merged", "quantised", "gguf", "url")


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """All stages in order.

    Attributes:
        source: the model, as the user named it.
        stages: the measured stages.
        rows: number of rows on which they were compared.
        effect: how far training moved the predictions; None if there is no base to compare.
    """

    source: str
    stages: tuple[Stage, ...]
    rows: int
    effect: Apart | None = None

    @property
    def first(self) -> Stage | None:
        """The first stage that differs."""
        return next((stage for stage in self.stages if stage.parts), None)

    def __repr__(self) -> str:
        stages = ", ".join(map(repr, self.stages))
        return f"Diagnosis({self.source!r}, {self.rows} rows: {stages})"

    def findings(self) -> list[Finding]:
        return [finding for stage in self.stages for finding in stage.findings]

    def as_dict(self) -> dict[str, Any]:
        first = self.first
        return {
            "source": self.source,
            "parts_at": first.name if first else None,
            "rows": self.rows,
            "training_moved": asdict(self.effect) if self.effect else None,
            "stages": [
                {
                    "stage": stage.name,
                    "what": stage.what,
                    "predictions": asdict(stage.apart) if stage.apart else None,
                    **stage.numbers,
                    "note": stage.note,
                    "findings": [finding.as_dict() for finding in stage.findings],
                }
                for stage in self.stages
            ],
        }


def diagnose(
    source: str,
    *,
    stages: Sequence[str] = (),
    base: str | None = None,
    merged: str | None = None,
    quantised: str | None = None,
    gguf: str | None = None,
    url: str | None = None,
    data: str | None = None,
    on_stage: Tell | None = None,
) -> Diagnosis:
    """Run the same rows through every stage that exists.

    Args:
        source: a run, a model or adapter folder, or a GGUF file.
        stages: the stages to examine; all if empty.
        base: current location of an adapter's base.
        merged, quantised: folders made from it.
        gguf: a file made from it.
        url: the address of a server that should serve it.
        data: rows to use instead of those that the run kept: a file, a folder, or a Hub dataset.
        on_stage: is called with the name of each stage.

    Raises:
        UsageError: an argument names something that does not exist.
        TruetuneError: the trained model itself cannot be opened.
    """
    tell = on_stage or (lambda _: None)
    _require(source, stages, base, merged=merged, quantised=quantised, gguf=gguf, url=url)
    if url is not None and (not stages or "url" in stages):
        # Says now that it is no address, or that nobody listens there.
        _require_answer(Client(url, seconds=20))
    # A folder of a run is named for the model in it.
    merged, quantised = (opened(path) if path is not None else None for path in (merged, quantised))
    if source.lower().endswith(".gguf"):
        return Diagnosis(source, (gguf_alone(Path(source), tell),), 0)
    run = run_of(source)
    kept = read_rows(run) if run else []
    if data is not None:
        known = list(load(data).conversations)
    else:
        known = [row.conversation for row in kept]
    pairs = ((ids, mask) for row in kept for ids, mask in row.examples)
    answers = frozenset(i for ids, mask in pairs for i, on in zip(ids, mask, strict=True) if on)
    work = Work(source, base, known, tell, answers)
    found: list[Stage] = []

    def wanted(name: str) -> bool:
        return not stages or name in stages

    if work.is_adapter and wanted("base"):
        found.append(_base(work))
    own = "adapter" if work.is_adapter else "model"
    if wanted(own):
        found.append(_trained(work, own))
    for name, folder in (("merged", merged), ("quantised", quantised)):
        if folder is not None and wanted(name):
            tell(f"running {name}")
            found.append(folder_stage(work, name, folder))
    if gguf is not None and wanted("gguf"):
        tell("running llama.cpp")
        found.append(file_stage(work, Path(gguf)))
    if url is not None and wanted("url"):
        tell(f"running {url}")
        found.append(live(url, work.contract, work.reference, work.cases, work.replies))
    return Diagnosis(source, tuple(found), len(work.reference.cases), work.effect)


def _require(source: str, stages: Sequence[str], base: str | None, **made: str | None) -> None:
    unknown = [name for name in stages if name not in STAGES]
    if unknown:
        raise UsageError(
            f"unknown stage {unknown[0]!r}",
            where="--stages",
            fix=f"choose from {','.join(STAGES)}",
            code="stage-unknown",
        )
    alone = source.lower().endswith(".gguf")
    if alone and not Path(source).is_file():
        raise UsageError(
            f"there is no file {source}", fix="specify a GGUF file", code="no-such-file"
        )
    own: tuple[str, ...] = ("gguf",) if alone else ()
    if not alone and stages:
        adapter = locate(opened(source), weights=False).is_adapter
        own = ("base", "adapter") if adapter else ("model",)
    for name in stages:
        if name not in _MADE and name not in own:
            raise UsageError(
                f"{source} has no stage {name}",
                where="--stages",
                why="it is a GGUF file" if alone else f"its stages are {' and '.join(own)}",
                fix=f"remove {name} from --stages",
                code="stage-without-file",
            )
    if alone and any(path is not None for path in made.values()):
        raise UsageError(
            f"{source} is a GGUF file: nothing can be compared with it",
            why="folders, files and servers are compared with the model that they were made from",
            fix=f"truetune diagnose MODEL --gguf {source}",
            code="stage-kind",
        )
    for name, path in made.items():
        if path is None and name in stages and not (alone and name == "gguf"):
            raise UsageError(
                f"the stage {name} was requested, but there is nothing to examine",
                where="--stages",
                fix=f"add --{name} {_MADE[name]}, or remove {name} from --stages",
                code="stage-without-file",
            )
        if path is None or name == "url":
            continue
        if not Path(path).exists():
            raise UsageError(
                f"there is no {path}",
                where=f"--{name}",
                fix="specify the exported file or folder",
                code="no-such-file",
            )
        if Path(path).is_dir() == (name == "gguf"):
            raise UsageError(
                f"{path} is a {'folder' if name == 'gguf' else 'file'}",
                where=f"--{name}",
                why=_kind_of(Path(path)),
                fix=f"specify a {'GGUF file' if name == 'gguf' else 'model folder'}",
                code="stage-kind",
            )
        if name in ("merged", "quantised") and is_mlx(Path(path)):
            raise UsageError(
                f"{path} is a folder for MLX, which transformers cannot load",
                where=f"--{name}",
                why="config.json describes quantised weights in MLX's format",
                fix="truetune compared it when it was written (see proof.json); serve it "
                f"(mlx_lm.server --model {path}) and compare the server: truetune diagnose "
                f"{source} --url http://127.0.0.1:8080",
                code="stage-kind",
            )
        if name == "gguf":
            require_gguf(Path(path), "--gguf")
        else:
            _require_model(name, opened(path))
    if alone:
        require_gguf(Path(source))
        return
    files = locate(opened(source), weights=False)
    if files.is_adapter and base is not None:
        try:
            locate_base(files, weights=False, instead=base)
        except ModelError as error:
            fix = "specify the folder or Hub id of the adapter's base"
            raise UsageError(**{**error.words, "where": "--base", "fix": fix}) from error


def _require_model(name: str, path: str) -> None:
    """Raise UsageError where a folder surely holds no whole model."""
    folder = Path(path)
    why = fix = ""
    if (folder / ADAPTER_CONFIG).is_file():
        why = "it is an adapter, which changes its base only when it is loaded on it"
        fix = f"merge it: truetune export {path} --to merged -o DIR"
    elif not (folder / "config.json").is_file():
        why = "it has no config.json"
    elif not any(any(folder.glob(form)) for form in ("*.safetensors", "*.bin")):
        why = "it has no weights (*.safetensors)"
    if why:
        raise UsageError(
            f"{path} is not the folder of a complete model",
            where=f"--{name}",
            why=why,
            fix=fix or "specify the folder that was exported",
            code="stage-kind",
        )


def _require_answer(client: Client) -> None:
    try:
        client.get("/v1/models")
    except ServerError as error:
        # Any answer is one; what it is worth, the stage finds out.
        if error.code == "server-unreachable":
            raise UsageError(
                f"no server answers at {client.url}",
                where="--url",
                why=error.what.partition(": ")[2],
                fix="start it (truetune serve RUN), or correct the address",
                code="server-unreachable",
            ) from error


# What each stage is made of, as the options name it.
_MADE = {"merged": "DIR", "quantised": "DIR", "gguf": "FILE", "url": "URL"}


def _kind_of(path: Path) -> str:
    if path.is_file():
        return "a GGUF file is compared with --gguf" if path.suffix.lower() == ".gguf" else ""
    files = sorted(path.glob("*.gguf"))
    if files:
        return f"it contains {files[0].name}"
    return "a model folder is compared with --merged or --quantised"


def _base(work: Work) -> Stage:
    findings = []
    if work.effect is not None and work.effect.relative < 1e-6:
        findings.append(
            Finding(
                "adapter-without-effect",
                "warning",
                "the adapter does not change any prediction of its base",
                where=work.folder,
                why="it was never trained, or its weights are zero",
                fix="read the report of the run: truetune report RUN",
            )
        )
    return Stage(
        "base",
        "without the adapter",
        work.effect,
        work.base_replies,
        tuple(findings),
        numbers=work.numbers(work.base_replies),
    )


def _trained(work: Work, name: str) -> Stage:
    """Compare what was trained with what the run recorded."""
    return Stage(
        name,
        work.folder,
        None,
        work.replies,
        tuple(work.recorded),
        note="the other stages are compared with it",
        numbers=work.numbers(work.replies),
    )
