"""Add tokens: assign their ids, initialise their embeddings, and train only those embeddings.

input   texts to add; a tokenizer; a model
does    takes ids above the tokenizer's, rows from the padded head if it has room, else a longer
        table; starts each row at the mean of the pieces that the text stood for; trains the rows
        in the input embedding and in the output head, tied or not, and nothing else of the tables
output  an adapter in peft's own format (trainable_token_indices), which PeftModel opens

peft's layer copies the whole table in each forward pass and makes a dense gradient of it. The
layer here computes the base's output and puts the few rows over it: equal to 4e-7 in float32, and
four times faster with 152k x 896 (measured in docs/log.md).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truetune.errors import ModelError, UsageError
from truetune.findings import Finding
from truetune.model.architecture import embedding_rows, head_is_tied
from truetune.model.source import ADAPTER_CONFIG, read_json
from truetune.model.tokenizer import num_ids
from truetune.system.lazy import torch


@dataclass(frozen=True)
class NewToken:
    """A token whose row is trained.

    Attributes:
        text: as it stands in the rows.
        id: of the extended tokenizer.
        pieces: ids that the text had before; () if the token was there already, whose row
            keeps its value.
    """

    text: str
    id: int
    pieces: tuple[int, ...]


def add_tokens(tokenizer: Any, texts: Sequence[str]) -> tuple[list[NewToken], list[Finding]]:
    """Extend a tokenizer, in place.

    Added tokens are not special: servers leave special ones out of the text that they return, and
    a reasoning parser looks for its markers there.

    Raises:
        UsageError: an empty text, or one with white space at its ends (tokenizers strip it).
    """
    from tokenizers import AddedToken

    texts = list(dict.fromkeys(texts))
    wrong = [text for text in texts if not text.strip() or text != text.strip()]
    if wrong:
        raise UsageError(
            f"{wrong[0]!r} cannot be a token",
            why="it is empty, or begins or ends with whitespace",
            fix="pass text without surrounding whitespace, for example --add-token "
            "'<|think_start|>'",
            code="add-token",
        )
    known = tokenizer.get_vocab()
    pieces = {
        text: tuple(tokenizer.encode(text, add_special_tokens=False)) if text not in known else ()
        for text in texts
    }
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in texts if t not in known])
    tokens = [
        NewToken(text, int(tokenizer.convert_tokens_to_ids(text)), pieces[text]) for text in texts
    ]
    there = [token for token in tokens if token.text in known]
    findings = [
        Finding(
            "token-exists",
            "note",
            f"{token.text!r} is already a token ({token.id}): its embedding is trained from its "
            "current value",
        )
        for token in there
    ]
    return tokens, findings


def make_room(model: Any, tokenizer_size: int) -> int:
    """Lengthen the tables of a model if the tokenizer has more ids than they have rows.

    Returns:
        How many rows were added; 0 where the padded head had room.
    """
    rows = embedding_rows(model)
    if tokenizer_size <= rows:
        return 0
    # mean_resizing draws from a fitted normal distribution: the new rows get their values below.
    model.resize_token_embeddings(tokenizer_size, mean_resizing=False)
    return tokenizer_size - rows


def grow_for(model: Any, folder: Path, tokenizer_size: int) -> None:
    """Make room for the rows of an adapter that was trained on a lengthened table.

    Raises:
        ModelError: it has rows that its tokenizer has no ids for.
    """
    indices = trained_ids(read_json(folder / ADAPTER_CONFIG))
    if max(indices, default=-1) < embedding_rows(model):
        return
    if max(indices) >= tokenizer_size:
        raise ModelError(
            f"the adapter has an embedding for id {max(indices)}, but its tokenizer ends at "
            f"{tokenizer_size - 1}",
            where=str(folder / ADAPTER_CONFIG),
            why="the tokenizer in the adapter's folder is not the one that it was trained with",
            fix="restore the tokenizer that was saved with the adapter",
            code="adapter-wrong-tokenizer",
        )
    make_room(model, tokenizer_size)


def trained_ids(adapter_config: dict[str, Any]) -> list[int]:
    """Ids whose rows an adapter holds."""
    found = adapter_config.get("trainable_token_indices") or []
    lists = found.values() if isinstance(found, dict) else [found]
    return sorted({int(i) for ids in lists for i in ids})


def row_targets(model: Any, tokens: Sequence[NewToken]) -> dict[str, list[int]]:
    """What peft's LoraConfig takes: path of each table -> ids. A tied head follows the embedding;
    one of its own must be named, or peft leaves it untrained without a word."""
    tables = [model.get_input_embeddings()]
    if not head_is_tied(model):
        tables.append(model.get_output_embeddings())
    ids = [token.id for token in tokens]
    return {_path(model, table): list(ids) for table in tables}


def _path(model: Any, module: Any) -> str:
    return next(path for path, found in model.named_modules() if found is module)


def mean_rows(table: torch.Tensor, tokens: Sequence[NewToken]) -> torch.Tensor:
    """First values (n, D) in float32: the mean of the pieces' rows; a known token's own row."""
    rows = [list(token.pieces) or [token.id] for token in tokens]
    return torch.stack([table[ids].float().mean(dim=0) for ids in rows])


def start_full_rows(model: Any, tokens: Sequence[NewToken]) -> None:
    """Put the first values into the tables of a model that is trained in full."""
    if not tokens:
        return
    tables = {id(t): t for t in (m.weight for m in _tables(model))}
    with torch.no_grad():
        for table in tables.values():
            ids = torch.tensor([token.id for token in tokens], device=table.device)
            table[ids] = mean_rows(table, tokens).to(table.dtype)


def start_adapter_rows(peft_model: Any, tokens: Sequence[NewToken]) -> None:
    """Put the first values into an adapter's rows."""
    with torch.no_grad():
        for _, layer in row_layers(peft_model):
            rows = layer.trainable_tokens_delta["default"]
            rows.copy_(mean_rows(layer.get_base_layer().weight, tokens))


