"""Files that nobody wrote on purpose: sound ones in every format, and what random changes make."""

from __future__ import annotations

import gzip
import io
import json
import random
from collections.abc import Iterator
from typing import Any

_ROWS = [
    {"prompt": "2+1?", "completion": "3.", "n": None},
    {"prompt": "caf\u00e9 \U0001f600", "completion": 'line\nbreak, "quoted"', "n": 1.5},
]
_CHAT: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "f", "arguments": '{"a": [1, {"b": NaN}]}'}}],
        },
        {"role": "tool", "content": "7", "tool_call_id": "x"},
        {"role": "assistant", "content": "Seven.", "weight": 1},
    ],
    "tools": [{"name": "f", "parameters": {"type": "object"}}],
}
_TASK = {"instruction": "add", "instances": [{"input": "1 1", "output": "2"}, {"output": "3"}]}
_RECIPE = """\
model: some/model   # a comment
data: rows.jsonl
learning_rate: 1e-4
lora: true
stop: ["<|end|>", 'x']
template_arg: {enable_thinking: false, depth: &d [1, 2], again: *d}
date: 2026-01-02
"""
# What breaks readers: pieces that are put into files at any place.
PIECES: tuple[bytes, ...] = (
    *(b"\x00", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\r", b"\n", b"\n\n", b"\xe2\x80\xa8"),
    *(b'"', b"'", b"\\", b"\\ud800", b"{", b"}", b"[", b"]", b",", b":", b"[[[[", b"{}", b"[]"),
    *(b"null", b"NaN", b"-Infinity", b"1e999", b"9" * 400, b"true", b'""', b'{"a":1,"a":2}'),
    *(b'"messages"', b'"role"', b'"text"', b"*a", b"&a", b"!!python/name:os", b"<<: *d", b"? "),
    *(b"- ", b"---\n", b"...", b"%", b"\t", b"|", b"=", b"PAR1", b"\x1f\x8b", b"\x28\xb5\x2f\xfd"),
)


def seeds() -> dict[str, list[bytes]]:
    """Sound files by extension."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    jsonl = "\n".join(json.dumps(row) for row in _ROWS).encode()
    chat, task = json.dumps(_CHAT).encode(), json.dumps(_TASK).encode()
    table = b'prompt,completion,n\r\n2+1?,3.,\r\n"a ""b""","x,\ny",2\r\n'
    parquets = []
    turns = [turn for turn in _CHAT["messages"] if isinstance(turn["content"], str)]
    for rows in (_ROWS, [{"messages": turns, "tools": "[]"}], [{"text": "a" * 50}] * 40):
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), sink, compression="none")
        parquets.append(sink.getvalue())
    return {
        "jsonl": [jsonl, chat, task, chat + b"\n" + task],
        "json": [
            json.dumps(_ROWS).encode(),
            json.dumps([_CHAT], indent=1).encode(),
            json.dumps({"version": 1, "data": _ROWS}).encode(),
            jsonl,
            chat,
        ],
        "csv": [table, table.replace(b",", b";"), b"text\nabc\n"],
        "tsv": [table.replace(b",", b"\t")],
        "txt": [b"A line.\n\n" * 30, "caf\u00e9\n".encode() * 900],
        "parquet": parquets,
        "jsonl.gz": [gzip.compress(jsonl), gzip.compress(chat)],
        "jsonl.zst": [_zstd(jsonl), _zstd(chat)],
        "yaml": [_RECIPE.encode()],
    }


def mutants(extension: str, number: int, seed: int) -> Iterator[bytes]:
    """Files made of sound ones by one to eight changes; the same for the same seed.

    Of packed files every second one is a sound archive of a changed file.
    """
    chance, found = random.Random(seed), seeds()
    packs = {"jsonl.gz": gzip.compress, "jsonl.zst": _zstd}
    for at in range(number):
        pack = packs.get(extension) if at % 2 else None
        sound = found["jsonl" if pack else extension]
        data = bytearray(chance.choice(sound))
        for _ in range(chance.choice((1, 1, 2, 3, 8))):
            _change(data, chance, sound)
        yield pack(bytes(data)) if pack else bytes(data)


def _zstd(content: bytes) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def _change(data: bytearray, chance: random.Random, sound: list[bytes]) -> None:
    at = chance.randrange(len(data) + 1)
    end = min(at + chance.choice((1, 1, 2, 8, 40)), len(data))
    how = chance.randrange(8)
    if how == 0:
        del data[at:end]
    elif how == 1:
        del data[at:]
    elif how == 2:
        data[at:at] = chance.choice(PIECES)
    elif how == 3:
        data[at:end] = chance.choice(PIECES)
    elif how == 4 and at < len(data):
        data[at] ^= 1 << chance.randrange(8)
    elif how == 5:
        data[at:end] = chance.randbytes(end - at)
    elif how == 6:
        data[at:at] = data[at:end] * chance.choice((1, 2, 50))
    else:
        other = chance.choice(sound)
        start = chance.randrange(len(other) + 1)
        data[at:end] = other[start : start + 60]
