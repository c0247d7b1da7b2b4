"""Finish a pretraining run: a model folder -> README.md and SHA256SUMS in it."""

from __future__ import annotations

import json
from pathlib import Path

from truetune.lab.measure import Measurement, measure
from truetune.lab.world import MAX_ADDEND, World
from truetune.run_dir import LOCK, sha256


def finish(folder: Path, num_items: int | None = None) -> None:
    """Measure the saved model as any user would, then write its card and checksums.

    Args:
        folder: what `pretrain` wrote.
        num_items: cloze items to ask of each set, a fixed random choice; all of them where None.
    """
    seed = json.loads((folder / "pretraining.json").read_text())["seed"]
    text = card(folder, measure(folder, seed=seed, num_items=num_items))
    (folder / "README.md").write_text(text, encoding="utf-8")
    (folder / "SHA256SUMS").write_text(checksums(folder), encoding="utf-8")


def checksums(folder: Path) -> str:
    """What `sha256sum --check` reads: a line for every file but the card, the sums and the lock."""
    described = {path.name for path in folder.iterdir() if path.is_file()}
    described -= {"README.md", "SHA256SUMS", LOCK}
    return "".join(f"{sha256(folder / name)}  {name}\n" for name in sorted(described))


def card(folder: Path, found: Measurement) -> str:
    """The model card: `card.md` filled with a run's settings, its log, and what was measured."""
    run = json.loads((folder / "pretraining.json").read_text())
    last = json.loads((folder / "training_log.jsonl").read_text().splitlines()[-1])
    world = World.generate(run["seed"])
    kinds = ("places", "rivers", "animals", "crafts", "opposites")
    heading, *body = found.table()
    table = [heading, ["---"] * len(heading), *body]
    template = (Path(__file__).parent / "card.md").read_text(encoding="utf-8")
    return template.format(
        run=run,
        last=last,
        num={kind: len(getattr(world, kind)) for kind in kinds},
        max_addend=MAX_ADDEND,
        parameters_M=_num_parameters(folder) / 1e6,
        tokens_M=last["tokens"] / 1e6,
        minutes=last["elapsed"] / 60,
        head_size=run["shape"]["hidden_size"] // run["shape"]["num_heads"],
        rows="\n".join(f"| {' | '.join(row)} |" for row in table),
        others="\n".join(f"- {line}" for line in found.lines()),
    )


def _num_parameters(folder: Path) -> int:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