def _tables(model: Any) -> list[Any]:
    head = model.get_output_embeddings()
    return [model.get_input_embeddings(), *([head] if head is not None else [])]


def row_layers(peft_model: Any) -> Iterator[tuple[str, Any]]:
    """Paths and layers that hold rows of their own (a tied head has none)."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    for path, module in peft_model.named_modules():
        if isinstance(module, TrainableTokensLayer) and not module.tied_adapter:
            yield path, module


def use_row_layers(peft_model: Any) -> None:
    """Let peft's layers of new tokens compute by rows; what they hold and save stays peft's."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    if any(isinstance(m, TrainableTokensLayer) for m in peft_model.modules()):
        from truetune.model.row_layer import RowLayer

        for module in peft_model.modules():
            if type(module) is TrainableTokensLayer:
                module.__class__ = RowLayer


@dataclass(frozen=True)
class RowsBefore:
    """The tables as training finds them.

    Attributes:
        rows: table's path -> rows of the new tokens (n, D), on CPU.
        others: table's path -> sha256 of all other rows; {} if all weights are trained.
    """

    rows: dict[str, torch.Tensor]
    others: dict[str, str]


def rows_now(
    model: Any, tokens: Sequence[NewToken], *, is_adapter: bool, at_start: bool = False
) -> RowsBefore:
    """The rows of new tokens, and what all others hash to.

    Args:
        at_start: an adapter's rows as they were before the first step, also when training was
            resumed from a checkpoint since: they follow from the base.
    """
    ids = [token.id for token in tokens]
    if is_adapter:
        layers = dict(row_layers(model))
        return RowsBefore(
            {
                path: mean_rows(layer.get_base_layer().weight.detach(), tokens).cpu()
                if at_start
                else layer.trainable_tokens_delta["default"].detach().float().cpu().clone()
                for path, layer in layers.items()
            },
            {p: _hash_others(m.get_base_layer().weight, ids) for p, m in layers.items()},
        )
    inner = {_path(model, module): module for module in _tables(model)}
    return RowsBefore({p: m.weight.detach()[ids].cpu().clone() for p, m in inner.items()}, {})


def _hash_others(table: torch.Tensor, ids: Sequence[int]) -> str:
    hashed = hashlib.sha256()
    edges = [-1, *sorted(set(ids)), len(table)]
    for low, high in itertools.pairwise(edges):
        # In blocks of rows: a table on the GPU is not copied whole.
        for start in range(low + 1, high, 8192):
            rows = table.detach()[start : min(start + 8192, high)].cpu().contiguous()
            hashed.update(rows.reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def rows_report(
    before: RowsBefore, after: RowsBefore, tokens: Sequence[NewToken]
) -> tuple[dict[str, Any], list[Finding]]:
    """What training did to the rows: new_tokens.json, and findings if they did not move.

    A change of any other row is reported as an error: it cannot happen unless something outside the
    adapter was trained.
    """
    moved = {
        path: [float(d) for d in (after.rows[path] - rows).abs().amax(dim=1)]
        for path, rows in before.rows.items()
    }
    identical = {path: after.others[path] == digest for path, digest in before.others.items()}
    report = {
        "tokens": [vars(token) for token in tokens],
        "largest_change": moved,
        "other_rows_identical": identical,
    }
    still = sorted(
        {tokens[i].text for changes in moved.values() for i, c in enumerate(changes) if c == 0}
    )
    findings = []
    if still:
        findings.append(
            Finding(
                "new-row-unmoved",
                "warning",
                f"training did not change the embeddings of {', '.join(map(repr, still))}",
                count=len(still),
                why="the token does not occur in the rows, or no gradient reaches its embedding",
                fix="remove it from --add-token, or use it in the rows",
            )
        )
    changed = [path for path, same in identical.items() if not same]
    if changed:
        findings.append(
            Finding(
                "other-rows-moved",
                "error",
                "embeddings of other tokens changed, although only new tokens were to be trained",
                where=changed[0],
                count=len(changed),
                why="something outside the adapter was trained",
                fix="please report this: it is a bug in truetune",
            )
        )
    return report, findings


def require_room(model_rows: int, tokenizer: Any, tokens: Sequence[NewToken]) -> None:
    """Raise if a tokenizer was beyond its model before anything was added.

    Raises:
        ModelError: rows between would start at random.
    """
    new = {token.id for token in tokens}
    beyond = [i for i in range(model_rows, num_ids(tokenizer)) if i not in new]
    if beyond:
        raise ModelError(
            f"the tokenizer has ids up to {max(beyond)}, but the model's embeddings end at "
            f"{model_rows - 1}: no token can be added",
            why="the embeddings in between would be random",
            fix="use the tokenizer that came with the weights",
            code="tokenizer-beyond-model",
        )
