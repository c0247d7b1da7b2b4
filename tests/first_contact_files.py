"""Files in the shapes of published fine-tuning sets, in words of our own."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Write = Callable[[Path], Path]
NUMBER = 6


def _each() -> Iterator[tuple[str, str]]:
    for i in range(NUMBER):
        yield f"What is {i} and {i}?", f"It is {2 * i}."


def _turns(**extra: Any) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": ask},
                {"role": "assistant", "content": say},
            ],
            **extra,
        }
        for ask, say in _each()
    ]


def _shared(system: str = "", **extra: Any) -> list[dict[str, Any]]:
    first = [{"from": "system", "value": system}] if system else []
    return [
        {
            "conversations": [
                *first,
                {"from": "human", "value": ask},
                {"from": "gpt", "value": say},
            ],
            **extra,
        }
        for ask, say in _each()
    ]


def _rows(**columns: Any) -> list[dict[str, Any]]:
    """Columns: a text, or what makes one of question and answer."""
    return [
        {name: make(ask, say) if callable(make) else make for name, make in columns.items()}
        for ask, say in _each()
    ]


def _ask(ask: str, say: str) -> str:
    return ask


def _say(ask: str, say: str) -> str:
    return say


def jsonl(rows: list[dict[str, Any]], name: str = "rows.jsonl") -> Write:
    def write(folder: Path) -> Path:
        path = folder / name
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        if name.endswith(".gz"):
            content = gzip.compress(content)
        elif name.endswith(".zst"):
            import pyarrow as pa

            sink = pa.BufferOutputStream()
            with pa.CompressedOutputStream(sink, "zstd") as packed:
                packed.write(content)
            content = sink.getvalue().to_pybytes()
        path.write_bytes(content)
        return path

    return write


def array(rows: list[dict[str, Any]], indent: int | None = None) -> Write:
    def write(folder: Path) -> Path:
        path = folder / "rows.json"
        path.write_text(json.dumps(rows, indent=indent), encoding="utf-8")
        return path

    return write


def parquet(rows: list[dict[str, Any]]) -> Write:
    def write(folder: Path) -> Path:
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = folder / "train-00000-of-00001.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path

    return write


def table(rows: list[dict[str, Any]], *, start: str = "", delimiter: str = ",") -> Write:
    def write(folder: Path) -> Path:
        path = folder / "rows.csv"
        with open(path, "w", newline="", encoding="utf-8") as file:
            file.write(start)
            writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
        return path

    return write


def shards(rows: list[dict[str, Any]]) -> Write:
    def write(folder: Path) -> Path:
        half = len(rows) // 2
        for number, part in enumerate((rows[:half], rows[half:])):
            jsonl(part, f"train-{number:05}-of-00002.jsonl")(folder)
        (folder / "README.md").write_text("# A set\n")
        return folder

    return write


def prose(folder: Path) -> Path:
    path = folder / "book.txt"
    path.write_text("\n\n".join(["A river runs past the mill. " * 160] * 3), encoding="utf-8")
    return path


_SYSTEM = "You answer briefly."
_THOUGHT = "<think>\nTwice the number.\n</think>\n\n"
_WRITTEN = "Below is an instruction. Write a response.\n\n### Instruction:\n"
# Name: (what writes it, conversations in it).
FILES: dict[str, tuple[Write, int]] = {
    "alpaca": (array(_rows(instruction=_ask, input="", output=_say), indent=4), NUMBER),
    "code-alpaca": (array(_rows(instruction="Double it.", input=_ask, output=_say)), NUMBER),
    "alpaca with text": (
        parquet(_rows(instruction=_ask, input="", output=_say, text=lambda a, s: _WRITTEN + a + s)),
        NUMBER,
    ),
    "dolly": (
        jsonl(_rows(instruction=_ask, context="", response=_say, category="open_qa")),
        NUMBER,
    ),
    "sharegpt": (array(_shared(id="x_0")), NUMBER),
    "openhermes": (array(_shared(_SYSTEM, source="made", category=None)), NUMBER),
    "slimorca": (
        jsonl(
            [
                {"conversations": [turn | {"weight": None} for turn in row["conversations"]]}
                for row in _shared(_SYSTEM)
            ]
        ),
        NUMBER,
    ),
    "openai messages": (jsonl(_turns()), NUMBER),
    "ultrachat": (parquet([r | {"prompt": "?", "prompt_id": "0a"} for r in _turns()]), NUMBER),
    "no_robots": (parquet([r | {"prompt": "?", "category": "QA"} for r in _turns()]), NUMBER),
    "tulu mixture": (parquet(_turns(id="made_1", source="ai/made")), NUMBER),
    "oasst-like pairs": (
        jsonl(
            [
                {
                    "messages": [
                        {"role": "prompter", "content": a},
                        {"role": "assistant", "content": s},
                    ]
                }
                for a, s in _each()
            ]
        ),
        NUMBER,
    ),
    "lima": (
        jsonl(
            [
                {
                    "conversations": [
                        {"role": "user", "content": a},
                        {"role": "assistant", "content": s},
                    ],
                    "source": "made",
                }
                for a, s in _each()
            ]
        ),
        NUMBER,
    ),
    "metamath": (
        array(_rows(type="GSM_AnsAug", query=_ask, original_question="?", response=_say)),
        NUMBER,
    ),
    "gsm8k": (parquet(_rows(question=_ask, answer=lambda a, s: f"{s}\n#### 2")), NUMBER),
    "openorca": (
        parquet(_rows(id="t.1", system_prompt=_SYSTEM, question=_ask, response=_say)),
        NUMBER,
    ),
    "open-platypus": (
        parquet(_rows(input="", output=_say, instruction=_ask, data_source="m")),
        NUMBER,
    ),
    "numbers with solutions": (parquet(_rows(source="m", problem=_ask, solution=_say)), NUMBER),
    "semicolons": (table(_rows(prompt=_ask, completion=_say), delimiter=";"), NUMBER),
    "csv with a mark": (table(_rows(question=_ask, answer=_say), start="\ufeff"), NUMBER),
    "shards": (shards(_turns()), NUMBER),
    "gz": (jsonl(_turns(), "rows.jsonl.gz"), NUMBER),
    "zst": (jsonl(_turns(), "rows.jsonl.zst"), NUMBER),
    "text": (prose, 3),
    "array on one line": (array(_turns()), NUMBER),
}
