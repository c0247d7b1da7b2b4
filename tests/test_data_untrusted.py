"""Files that are not what they seem: refused with their place, read in bounds, never half-read."""

from __future__ import annotations

import gzip
import json
import os
import sys
import time
import tracemalloc
from pathlib import Path

import pytest

from truetune.data import files
from truetune.data.decoded import decoded_bytes
from truetune.data.files import MOST_TEXT
from truetune.data.load import load
from truetune.data.read import read_file
from truetune.errors import BadRows, DataError, InputError, TruetuneError
from truetune.recipe.sources import read_recipe
from truetune.system.bounded import bounded

ONE = {"text": "a"}
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refused(source: object, code: str) -> TruetuneError:
    start = time.monotonic()
    with pytest.raises(DataError) as caught:
        load(str(source))
    assert caught.value.code == code
    assert caught.value.exit_code == 2
    assert caught.value.where
    assert caught.value.fix
    assert time.monotonic() - start < 5
    return caught.value


# --- names that are no files ---------------------------------------------------------------------


@pytest.mark.parametrize("source", ["-", "/dev/stdin", "/dev/null"])
def test_a_stream_is_refused_at_once(source):
    error = refused(source, "data-is-stream")
    assert "> rows.jsonl" in error.fix


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    refused(tmp_path / "rows.jsonl", "data-is-stream")


@pytest.mark.parametrize(
    ("address", "fix"),
    [
        ("https://example.org/a/rows.jsonl", "curl -LO https://example.org/a/rows.jsonl"),
        ("https:/example.org/rows.jsonl", "curl -LO"),
        ("s3://bucket/rows.jsonl", "download it first"),
        ("https://huggingface.co/datasets/some/set", "give some/set"),
        ("hf://datasets/some/set", "give some/set"),
        ("hf://datasets/some/set@main", "give some/set"),
        (
            "https://huggingface.co/datasets/some/set/resolve/main/data/train.jsonl?download=true",
            "hf download some/set data/train.jsonl --repo-type dataset",
        ),
    ],
)
def test_a_web_address_says_how_to_get_it(address, fix):
    error = refused(address, "data-is-url")
    assert fix in error.fix
    assert error.where == address


def test_a_file_named_like_an_address_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("a:b.jsonl"), json.dumps(ONE))
    assert len(load("a:b.jsonl").conversations) == 1


def test_links_that_lead_nowhere(tmp_path):
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "b.jsonl")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "a.jsonl")
    assert "links back" in refused(tmp_path / "a.jsonl", "no-such-file").why
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nothing")
    refused(tmp_path / "gone.jsonl", "no-such-file")
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "rows.jsonl", json.dumps(ONE))
    (folder / "again").symlink_to(folder)
    assert len(load(folder).conversations) == 1


# --- archives ------------------------------------------------------------------------------------


def zstd(content: bytes) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as packed:
        packed.write(content)
    return sink.getvalue().to_pybytes()


def test_zstd(tmp_path):
    rows = b'{"text": "a"}\n{"text": "b"}\n' * 100
    path = write(tmp_path / "a.jsonl.zst", zstd(rows))
    assert [r.where for r in read_file(path)[0].rows] == [f"{path}:{n}" for n in range(1, 201)]
    # Frames one after the other, as pzstd writes them.
    assert len(load(write(tmp_path / "two.jsonl.zst", zstd(rows) * 2)).conversations) == 400
    for name, content in (("a.csv.zst", b"text\na\n"), ("a.json.zst", b'[{"text": "a"}]')):
        assert len(load(write(tmp_path / name, zstd(content))).conversations) == 1
    assert (
        "zstd -d" in refused(write(tmp_path / "cut.jsonl.zst", zstd(rows)[:-4]), "broken-zstd").fix
    )
    refused(write(tmp_path / "no.jsonl.zst", rows), "broken-zstd")


