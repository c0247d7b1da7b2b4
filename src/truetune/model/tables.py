"""The two tables of a model that have a row a token, read without loading the model.

input   the weight files of a model folder; ids to look at closely
does    reads embedding and output head in pieces of some thousand rows
output  TableFacts: the norm of every row, and for the asked ids their nearest other row
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from truetune.model.architecture import causal_config, meta_model
from truetune.model.source import ModelFiles
from truetune.model.weights import read_headers, weight_files

if TYPE_CHECKING:
    from pathlib import Path

    import torch

_PIECE = 8192

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class TableFacts:
    """One table.

    Attributes:
        name: of the tensor in the weight files.
        norms: (V,) length of each row.
        nearest: id -> (another row, cosine with it): the one of all rows that is most alike.
        drift: length of the mean row over the mean length; near 0 for random rows.
        hidden: width of a row.
        finite: whether every number is.
    """

    name: str
    norms: Floats
    nearest: dict[int, tuple[int, float]]
    drift: float
    hidden: int
    finite: bool

    @property
    def looks_random(self) -> bool:
        """Whether the rows are like independent draws of one normal distribution.

        Lengths of such rows vary by 1 / sqrt(2 hidden), their mean is as long as a row over the
        square root of their number; training leaves neither so.
        """
        mean = float(self.norms.mean())
        if not mean:
            return True
        spread = float(self.norms.std()) / mean
        return spread < 2.0 / np.sqrt(2 * self.hidden) and self.drift < 4.0 / np.sqrt(
            len(self.norms)
        )


def read_tables(files: ModelFiles, ids: Sequence[int]) -> dict[str, TableFacts]:
    """`input` and, where the head is a matrix of its own, `head`.

    Args:
        files: a model folder; an adapter's base, for an adapter.
        ids: rows whose nearest other row is looked for.

    Returns:
        empty where the tables are not in the files under the model's own names.

    Raises:
        ModelError: no weights, or damaged ones.
    """
    paths = weight_files(files)
    model = meta_model(causal_config(files))
    names = {id(value): name for name, value in model.named_parameters()}
    wanted = {"input": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    found: dict[str, TableFacts] = {}
    stored: dict[str, Path] = {n: path for path in paths for n in read_headers([path])}
    seen: set[str] = set()
    for kind, module in wanted.items():
        name = names.get(id(getattr(module, "weight", None)), "")
        if name in stored and name not in seen:
            seen.add(name)
            found[kind] = _read_table(stored[name], name, ids)
    return found


def _read_table(path: Path, name: str, ids: Sequence[int]) -> TableFacts:
    import torch
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        table = file.get_slice(name)
        rows, hidden = table.get_shape()
        asked = [i for i in dict.fromkeys(ids) if 0 <= i < rows]
        own = torch.stack([table[i : i + 1][0].float() for i in asked]) if asked else None
        unit = None if own is None else torch.nn.functional.normalize(own, dim=1)
        norms = np.empty(rows, np.float32)
        best = torch.full((len(asked),), -2.0)
        where = torch.zeros(len(asked), dtype=torch.long)
        total = torch.zeros(hidden)
        finite = True
        for start, piece in _pieces(table, rows):
            finite &= bool(torch.isfinite(piece).all())
            lengths = piece.norm(dim=1)
            norms[start : start + len(piece)] = lengths.numpy()
            total += piece.sum(dim=0)
            if unit is not None:
                _keep_nearest(piece, lengths, start, unit, asked, best, where)
    mean = float(norms.mean()) or 1.0
    nearest = {i: (int(where[k]), float(best[k])) for k, i in enumerate(asked)}
    return TableFacts(name, norms, nearest, float(total.norm()) / rows / mean, hidden, finite)


def _pieces(table: Any, rows: int) -> Iterator[tuple[int, torch.Tensor]]:
    for start in range(0, rows, _PIECE):
        yield start, table[start : start + _PIECE].float()


def _keep_nearest(
    piece: torch.Tensor,
    lengths: torch.Tensor,
    start: int,
    unit: torch.Tensor,
    asked: Sequence[int],
    best: torch.Tensor,
    where: torch.Tensor,
) -> None:
    """Cosines of the asked rows with a piece of the table; a row is not its own neighbour."""
    import torch

    cosines = unit @ (piece / lengths.clamp_min(1e-12).unsqueeze(1)).T
    for k, i in enumerate(asked):
        if start <= i < start + len(piece):
            cosines[k, i - start] = -2.0
    value, at = cosines.max(dim=1)
    better = value > best
    best[better] = value[better]
    where[better] = at[better] + start
    assert isinstance(best, torch.Tensor)
