"""A run, a model or an adapter as a folder with quantised weights: merged where it is an adapter,
quantised, compared as `truetune diagnose --quantised` compares it, and only then given its name.
"""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from truetune.compute.memory import available_bytes
from truetune.contract.contract import PromptContract, Refused
from truetune.data.load import load
from truetune.data.rows import evenly
from truetune.diagnosis.diagnose import diagnose
from truetune.diagnosis.folder import quantised_budget
from truetune.diagnosis.measured import Stage
from truetune.errors import CheckFailed, ModelError, TruetuneError, UsageError
from truetune.exporting.gguf import PROOF
from truetune.exporting.gguf_proof import Apart
from truetune.exporting.quantised import (
    QUANTS,
    WrittenQuantised,
    require_quantiser,
    write_quantised,
)
from truetune.findings import Finding, gib
from truetune.listener import Listener
from truetune.model.architecture import causal_config
from truetune.model.merge import Onto
from truetune.model.placement import choose_device
from truetune.model.served_adapter import model_line
from truetune.model.source import ModelFiles, locate
from truetune.model.tokenizer import load_tokenizer, locate_base
from truetune.model.weights import read_headers, weight_files
from truetune.recipe.sources import recorded_recipe
from truetune.run.export_whole import export_plain
from truetune.run.prepare import survey
from truetune.run_dir import RECIPE, named_at_last, opened, scratch, sha256, write_json
from truetune.system.lazy import torch
from truetune.verification.artifact import run_of


@dataclass(frozen=True)
class Calibration:
    """The rows on which GPTQ was calibrated.

    Attributes:
        rows: ids of each.
        source: where they are from.
        available: of how many they were chosen.
    """

    rows: tuple[tuple[int, ...], ...]
    source: str
    available: int

    def as_dict(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "rows": len(self.rows),
            "of": self.available,
            "tokens": sum(map(len, self.rows)),
        }


@dataclass(frozen=True)
class QuantisedExport:
    """A folder with quantised weights.

    Attributes:
        folder: the folder.
        quant: one of `quantised.QUANTS`.
        written: what the quantiser did.
        stage: how the folder was compared with the model.
        prompts: number of conversations whose prompts have the same ids.
        calibration: the calibration rows; None if none were needed.
        line: the command that serves the folder.
        findings: warnings.
    """

    folder: Path
    quant: str
    written: WrittenQuantised
    stage: Stage
    prompts: int
    calibration: Calibration | None
    line: str
    findings: tuple[Finding, ...]

    @property
    def apart(self) -> Apart:
        """How far the predictions are from those of the model."""
        assert self.stage.apart is not None
        return self.stage.apart

    def as_dict(self) -> dict[str, Any]:
        """Return the content of proof.json, without the files."""
        return {
            "holds": True,
            "quant": self.quant,
            "matrices": self.written.matrices,
            "bytes": self.written.num_bytes,
            "plain_bytes": self.written.plain_bytes,
            "versions": self.written.versions,
            "prompts": self.prompts,
            "predictions": asdict(self.apart),
            **self.stage.numbers,
            "calibration": self.calibration.as_dict() if self.calibration else None,
            "findings": [finding.as_dict() for finding in self.findings],
        }


def export_quantised(
    source: str,
    output: Path | str,
    *,
    quant: str,
    server: str = "vllm",
    base: str | None = None,
    onto: Onto = "auto",
    dtype: str | None = None,
    device: str = "cpu",
    data: str | None = None,
    listener: Listener | None = None,
) -> QuantisedExport:
    """Write a folder with quantised weights.

    Args:
        source: a run, a model or adapter folder, or a Hub id.
        output: must not exist.
        quant: see `quantised.QUANTS`.
        server: whose command is named.
        base, onto, dtype, device: see `pipeline.export`.
        data: rows to calibrate on; None takes those that the run was trained on.

    Raises:
        TruetuneError: it cannot be written, or predicts something else; nothing is left behind.
    """
    listener = listener or Listener()
    require_quantiser(quant)
    folder, output = opened(source), Path(output)
    files = locate(folder, weights=True)
    below = locate_base(files, weights=True, instead=base) if files.is_adapter else files
    _require_memory(below)
    calibration = None
    if QUANTS[quant].calibrated:
        calibration = _calibration(source, folder, data, base, listener)
    with named_at_last(output) as unnamed, scratch() as place:
        whole = files.folder
        if files.is_adapter or dtype is not None or run_of(source) is not None:
            more: dict[str, Any] = {"base": base, "onto": onto, "dtype": dtype, "device": device}
            export_plain(source, place / "merged", listener=listener, **more)
            whole = place / "merged"
        listener.stage(f"quantising with {QUANTS[quant].kind}")
        written = write_quantised(
            whole,
            unnamed,
            quant,
            rows=calibration.rows if calibration else (),
            device=str(choose_device(device)[0]),
        )
        # If the adapter was merged onto other weights than it was trained on, compare with that
        # merged model.
        other = files.is_adapter and onto == "original"
        found = diagnose(
            str(whole) if other else source,
            base=None if other else base,
            quantised=str(unnamed),
            stages=("quantised",),
            on_stage=listener.stage,
        )
        (stage,) = found.stages
        findings = tuple(_named(finding, unnamed, output) for finding in stage.findings)
        if stage.parts:
            raise CheckFailed(
                "the quantised folder does not match the model and was removed", list(findings)
            )
        made = QuantisedExport(
            output,
            quant,
            replace(written, folder=output),
            replace(stage, what=str(output), findings=findings),
            found.rows,
            calibration,
            model_line(server, str(output)),
            findings,
        )
        usual = quantised_budget(causal_config(locate(unnamed, weights=False))).usual
        made = replace(made, findings=(*findings, *written.findings, *_loss(made.stage, usual)))
        for finding in made.findings:
            listener.finding(finding)
        held = {
            file.relative_to(unnamed).as_posix(): sha256(file)
            for file in sorted(unnamed.rglob("*"))
            if file.is_file()
        }
        write_json(unnamed / PROOF, {**made.as_dict(), "files": held})
    return made


