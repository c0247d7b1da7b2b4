"""Readers: rows with the right line, and one error for each way a file cannot be read."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from truetune.data.read import read_file
from truetune.data.rows import Row, excerpt, names
from truetune.errors import DataError

ONE = {"text": "a"}
TWO = {"text": "b"}


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(path: Path) -> list[tuple[dict, int]]:
    return [(row.fields, row.line or row.index) for row in read_file(path)[0].rows]


def refused(path: Path, code: str) -> DataError:
    with pytest.raises(DataError) as caught:
        read_file(path)
    assert caught.value.code == code
    assert caught.value.exit_code == 2
    assert caught.value.where
    assert caught.value.fix
    return caught.value


# --- jsonl ---------------------------------------------------------------------------------------


def test_jsonl_counts_blank_lines_and_keeps_unicode_separators(tmp_path):
    path = write(tmp_path / "a.jsonl", '\ufeff{"text": "a"}\r\n\n  \n{"text": "x\u2028y"}')
    assert lines(path) == [(ONE, 1), ({"text": "x\u2028y"}, 4)]
    found, info = read_file(path)
    assert [row.where for row in found.rows] == [f"{path}:1", f"{path}:4"]
    assert info.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (info.path, info.num_rows, info.num_bytes) == (str(path), 2, path.stat().st_size)


def test_limit_reads_no_further(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": "b"}\n{broken')
    assert [row.fields for row in read_file(path, 2)[0].rows] == [ONE, TWO]
    refused(path, "broken-json")


@pytest.mark.parametrize(
    ("bad", "column", "why"),
    [
        ('{"text": "a', 10, "ends too early"),
        ("{'text': 'a'}", 2, "double quotes"),
        ('{"text": "a",}', None, "no comma after the last"),
        ('{"text": "a"} {"text": "b"}', 15, "two values"),
        ('{"text": "a\tb"}', 12, "line break or tab"),
        ('{"text": a}', 10, "by hand"),
    ],
)
def test_broken_json_names_line_column_and_cause(tmp_path, bad, column, why):
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n' * 16 + bad + "\n")
    error = refused(path, "broken-json")
    assert error.where == f"{path}:17"
    assert "line 17, column" in error.what
    assert column is None or f"column {column}:" in error.what
    assert why in error.why


def test_broken_json_is_quoted_without_control_characters(tmp_path):
    error = refused(write(tmp_path / "a.jsonl", '{"text": \x1b[31mred}'), "broken-json")
    assert "\x1b" not in str(error)
    assert "\\x1b[31m" in error.what


def test_an_array_or_pretty_object_named_jsonl_is_recognised(tmp_path):
    error = refused(write(tmp_path / "a.jsonl", '[\n{"text": "a"}\n]'), "broken-json")
    assert "name it .json" in error.why
    assert error.fix.endswith(f"a.jsonl {tmp_path / 'a.json'}")
    error = refused(write(tmp_path / "a.jsonl", '{\n"text": "a"\n}'), "broken-json")
    assert "name it .json" in error.why
    # Near miss: it has that name already.
    error = refused(write(tmp_path / "a.json", '[{"text": a}]'), "broken-json")
    assert "name it" not in error.why
    assert "sed -n 1p" in error.fix


def test_broken_json_has_the_fix_of_its_cause(tmp_path):
    error = refused(write(tmp_path / "a.jsonl", '{"text": "a"}\r{"text": "b"}'), "broken-json")
    assert "tr '\\r' '\\n'" in error.fix
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"text": "a"}\n{"text": b}\n'))
    command = refused(packed, "broken-json").fix.removeprefix("correct the line: ")
    shown = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert shown.stdout == '{"text": b}\n'
    error = refused(write(tmp_path / "a.jsonl", "<!DOCTYPE html><html></html>"), "broken-json")
    assert "web page" in error.why
    assert "download" in error.fix


@pytest.mark.parametrize(
    "value",
    [{"prompt": ["a", "b"], "completion": ["c", "d"]}, {"text": {"0": "a", "1": "b"}}],
)
def test_columns_of_pandas_are_no_rows(tmp_path, value):
    error = refused(write(tmp_path / "a.json", json.dumps(value)), "no-rows")
    assert "orient='records', lines=True" in error.fix


def test_a_table_with_tabs_named_csv(tmp_path):
    rows = lines(write(tmp_path / "a.csv", "prompt\ttext\na, b\tc\n"))
    assert rows == [({"prompt": "a, b", "text": "c"}, 2)]


@pytest.mark.parametrize("bad", ["[" * 100_000, '{"n": ' + "1" * 5000 + "}"])
def test_json_that_python_refuses(tmp_path, bad):
    assert refused(write(tmp_path / "a.jsonl", bad), "broken-json").where.endswith(":1")


@pytest.mark.parametrize("value", ["[1]", '"text"', "3", "null", "true"])
def test_row_not_an_object_is_a_finding(tmp_path, value):
    path = write(tmp_path / "a.jsonl", f'{{"text": "a"}}\n{value}\n{{"text": "b"}}')
    found, info = read_file(path)
    assert [row.line for row in found.rows] == [1, 3]
    (finding,) = found.findings
    assert (finding.code, finding.level) == ("row-not-an-object", "error")
    assert finding.where == f"{path}:2"
    assert info.num_rows == 3


def test_not_utf8_names_the_line(tmp_path):
    error = refused(write(tmp_path / "a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}'), "not-utf8")
    assert error.where.endswith("a.jsonl:2")
    assert "0xe9" in error.what
    error = refused(write(tmp_path / "a.csv", b"text\na\nb\n\xe9"), "not-utf8")
    assert error.where.endswith("a.csv:4")
    error = refused(write(tmp_path / "b.csv", "text\na".encode("utf-16")), "not-utf8")
    assert "UTF-16" in error.why
    assert lines(write(tmp_path / "ok.csv", "text\né")) == [({"text": "é"}, 2)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.md", "a.parquet"])
def test_empty_file(tmp_path, name):
    refused(write(tmp_path / name, ""), "empty-file")


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", "\n \n"), ("a.json", "[]"), ("a.csv", "text\n"), ("a.txt", " \n\n")],
)
def test_file_without_rows(tmp_path, name, content):
    refused(write(tmp_path / name, content), "empty-file")


def test_unknown_extension(tmp_path):
    assert (
        "did you mean .jsonl?"
        in refused(write(tmp_path / "a.jsonll", "{}"), "unknown-extension").fix
    )
    assert "has no extension" in refused(write(tmp_path / "data", "{}"), "unknown-extension").what
    assert lines(write(tmp_path / "A.JSONL", '{"text": "a"}')) == [(ONE, 1)]


def test_gzip(tmp_path):
    packed = gzip.compress(b'{"text": "a"}\n{"text": "b"}\n' * 100)
    assert len(lines(write(tmp_path / "a.jsonl.gz", packed))) == 200
    refused(write(tmp_path / "cut.jsonl.gz", packed[:-20]), "broken-gzip")
    refused(write(tmp_path / "no.jsonl.gz", b'{"text": "a"}'), "broken-gzip")
    assert lines(write(tmp_path / "a.csv.gz", gzip.compress(b"text\na"))) == [(ONE, 2)]


def test_unreadable_file(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", '{"text": "a"}')

    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)
    refused(path, "unreadable-file")


# --- json ----------------------------------------------------------------------------------------


def test_json_array_keeps_physical_lines(tmp_path):
    path = write(tmp_path / "a.json", '[\n  {"text":\n "a"}, {"text": "b"},\n\n{"text": "c"}\n]\n')
    assert lines(path) == [(ONE, 2), (TWO, 3), ({"text": "c"}, 5)]


def test_json_object_that_holds_one_list(tmp_path):
    path = write(
        tmp_path / "a.json", '{"version": "1, {}",\n "meta": [1],\n "rows": [\n{"text": "a"}]}'
    )
    assert lines(path) == [(ONE, 4)]
    path = write(tmp_path / "b.json", '{"other": [{"x": 1}], "data": [{"text": "a"}]}')
    assert lines(path) == [(ONE, 1)]
    error = refused(write(tmp_path / "c.json", '{"a": [{"x": 1}], "b": [{"x": 1}]}'), "no-rows")
    assert "a, b" in error.why
    refused(write(tmp_path / "d.json", '{"question": 3}'.replace("question", "q")), "no-rows")


def test_json_object_that_is_a_row(tmp_path):
    row = {"messages": [{"role": "user", "content": "q"}]}
    path = write(tmp_path / "a.json", json.dumps(row, indent=1))
    assert lines(path) == [(row, 1)]


def test_json_holding_json_lines(tmp_path):
    path = write(tmp_path / "a.json", '{"text": "a"}\n{\n"text": "b"}\n')
    assert lines(path) == [(ONE, 1), (TWO, 2)]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('[\n{"text": "a"},\n]', 2),
        ('[{"text": "a"}\n{"text": "b"}]', 2),
        ('[{"text": "a"}', 1),
        ('[{"text": "a"}]\n]', 2),
        ("text", 1),
    ],
)
def test_broken_json_array(tmp_path, text, line):
    path = write(tmp_path / "a.json", text)
    assert refused(path, "broken-json").where == f"{path}:{line}"


ROWS = st.lists(
    st.dictionaries(st.text(max_size=5), st.text() | st.integers() | st.none(), max_size=3),
    min_size=1,
    max_size=5,
)


@settings(max_examples=40)
@given(rows=ROWS, indent=st.sampled_from([None, 1]), ascii_only=st.booleans())
def test_json_round_trips(tmp_path, rows, indent, ascii_only):
    kwargs = {"ensure_ascii": True} if ascii_only else {}
    whole = write(tmp_path / "a.json", json.dumps(rows, indent=indent, **kwargs))
    assert [fields for fields, _ in lines(whole)] == rows
    each = write(tmp_path / "a.jsonl", "\n".join(json.dumps(row, **kwargs) for row in rows))
    assert lines(each) == [(row, number) for number, row in enumerate(rows, 1)]


# --- csv -----------------------------------------------------------------------------------------


def test_csv_physical_lines(tmp_path):
    text = '\ufeffprompt, completion\n"a\nb",c\n\nd,"e ""f"", g"\n'
    assert lines(write(tmp_path / "a.csv", text)) == [
        ({"prompt": "a\nb", "completion": "c"}, 2),
        ({"prompt": "d", "completion": 'e "f", g'}, 5),
    ]


def test_csv_delimiters(tmp_path):
    expected = [({"a": "1", "b": "2,5"}, 2)]
    assert lines(write(tmp_path / "a.tsv", "a\tb\n1\t2,5\n")) == expected
    assert lines(write(tmp_path / "a.csv", "a;b\n1;2,5\n")) == expected


def test_csv_long_field_leaves_the_global_limit(tmp_path):
    before = csv.field_size_limit()
    assert lines(write(tmp_path / "a.csv", "text\n" + "x" * 200_000))[0][1] == 2
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("row", ["d", "d,e,f"])
def test_ragged_csv(tmp_path, row):
    path = write(tmp_path / "a.csv", f"a,b\nc,d\n{row}\n")
    error = refused(path, "ragged-csv")
    assert error.where == f"{path}:3"
    assert f"{row.count(',') + 1} cells, but the header has 2" in error.what


@pytest.mark.parametrize(
    ("text", "line"), [('a,b\nc,"d\n', 2), ('a,b\n"c"x,d\n', 2), ("a,a\n1,2", 1)]
)
def test_broken_csv(tmp_path, text, line):
    path = write(tmp_path / "a.csv", text)
    assert refused(path, "broken-csv").where == f"{path}:{line}"


CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0"))


@settings(max_examples=40)
@given(cells=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=4))
def test_csv_round_trips(tmp_path, cells):
    path = tmp_path / "a.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("prompt", "completion"), *cells])
    expected = [{"prompt": a, "completion": b} for a, b in cells]
    assert [fields for fields, _ in lines(path)] == expected


# --- parquet -------------------------------------------------------------------------------------


def test_parquet_rows_are_numbered(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", None]}), path)
    found, _ = read_file(path)
    assert [row.fields for row in found.rows] == [ONE, {"text": None}]
    assert [row.where for row in found.rows] == [f"{path} row 1", f"{path} row 2"]
    assert found.findings == []
    assert len(read_file(path, 1)[0].rows) == 1
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    refused(path, "empty-file")


def test_nulls_that_arrow_adds_are_removed_and_told(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    def call(arguments: dict) -> list[dict]:
        function = {"name": "f", "arguments": arguments}
        return [{"role": "assistant", "tool_calls": [{"function": function}]}]

    path = tmp_path / "a.parquet"
    rows = [{"messages": call({"a": 1})}, {"messages": call({"b": 2})}]
    pq.write_table(pa.Table.from_pylist(rows), path)
    found, _ = read_file(path)
    assert [row.fields for row in found.rows] == rows
    (note,) = found.findings
    assert (note.code, note.level, note.count) == ("arrow-nulls", "note", 2)
    # Near miss: a null key of a turn itself says nothing, and is not told.
    rows = [{"messages": [{"role": "user", "name": "x"}, {"role": "user", "content": "q"}]}]
    pq.write_table(pa.Table.from_pylist(rows), path)
    found, _ = read_file(path)
    assert found.rows[0].fields == rows[0]
    assert found.findings == []


@pytest.mark.parametrize("content", [b"version https://git-lfs", b"PAR1" + b"\0" * 40])
def test_not_parquet(tmp_path, content):
    pytest.importorskip("pyarrow")
    refused(write(tmp_path / "a.parquet", content), "not-parquet")


# --- text ----------------------------------------------------------------------------------------


def test_short_text_file_is_one_row(tmp_path):
    path = write(tmp_path / "a.txt", "\n\n= A =\r\n\r\nb\n\n")
    assert lines(path) == [({"text": "= A =\n\nb"}, 3)]
    assert read_file(path)[0].findings == []
    assert lines(write(tmp_path / "a.md", "# A\n\nb\n")) == [({"text": "# A\n\nb\n"}, 1)]


def test_long_text_file_is_cut_at_blank_lines(tmp_path):
    long = "x" * 3000
    path = write(tmp_path / "a.txt", f"{long}\n\n{long}\n\n\n\n= B =\n\nend")
    assert lines(path) == [({"text": f"{long}\n\n{long}"}, 1), ({"text": "= B =\n\nend"}, 7)]
    (note,) = read_file(path)[0].findings
    assert (note.code, note.level, note.count) == ("text-pieces", "note", 2)
    assert len(read_file(path, 1)[0].rows) == 1


@settings(max_examples=30)
@given(st.lists(st.sampled_from(["", " ", "a", "b" * 1999, "c" * 4001]), min_size=1, max_size=20))
def test_pieces_hold_all_the_text(tmp_path, parts):
    text = "\n".join([*parts, "end"])
    rows = lines(write(tmp_path / "a.txt", text))
    kept = [line for fields, _ in rows for line in fields["text"].split("\n") if line.strip()]
    assert kept == [line for line in text.split("\n") if line.strip()]
    for fields, line in rows:
        assert text.split("\n")[line - 1] == fields["text"].split("\n")[0]
    assert all(len(fields["text"]) >= 3999 for fields, _ in rows[:-1])


# --- quoting -------------------------------------------------------------------------------------


def test_quotes_are_safe_and_short():
    assert excerpt("a\x1b\u202e\ud800") == r"'a\x1b\u202e\ud800'"
    assert excerpt("x" * 61) == "'" + "x" * 60 + "'..."
    assert names(["a", "b\x1b", ""]) == r"a, 'b\x1b', ''"
    assert names([str(i) for i in range(32)]).endswith("29 and 2 more")
    assert Row({}, "f", 3, 5).where == "f:5"
    assert Row({}, "f", 3).where == "f row 3"