@pytest.mark.parametrize("name", ["bomb.jsonl.gz", "bomb.jsonl.zst", "bomb.json.gz", "bomb.csv.gz"])
@pytest.mark.parametrize("lines", [True, False])
def test_a_bomb_is_not_unpacked(tmp_path, monkeypatch, name, lines):
    monkeypatch.setattr(files, "_MOST_UNPACKED", 8 * 2**20)
    content = (b'{"text": "%s"}\n' % (b" " * 1000) if lines else b" ") * (
        40 * 2**20 // (1014 if lines else 1)
    )
    pack = gzip.compress if name.endswith("gz") else zstd
    path = write(tmp_path / name, pack(content))
    assert files.most_unpacked(path) < len(content)
    tracemalloc.start()
    error = refused(path, "unpacks-too-far")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 4 * files.most_unpacked(path)
    assert ("gunzip -k" if name.endswith("gz") else "zstd -d") in error.fix


def test_what_packs_well_is_no_bomb(tmp_path):
    row = json.dumps({"text": "The same long prompt stands in every row. " * 50}) + "\n"
    path = write(tmp_path / "a.jsonl.gz", gzip.compress((row * 5000).encode()))
    assert path.stat().st_size * 100 < len(row) * 5000  # packs to less than a hundredth
    assert len(load(path).conversations) == 5000


# --- parquet -------------------------------------------------------------------------------------


def parquet(path: Path, **columns: object) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)
    return path


def test_parquet_text_that_is_not_utf8_names_row_and_column(tmp_path):
    import pyarrow as pa

    raw = pa.array([b"good"] * 300 + [b"\xff\xfe"])
    text = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
    error = refused(parquet(tmp_path / "a.parquet", text=text), "parquet-value")
    assert error.where.endswith("a.parquet row 301")
    assert "'text'" in error.what


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        ("timestamp[ms]", 2**62),
        ("timestamp[ns]", 2**62 + 1),
        ("duration[s]", 2**60),
        ("date32[day]", 2**30),
        ("timestamp[us, tz=Nowhere/No]", 5),
        ("time64[ns]", 1),
    ],
)
def test_moments_beyond_python_stop_no_one_who_does_not_read_them(tmp_path, kind, number):
    import pyarrow as pa

    types = {
        "timestamp[ms]": pa.timestamp("ms"),
        "timestamp[ns]": pa.timestamp("ns"),
        "duration[s]": pa.duration("s"),
        "date32[day]": pa.date32(),
        "timestamp[us, tz=Nowhere/No]": pa.timestamp("us", tz="Nowhere/No"),
        "time64[ns]": pa.time64("ns"),
    }
    base = pa.int32() if kind.startswith("date32") else pa.int64()
    times = pa.array([1, number], base).cast(types[kind])
    loaded = load(parquet(tmp_path / "a.parquet", text=pa.array(["a", "b"]), created=times))
    assert [c.text for c in loaded.conversations] == ["a", "b"]
    nested = pa.StructArray.from_arrays([times], ["at"])
    path = parquet(tmp_path / "b.parquet", text=pa.array(["a", "b"]), more=nested)
    if kind.startswith(("duration", "date32")):
        assert "row 2" in refused(path, "parquet-value").where


def test_parquet_columns_of_one_name(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"]), path)
    assert "text" in refused(path, "duplicate-column").what
    inner = pa.StructArray.from_arrays([pa.array(["user"]), pa.array(["x"])], ["role", "role"])
    turns = pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), inner)
    pq.write_table(pa.Table.from_arrays([turns], ["messages"]), path)
    assert "messages.role" in refused(path, "duplicate-column").what
    assert len(load(parquet(path, text=["a"], Text=["b"])).conversations) == 1