def _named(finding: Finding, unnamed: Path, output: Path) -> Finding:
    words = {name: getattr(finding, name) for name in ("what", "where", "why", "fix")}
    return replace(
        finding, **{name: text.replace(str(unnamed), str(output)) for name, text in words.items()}
    )


# Below this share of equal replies, of this many or more, most replies are different; below this
# share of equal likeliest tokens, that is more than one early difference does to a long reply.
_SAME_REPLIES, _FEWEST_REPLIES, _SAME_TOKENS = 0.5, 4, 0.9


def _loss(stage: Stage, usual: float) -> tuple[Finding, ...]:
    """What rounding costs the model. Args: usual: of predictions, see `Budget`."""
    apart = stage.apart
    assert apart is not None
    equal = f"{100 * apart.greedy:.0f} % of the likeliest tokens are equal"
    fix = "use more bits, for example --quant int8; truetune eval compares both folders' answers"
    if apart.relative > usual:
        return (
            Finding(
                "quantised-loses-much",
                "warning",
                f"so few bits degrade this model: log-probabilities differ by "
                f"{apart.relative:.2g} of the logits' spread, and {equal}",
                why=f"{usual:.2g} is usual for this number of bits; small models suffer more",
                fix=fix,
            ),
        )
    number = stage.numbers.get("replies", 0)
    same = stage.numbers.get("same_replies", 1.0)
    if number < _FEWEST_REPLIES or same >= _SAME_REPLIES:
        return ()
    if apart.greedy >= _SAME_TOKENS and "match" not in stage.numbers:
        # Replies to fixed prompts alone, which nobody trained: they wander in any case.
        return ()
    return (
        Finding(
            "quantised-replies-differ",
            "warning" if apart.greedy < _SAME_TOKENS else "note",
            f"rounding changes {number - round(same * number)} of {number} replies, and {equal}",
            why="this model does not tolerate so few bits: its likeliest tokens have only a small "
            "lead"
            if apart.greedy < _SAME_TOKENS
            else "one different token changes the rest of a reply; other wording need not be worse",
            fix=fix,
        ),
    )


# Two copies in float32 and the quantised one are held while they are compared.
_COPIES = 2.25


def _require_memory(files: ModelFiles) -> None:
    """On a CPU too much memory is no exception but the end of the process.

    Raises:
        ModelError: what is free surely does not suffice.
    """
    tensors = read_headers(weight_files(files))
    needed = int(4 * _COPIES * sum(facts.num_elements for facts in tensors.values()))
    free = available_bytes(torch.device("cpu"))
    if free and needed > free:
        raise ModelError(
            f"quantising and comparing needs about {gib(needed)} of memory, but only {gib(free)} "
            "is free",
            where=str(files.folder),
            why="the quantised model is compared with the model in float32, on the CPU",
            fix="use a machine with more memory, or quantise a merged model (truetune export RUN "
            "--to merged) with another tool",
            code="model-too-large",
        )


# Rows on which GPTQ is calibrated, as its authors and llm-compressor's examples do, and tokens of
# each at most.
_ROWS, _TOKENS = 256, 2048


def _calibration(
    source: str, folder: str, data: str | None, base: str | None, listener: Listener
) -> Calibration:
    """Rows as they are trained, evenly chosen.

    Raises:
        UsageError: there are none.
    """
    run = run_of(source)
    listener.stage("reading the rows to calibrate on")
    if data is not None:
        conversations = list(load(data).conversations)
        contract = PromptContract.load(load_tokenizer(folder)).fit(conversations)
        encoded = contract.encode_all(conversations)
        examples = [
            tuple(example.ids) for row in encoded if not isinstance(row, Refused) for example in row
        ]
        where = data
    elif run is None:
        raise UsageError(
            "GPTQ needs calibration rows, and there are none",
            where=source,
            why="the source is not a run, so there are no training rows to use",
            fix="add --data DATA: a file or folder of rows like those that will be served",
            code="quantised-rows",
        )
    else:
        recipe = recorded_recipe(run.file(RECIPE))
        try:
            surveyed = survey(
                dataclasses.replace(recipe, no_check=True, model=base or recipe.model), Listener()
            )
        except TruetuneError as error:
            raise UsageError(
                f"the rows that the run was trained on cannot be read: {error.what}",
                where=error.where,
                why="GPTQ is calibrated on them; they were moved or changed",
                fix="add --data DATA: a file or folder of rows like those that will be served",
                code="quantised-rows",
            ) from error
        examples = [tuple(example.ids) for example in surveyed.prepared.examples]
        where = "the rows that the run was trained on"
    if not examples:
        raise UsageError(
            "GPTQ needs calibration rows, and none of the rows can be used",
            where=where,
            why="the model's chat template accepts none of them",
            fix="truetune inspect MODEL --data DATA shows the reasons",
            code="quantised-rows",
        )
    chosen = tuple(ids[:_TOKENS] for ids in evenly(examples, _ROWS))
    return Calibration(chosen, where, len(examples))
