"""Estimate the memory of an Arrow column as Python values from its lengths, without converting
it."""

from __future__ import annotations

from typing import Any

# A reference in a list, and an object beside what it holds; Python's own take more.
_REFERENCE, _OBJECT = 8, 64


def decoded_bytes(column: Any) -> int:
    """Return a lower bound, in bytes, for the values of a column; a repeated text counts each time.

    A dictionary column, in a list or not, holds a text once and names it by its number.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    kind, own = column.type, _REFERENCE * len(column)
    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return decoded_bytes(column.storage)
    if types.is_dictionary(kind):
        return own + _of_dictionary(column)
    if types.is_map(kind):
        first, last = column.offsets[0].as_py(), column.offsets[-1].as_py()
        parts = (column.keys, column.items)
        return own + sum(decoded_bytes(part.slice(first, last - first)) for part in parts)
    if types.is_struct(kind):
        return own + _OBJECT * len(column) + sum(map(decoded_bytes, column.flatten()))
    if types.is_nested(kind):
        return own + _OBJECT * len(column) + decoded_bytes(column.flatten())
    if types.is_string_view(kind) or types.is_binary_view(kind):
        return own + sum(value.as_buffer().size for value in column if value.is_valid)
    if types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind):
        return own + (pc.sum(pc.binary_length(column)).as_py() or 0)
    return own + int(column.nbytes)


def _of_dictionary(column: Any) -> int:
    import pyarrow as pa
    import pyarrow.compute as pc

    values, numbers = column.dictionary, column.indices.drop_null()
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        return pc.sum(pc.take(pc.binary_length(values), numbers)).as_py() or 0
    counts = pc.value_counts(numbers)
    return sum(
        count.as_py() * decoded_bytes(values.slice(number.as_py(), 1))
        for number, count in zip(*counts.flatten(), strict=True)
    )