def test_a_parquet_bomb_is_not_decoded(tmp_path, monkeypatch):
    import pyarrow as pa

    monkeypatch.setattr(files, "_MOST_UNPACKED", 8 * 2**20)
    long = pa.DictionaryArray.from_arrays(
        pa.array([0] * 4000, pa.int32()), pa.array(["x" * 20_000])
    )
    refused(parquet(tmp_path / "a.parquet", text=long.cast(pa.string())), "unpacks-too-far")
    many = pa.array([None] * 1_000_000, pa.string())
    refused(parquet(tmp_path / "b.parquet", text=many), "unpacks-too-far")


@pytest.mark.parametrize("store_schema", [True, False])
@pytest.mark.parametrize("nested", ["flat", "list", "struct", "map"])
def test_a_parquet_dictionary_counts_each_time_it_is_named(
    tmp_path, monkeypatch, nested, store_schema
):
    """A text of a megabyte, 20,000 times: less than 2 kB of file, 20 GB of rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(files, "_MOST_UNPACKED", 2**25)
    count = 20_000
    text = pa.DictionaryArray.from_arrays(
        pa.array([0] * count, pa.int32()), pa.array(["x" * 10**6])
    )
    ends = pa.array([0, count], pa.int32())
    column = {
        "flat": lambda: text,
        "list": lambda: pa.ListArray.from_arrays(ends, text),
        "struct": lambda: pa.ListArray.from_arrays(
            ends, pa.StructArray.from_arrays([text], ["content"])
        ),
        "map": lambda: pa.MapArray.from_arrays(ends, pa.array(["k"] * count), text),
    }[nested]()
    path = tmp_path / "a.parquet"
    table = pa.table({"messages": column})
    pq.write_table(table, path, compression="zstd", store_schema=store_schema)
    assert path.stat().st_size < 4000
    if not store_schema and sys.platform != "linux":
        pytest.skip("only Linux bounds what Arrow takes for a batch")
    before = peak_memory()
    with pytest.raises(DataError) as caught:
        read_file(path)
    assert caught.value.code == "unpacks-too-far"
    assert peak_memory() - before < 4 * 2**30


def peak_memory() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_what_arrow_columns_decode_to():
    import pyarrow as pa

    texts = pa.array(["abc", None, "d" * 1000])
    coded = texts.dictionary_encode()
    for column in (
        texts,
        coded,
        texts.cast(pa.large_string()),
        texts.cast(pa.string_view()),
        pa.array([["abc"], None, ["d" * 1000, ""]]),
        pa.array([{"a": "abc"}, None, {"a": "d" * 1000}]),
        pa.array([[("k", "abc")], None, [("k", "d" * 1000)]], pa.map_(pa.string(), pa.string())),
        pa.array([["abc", "d"], None, ["d" * 999, ""]], pa.list_(pa.string(), 2)),
    ):
        assert 1000 <= decoded_bytes(column) < 1400, column.type
        assert decoded_bytes(column.slice(0, 1)) < 200, column.type
    assert decoded_bytes(pa.concat_arrays([coded] * 50)) > 50 * 1000
    assert decoded_bytes(pa.array([[None] * 1000])) >= 8000
    assert decoded_bytes(pa.nulls(10)) == 80


def test_parquet_of_repeated_prompts_is_read_whole(tmp_path):
    import pyarrow as pa

    prompt = pa.array(["Answer in one word. " * 50] * 5000).dictionary_encode()
    messages = pa.array([[{"role": "user", "content": "hello " * 20}] * 3] * 5000)
    path = parquet(tmp_path / "a.parquet", prompt=prompt, completion=["b"] * 5000, also=messages)
    rows = read_file(path)[0].rows
    assert len(rows) == 5000
    assert rows[-1].fields["prompt"] == "Answer in one word. " * 50


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_bound_on_memory_ends_with_the_call():
    import resource

    import pyarrow as pa

    before = resource.getrlimit(resource.RLIMIT_DATA)
    with pytest.raises(pa.ArrowMemoryError), bounded(2**28):
        pa.allocate_buffer(2**33)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert pa.allocate_buffer(2**29).size == 2**29


# --- what parsers drop silently ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "pretty.json", "wrapped.json"])
def test_a_key_that_stands_twice(tmp_path, name):
    bad = '{"messages": [{"role": "user", "content": "a", "content": "b"}]}'
    good = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    text = {
        "a.jsonl": f"{good}\n{bad}\n{good}",
        "a.json": f"[{good}, {bad}, {good}]",
        "pretty.json": f"[\n{good},\n{bad},\n{good}]",
        "wrapped.json": f'{{"n": 1, "data": [{good},\n{bad},\n{good}]}}',
    }[name]
    path = write(tmp_path / name, text)
    loaded = load(path)
    assert len(loaded.conversations) == 2
    (finding,) = loaded.findings
    assert (finding.code, finding.level) == ("duplicate-key", "error")
    assert "'content'" in finding.what
    assert finding.where == loaded.places[1]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_key_that_stands_twice_in_every_row(tmp_path, name):
    """The reason is the rows' own, and not a schema that none of them has any more."""
    row = '{"prompt": "a", "prompt": "b", "completion": "c"}'
    with pytest.raises(BadRows) as caught:
        load(write(tmp_path / name, f"{row}\n{row}\n"))
    assert caught.value.what == "none of the 2 rows can be used"
    (finding,) = caught.value.findings
    assert (finding.code, finding.count) == ("duplicate-key", 2)


