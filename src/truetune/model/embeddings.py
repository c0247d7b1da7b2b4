"""Read the input embedding and the output head of a model, and find embeddings that were never
trained.

input   the weight files of a model folder, or a table in memory; ids to look at closely
does    reads embedding and output head in pieces of some thousand rows
output  TableFacts: the norm of every row, and for the asked ids their nearest other row;
        ChatRows: the verdict on those ids
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
from truetune.system.lazy import torch

if TYPE_CHECKING:
    from pathlib import Path


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
        empty if the tables are not in the files under the model's own names.

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
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        table = file.get_slice(name)
        return table_facts(name, table, table.get_shape(), ids)


def table_facts(name: str, table: Any, shape: Sequence[int], ids: Sequence[int]) -> TableFacts:
    """Facts of one table.

    Args:
        table: (V, H), in memory or in a file; read a piece at a time.
        ids: rows whose nearest other row is looked for.
    """
    rows, hidden = shape
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
        norms[start : start + len(piece)] = lengths.cpu().numpy()
        total += piece.sum(dim=0).cpu()
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
    cosines = unit @ (piece / lengths.clamp_min(1e-12).unsqueeze(1)).T
    for k, i in enumerate(asked):
        if start <= i < start + len(piece):
            cosines[k, i - start] = -2.0
    value, at = (found.cpu() for found in cosines.max(dim=1))
    better = value > best
    best[better] = value[better]
    where[better] = at[better] + start


# ------------------------------------------------------------------ trained or not

# A row this like another was copied from it, or neither was ever trained.
_SAME = 0.99


@dataclass(frozen=True)
class ChatRows:
    """Tokens of a model, judged against its other rows.

    Attributes:
        trained, untrained: ids by verdict; ids that nothing can be said of are in neither.
        why: what was seen, one line each untrained id.
        random: the table as a whole looks never trained; copies of other rows are reported all the
            same.
    """

    trained: tuple[int, ...]
    untrained: tuple[int, ...]
    why: dict[int, str]
    random: bool


def judge_rows(table: TableFacts, ids: Sequence[int], num_tokens: int) -> ChatRows:
    """Judge whether the embeddings of some tokens were ever trained.

    Args:
        ids: of the tokens, whose nearest rows were looked for.
        num_tokens: ids that the tokenizer has; rows above are padding that no text trains.
    """
    norms = table.norms
    asked = [i for i in ids if 0 <= i < len(norms)]
    others = np.ones(len(norms), bool)
    others[[*asked, *range(num_tokens, len(norms))]] = False
    text, unused = norms[others], norms[num_tokens:]
    middle, low = (float(np.quantile(text, q)) if len(text) else 0.0 for q in (0.5, 0.001))
    padding = len(unused) >= 8 and not table.looks_random and not _among(middle, unused)
    trained, why = [], {}
    for i in asked:
        neighbour, cosine = table.nearest.get(i, (-1, 0.0))
        norm = float(norms[i])
        if cosine > _SAME and neighbour >= 0:
            why[i] = f"its embedding is the same as that of token {neighbour} (cosine {cosine:.4f})"
        elif norm < 0.5 * middle and norm <= low:
            # A row of zeros, or the mean of all rows, as a table that grows is filled.
            why[i] = f"its embedding has {norm / middle:.2f} times the usual norm"
        elif padding and _among(norm, unused):
            why[i] = "its embedding has the norm of padding tokens, which no text trains"
        elif not table.looks_random:
            trained.append(i)
    return ChatRows(tuple(trained), tuple(why), why, table.looks_random)


def _among(value: float, values: Floats) -> bool:
    """Whether a length lies where nearly all of these lie, with a little room."""
    low, high = np.quantile(values, [0.01, 0.99])
    room = 0.02 * max(float(high), 1e-12)
    return bool(low - room <= value <= high + room)