def test_a_list_of_rows_that_stands_twice(tmp_path):
    text = '{"data": [{"text": "a"}], "data": [{"text": "b"}]}'
    assert "'data'" in refused(write(tmp_path / "a.json", text), "duplicate-key").what
    # Near miss: the same key in two objects.
    text = '{"data": [{"text": "a"}, {"text": "b"}], "about": {"data": 1}}'
    assert len(load(write(tmp_path / "b.json", text)).conversations) == 2


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.txt", "a.json.gz"])
def test_a_pointer_of_git_lfs_is_no_data(tmp_path, name):
    assert "lfs pull" in refused(write(tmp_path / name, POINTER), "git-lfs-pointer").fix


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json", "a.txt", "a.md", "a.csv.gz"])
def test_nul_in_a_text_file_names_the_line(tmp_path, name):
    content = b"text\nfine\na\0b\n"
    packed = gzip.compress(content) if name.endswith("gz") else content
    error = refused(write(tmp_path / name, packed), "not-text")
    assert error.where.endswith(f"{name}:3")
    assert "tr -d" in error.fix


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt", "a.md"])
def test_an_endless_file_of_nothing_is_refused_at_its_first_line(tmp_path, name):
    path = write(tmp_path / name, "")
    os.truncate(path, 50 * 2**30)
    assert refused(path, "row-too-large" if name == "a.md" else "not-text").where.endswith(":1")
    if name == "a.jsonl":  # behind a row, and far behind the first block
        good = write(path, b'{"text": "a"}\n' * 100_000)
        os.truncate(good, 50 * 2**30)
        assert refused(good, "not-text").where.endswith(":100001")


LONG = b"x y z w " * (MOST_TEXT // 8)


@pytest.mark.parametrize(
    ("name", "head", "tail", "place"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "', b'"}\n', ":2"),
        ("a.jsonl.gz", b'{"text": "a"}\n{"text": "', b'"}\n', ":2"),
        ("a.json", b'[{"text": "a"},\n{"text": "', b'"},\n{"text": "b"}]', ":2"),
        ("last.json", b'[{"text": "a"},\n{"text": "', b'"}]', ":2"),
        ("one.json", b'{"text": "', b'"}', ":1"),
        ("a.csv", b'text,b\na,b\n"', b'",c\n', ":3"),
        ("open.csv", b'text,b\na,b\n"', b"", ":3"),
        ("a.txt", b"one\n\n\ntwo ", b"", ":4"),
        ("a.md", b"# A\n", b"", ":1"),
    ],
)
def test_a_row_beyond_any_context_is_too_large(tmp_path, name, head, tail, place):
    content = head + LONG + tail
    path = write(tmp_path / name, gzip.compress(content, 1) if name.endswith("gz") else content)
    assert refused(path, "row-too-large").where == f"{path}{place}"


def test_a_row_too_large_of_many_lines_or_cells(tmp_path):
    lines = (b"x" * 99 + b"\n") * (MOST_TEXT // 100 + 1)
    path = write(tmp_path / "a.csv", b'text,b\na,b\n"' + lines + b'",c\n')
    assert refused(path, "row-too-large").where == f"{path}:3"
    half = LONG[: MOST_TEXT // 2 + 1]
    path = write(tmp_path / "b.csv", b"prompt,completion\n" + half + b"," + half + b"\n")
    assert refused(path, "row-too-large").where == f"{path}:2"
    path = write(tmp_path / "a.txt", b"one\n" * 2000 + b"\n" + lines)  # no blank line to cut at
    assert refused(path, "row-too-large").where == f"{path}:2002"
    path = parquet(tmp_path / "a.parquet", text=["a", LONG.decode() + "x"])
    assert refused(path, "row-too-large").where == f"{path} row 2"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "b.csv", "a.txt", "a.parquet"])
def test_large_rows_and_long_lines_that_are_data(tmp_path, name):
    text = LONG[: -MOST_TEXT // 4].decode()
    if name.endswith("parquet"):
        path = parquet(tmp_path / name, text=[text, text])
    else:
        content = {
            "a.jsonl": f'{{"text": "{text}"}}\n' * 2,
            "a.json": json.dumps([{"text": text}] * 2),  # one line, longer than a row may be
            "a.csv": f"text,b\n{text},c\n{text},d\n",
            "b.csv": f"text,b\r{text},c\r{text},d\r",  # no line feed in the whole file
            "a.txt": f"{text}\n\n{text}",
        }[name]
        path = write(tmp_path / name, content)
    assert len(read_file(path)[0].rows) == 2


@pytest.mark.parametrize(
    ("encoding", "named"),
    [
        ("utf-16", "UTF-16"),
        ("utf-16-le", "UTF-16LE"),
        ("utf-16-be", "UTF-16BE"),
        ("utf-32", "UTF-32"),
        ("utf-32-le", "UTF-32LE"),
        ("utf-32-be", "UTF-32BE"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json", "a.txt.gz"])
def test_wide_encodings_are_named_with_a_command_that_mends_them(tmp_path, encoding, named, name):
    content = '{"text": "a"}\n{"text": "b"}\n'.encode(encoding)
    packed = gzip.compress(content) if name.endswith("gz") else content
    path = write(tmp_path / name, packed)
    error = refused(path, "not-utf8")
    assert f"iconv -f {named} -t UTF-8" in error.fix
    assert error.where == f"{path}:1"
    assert error.fix.endswith(f"> utf8{path.suffix if name != 'a.txt.gz' else '.txt'}")
    assert ("gunzip -k" in error.fix) == name.endswith("gz")


def test_what_is_packed_though_it_is_called_text(tmp_path):
    row = b'{"text": "a"}\n'
    twice = write(tmp_path / "a.jsonl.gz", gzip.compress(gzip.compress(row)))
    error = refused(twice, "not-text")
    assert "gzip archive" in error.what
    assert "compressed twice" in error.why
    for name, content, suffix in (
        ("a.jsonl", gzip.compress(row), ".gz"),
        ("b.csv", zstd(row), ".zst"),
        ("c.json", b"PK\x03\x04" + row, ".zip"),
        ("d.txt", b"PAR1" + row, ".parquet"),
    ):
        assert f"{name}{suffix}" in refused(write(tmp_path / name, content), "not-text").fix
    assert len(load(write(tmp_path / "e.txt", "PK is a text, and PAR1 is one")).conversations) == 1


def test_carriage_returns_alone_are_named(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\r{"text": "b"}\r')
    error = refused(path, "broken-json")
    assert "carriage return" in error.why
    assert "tr '\\r' '\\n'" in error.fix
    assert len(load(write(tmp_path / "b.jsonl", '{"text": "a"}\r\n{"text": "b"}\r\n')).places) == 2
    semicolons = write(tmp_path / "c.csv", "text;b\ra, with a comma;c\r")
    assert read_file(semicolons)[0].rows[0].fields == {"text": "a, with a comma", "b": "c"}


@pytest.mark.parametrize("content", [b"\n", b"0\n", b"{}\n"])
def test_a_packed_file_of_tiny_lines(tmp_path, monkeypatch, content):
    monkeypatch.setattr(files, "_MOST_UNPACKED", 2**20)
    lines = 2**24 if content == b"\n" else 2**15
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(content * lines))
    began = time.process_time()
    refused(path, "unpacks-too-far")
    assert time.process_time() - began < 3
    # Blank lines count as lines all the same.
    path = write(tmp_path / "b.jsonl", b"\n" * 3_000_000 + b'{"text": "a"}\n \n{"text": "b"}')
    assert load(path).places == (f"{path}:3000001", f"{path}:3000003")


@pytest.mark.parametrize(
    ("row", "code"),
    [
        (
            '{"messages": [{"role": "user", "content": "a"}, '
            '{"role": "assistant", "content": NaN}]}',
            "unsupported-content",
        ),
        (
            '{"messages": [{"role": "user", "content": NaN}, '
            '{"role": "assistant", "content": "a"}]}',
            "unsupported-content",
        ),
        ('{"instruction": "a", "input": NaN, "output": NaN}', "empty-answer"),
        ('{"instruction": NaN, "input": "", "output": "a"}', "prompt-missing"),
        ('{"prompt": NaN, "completion": "a"}', "prompt-missing"),
        ('{"prompt": "a", "completion": NaN}', "empty-answer"),
    ],
)
def test_nan_is_called_nan(tmp_path, row, code):
    (finding,) = load(write(tmp_path / "a.jsonl", row)).findings
    assert finding.code == code
    assert "NaN" in finding.what
    assert "pandas" in finding.why


@pytest.mark.parametrize(
    "row",
    [
        '{"instruction": "a", "input": NaN, "output": "b"}',
        '{"messages": [{"role": "user", "content": "a", "name": NaN}, '
        '{"role": "assistant", "content": "b"}]}',
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": NaN, '
        '"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}]}',
    ],
)
def test_nan_where_a_cell_may_be_empty(tmp_path, row):
    loaded = load(write(tmp_path / "a.jsonl", row))
    assert len(loaded.conversations) == 1
    assert not loaded.findings


# --- recipes -------------------------------------------------------------------------------------


def test_a_setting_that_stands_twice(tmp_path):
    path = write(tmp_path / "r.yaml", "model: a\nlora: true\nmodel: b\n")
    with pytest.raises(InputError) as caught:
        read_recipe(path)
    assert caught.value.where == f"{path}:3"
    assert "'model' is set twice" in caught.value.what
    path = write(tmp_path / "r.yaml", "template_arg:\n  a: 1\n  a: 2\n")
    with pytest.raises(InputError):
        read_recipe(path)
    assert read_recipe(write(path, "a: &x {b: 1}\nc: *x\n")) == {"a": {"b": 1}, "c": {"b": 1}}


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
        + "".join(
            f"{c}: &{c} [{', '.join([f'*{p}'] * 10)}]\n"
            for p, c in zip("abcdefgh", "bcdefghi", strict=True)
        ),
        "a: " + "[" * 5000,
        "? [x, y]\n: 1\n",
        "\0",
        "a: !!python/object/apply:os.system ['true']",
    ],
)
def test_hostile_recipes(tmp_path, text):
    start = time.monotonic()
    with pytest.raises(InputError):
        read_recipe(write(tmp_path / "r.yaml", text))
    assert time.monotonic() - start < 5
