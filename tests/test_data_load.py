"""From a source to conversations: columns, folders, splits, datasets, and every way to fail."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from truetune.data.columns import parse_columns
from truetune.data.hub import read_dataset
from truetune.data.load import load
from truetune.errors import DataError, UsageError

PAIR = {"question": "q", "answer": "a"}


def put(path: Path, *rows: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pairs(prefix: str, count: int = 1) -> list[dict]:
    return [{"question": f"{prefix}{i}", "answer": "a"} for i in range(count)]


def asked(loaded) -> list[str]:
    return [c.messages[0]["content"] for c in loaded.conversations]


def refused(code: str, source: object, error: type = DataError, **kwargs):
    with pytest.raises(error) as caught:
        load(source, **kwargs)
    assert caught.value.code == code
    assert caught.value.exit_code == 2
    return caught.value


def test_import_is_light():
    code = (
        "import sys, truetune.data;"
        "print(sorted({'torch', 'pyarrow', 'datasets', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- columns and schemas -------------------------------------------------------------------------


@pytest.mark.parametrize("columns", ["prompt=q,completion=a", {"prompt": "q", "completion": "a"}])
def test_columns(tmp_path, columns):
    path = put(tmp_path / "a.jsonl", {"q": "x", "a": "y", "topic": 1})
    loaded = load(path, columns=columns)
    assert loaded.schema == "prompt-completion"
    assert [m["content"] for m in loaded.conversations[0].messages] == ["x", "y"]
    assert [f.what.rsplit(" ", 1)[1] for f in loaded.findings] == ["topic"]


def test_columns_decide_over_what_else_is_there(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    row = {"messages": turns, "prompt": "old", "ask": "x", "say": "y"}
    loaded = load(put(tmp_path / "a.jsonl", row), columns="prompt=ask,completion=say")
    assert asked(loaded) == ["x"]
    row = {"question": "old", "mine": "x", "cot": "r", "answer": "y"}
    loaded = load(put(tmp_path / "a.jsonl", row), columns="prompt=mine")
    assert loaded.schema == "reasoning"
    assert asked(loaded) == ["x"]


def test_columns_that_no_schema_takes_together(tmp_path):
    path = put(tmp_path / "a.jsonl", {"x": "x", "y": "y"})
    refused("no-schema", path, columns="prompt=x,text=y")


def test_missing_column(tmp_path):
    path = put(tmp_path / "a.jsonl", PAIR)
    error = refused("no-such-column", path, columns="prompt=questoin,completion=answer")
    assert "did you mean prompt=question?" in error.fix
    assert "question, answer" in error.why
    # Near miss: a column that some rows have.
    loaded = load(put(tmp_path / "a.jsonl", PAIR, {"answer": "a"}), columns="prompt=question")
    assert [f.code for f in loaded.findings] == ["mixed-schemas"]


@pytest.mark.parametrize(
    "columns", ["prompt", "prompt=", "=x", "promt=x", "prompt=x,prompt=y", {"rpompt": "x"}]
)
def test_bad_columns(columns):
    with pytest.raises(UsageError) as caught:
        parse_columns(columns)
    assert caught.value.code == "bad-columns"
    assert caught.value.fix


def test_good_columns():
    assert parse_columns(" prompt = a b , completion=c=d") == {"prompt": "a b", "completion": "c=d"}
    assert parse_columns(None) == {}


def test_no_schema_lists_columns_and_needs(tmp_path):
    error = refused("no-schema", put(tmp_path / "a.jsonl", {"foo": "x", "bar": "y"}))
    assert "foo, bar" in error.why
    for schema in ("messages", "sharegpt", "alpaca", "instances", "prompt-completion", "reasoning"):
        assert f"{schema}: " in error.why
    assert "--columns prompt=foo,completion=bar" in error.fix
    path = tmp_path / "b.jsonl"
    path.write_text("3\n4\n")
    refused("no-schema", path)


SAID = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("row", "fix"),
    [
        ({"chosen": SAID, "rejected": SAID}, "--columns messages=chosen"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "prompt=prompt,completion=chosen"),
        ({"prompt": "q", "chosen": SAID, "rejected": SAID}, "--columns messages=chosen"),
        ({"prompt": SAID[:1], "chosen": SAID[1:], "rejected": SAID[1:]}, "completion=chosen"),
    ],
)
def test_preference_data_is_named_and_the_fix_trains_the_chosen_answers(tmp_path, row, fix):
    path = put(tmp_path / "a.jsonl", row)
    error = refused("no-schema", path)
    assert "preference data" in error.why
    assert error.fix.endswith(fix)
    loaded = load(path, columns=error.fix.rpartition("--columns ")[2])
    assert loaded.conversations[0].messages[-1]["content"] == "a"
    assert [f.code for f in loaded.findings] == ["unused-columns"]


def test_rejected_answers_are_trained_with_a_warning_alone(tmp_path):
    path = put(tmp_path / "a.jsonl", {"prompt": "q", "chosen": "a", "rejected_response": "b"})
    loaded = load(path, columns="prompt=prompt,completion=rejected_response")
    assert [f.code for f in loaded.findings if f.level == "warning"] == ["rejected-answers"]


@pytest.mark.parametrize(
    ("row", "fix"),
    [
        ({"title": "t", "q": "Q", "a": "A"}, "--columns prompt=q,completion=a"),
        ({"id": 3, "frage": "x", "antwort": "y"}, "--columns prompt=frage,completion=antwort"),
        ({"dialog": SAID}, "--columns messages=dialog"),
        ({"x": "1", "y": "2", "z": "3"}, "prompt=COLUMN,completion=COLUMN, with two of x, y, z"),
        ({"custom_id": "1", "method": "P"}, "prompt=COLUMN,completion=COLUMN"),
        ({"context": "c", "question": "q", "n": 1}, "prompt=COLUMN,completion=COLUMN"),
        (
            {"context": "c", "question": "q", "answers": {"text": ["a"], "start": [3]}},
            "jq -c '{instruction: .question, input: .context, output: .answers.text[0]}'",
        ),
        (
            {"id": 0, "data": {"input": {"text": "q"}, "output": {"te xt": "a"}}},
            """jq -c '{prompt: .data.input.text, completion: .data.output."te xt"}'""",
        ),
        ({"id": 0, "body": {"model": "m", "messages": SAID}}, "jq -c '{messages: .body.messages}'"),
    ],
)
def test_a_suggested_mapping_names_only_columns_that_can_be_prompt_and_answer(tmp_path, row, fix):
    assert fix in refused("no-schema", put(tmp_path / "a.jsonl", row)).fix


def test_a_column_that_never_varies_is_not_suggested(tmp_path):
    rows = [{"kind": "t", "one": f"q{i}", "two": f"a{i}"} for i in range(3)]
    error = refused("no-schema", put(tmp_path / "a.jsonl", *rows))
    assert error.fix.endswith("prompt=one,completion=two")


def test_nested_fields_are_no_columns(tmp_path):
    path = put(tmp_path / "a.jsonl", {"data": {"input": {"text": "q"}, "output": "a"}})
    error = refused("no-such-column", path, columns="prompt=data.input.text")
    assert "nested fields are not read" in error.what
    assert "completion: .data.output}" in error.fix


@pytest.mark.parametrize(
    ("row", "keep"),
    [
        ({**PAIR, "context": "c"}, "instruction=question,output=answer,input=context"),
        ({**PAIR, "sys_prompt": "be kind"}, "system=sys_prompt"),
        ({"instruction": "q", "output": "a", "passage": "p"}, "input=passage"),
        ({**PAIR, "thinking": "t", "document": "d"}, "input=document"),
        ({"text": "t", "label": "good"}, "prompt=text,completion=label"),
    ],
)
def test_an_unused_column_of_prompt_or_answer_is_a_warning_that_tells_how_to_keep_it(
    tmp_path, row, keep
):
    path = put(tmp_path / "a.jsonl", row, row)
    (found,) = load(path).findings
    assert (found.code, found.level, found.count) == ("column-left-out", "warning", 2)
    assert f"--columns {keep}," in found.fix
    loaded = load(path, columns=keep)
    assert loaded.findings == []
    assert str(row[keep.rpartition("=")[2]]) in str(loaded.conversations[0].messages)


@pytest.mark.parametrize(
    "row",
    [
        {**PAIR, "score": 3, "category": "c", "label": "good"},
        {**PAIR, "context": "", "passage": None},
        {"question": "c? q", "answer": "a", "context": "c?"},
        {"messages": SAID, "context": "c", "document": "d"},
        {"text": "t", "score": "5", "topic": "x"},
    ],
)
def test_other_unused_columns_are_a_note(tmp_path, row):
    (found,) = load(put(tmp_path / "a.jsonl", row)).findings
    assert (found.code, found.level) == ("unused-columns", "note")


def test_schema_that_does_not_fit(tmp_path):
    path = put(tmp_path / "a.jsonl", PAIR)
    error = refused("schema-mismatch", path, schema="alpaca")
    assert "question, answer" in error.why
    assert "--schema prompt-completion" in error.fix
    assert load(path, schema="prompt-completion").findings == []
    path = put(tmp_path / "b.jsonl", PAIR, {"instruction": "q", "output": "a"})
    loaded = load(path, schema="alpaca")
    assert len(loaded.conversations) == 1
    (finding,) = loaded.findings
    assert finding.code == "mixed-schemas"
    assert "a row has the schema prompt-completion" in finding.what
    assert "prompt-completion" in finding.what
    assert "alpaca" in finding.what


def test_limit_and_progress(tmp_path):
    path = put(tmp_path / "a.jsonl", *pairs("q", 2500))
    seen: list[tuple[int, int | None]] = []
    loaded = load(path, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1000, 2500), (2000, 2500), (2500, 2500)]
    assert loaded.num_rows == 2500
    loaded = load(path, limit=3)
    assert (loaded.num_rows, asked(loaded)) == (3, ["q0", "q1", "q2"])
    refused("bad-limit", path, UsageError, limit=0)


# --- files and folders ---------------------------------------------------------------------------


def test_missing_file_names_near_ones(tmp_path):
    put(tmp_path / "train.jsonl", PAIR)
    error = refused("no-such-file", tmp_path / "trian.jsonl")
    assert f"did you mean {tmp_path / 'train.jsonl'}?" in error.fix
    assert "does not exist either" in refused("no-such-file", tmp_path / "no" / "a.jsonl").why


def test_a_mistyped_relative_path_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "data" / "train.jsonl", PAIR)
    for source in ("dat", "data/trai", "train.jsonl", "rows.jsonll"):
        refused("no-such-file", source)


def test_rows_below_the_working_folder_have_the_name_that_was_typed(tmp_path, monkeypatch):
    """A resumed run has absolute paths; its samples are those of the rows that it began with."""
    path = put(tmp_path / "data" / "a.jsonl", PAIR)
    monkeypatch.chdir(tmp_path)
    for source in ("data/a.jsonl", path, "./data/a.jsonl", "data", path.parent):
        assert load(source).conversations[0].where.endswith("data/a.jsonl:1"), source
        assert not Path(load(source).conversations[0].where).is_absolute(), source
    monkeypatch.chdir(tmp_path / "data")
    assert (
        load(path.parent).conversations[0].where == load(".").conversations[0].where == "a.jsonl:1"
    )
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert Path(load(path).conversations[0].where).is_absolute()


def test_single_file_is_one_split(tmp_path):
    path = put(tmp_path / "a.jsonl", PAIR)
    assert load(path, split="train").num_rows == 1
    assert "train" in refused("no-such-split", path, split="test").fix
    (finding,) = load(path, revision="main").findings
    assert (finding.code, finding.level) == ("setting-without-effect", "warning")


def test_folder_without_splits(tmp_path):
    put(tmp_path / "b.jsonl", *pairs("b", 2))
    put(tmp_path / "sub" / "a.jsonl", *pairs("a", 2))
    put(tmp_path / ".hidden" / "c.jsonl", *pairs("c"))
    loaded = load(tmp_path)
    assert asked(loaded) == ["b0", "b1", "a0", "a1"]
    assert loaded.findings == []
    assert [Path(f.path).name for f in loaded.files] == ["b.jsonl", "a.jsonl"]
    assert loaded.conversations[2].where == f"{tmp_path / 'sub' / 'a.jsonl'}:1"
    limited = load(tmp_path, limit=2)
    assert (asked(limited), len(limited.files)) == (["b0", "b1"], 1)
    assert asked(load(tmp_path, limit=3)) == ["b0", "b1", "a0"]
    refused("no-such-split", tmp_path, split="test")


def test_columns_that_no_mapping_can_name(tmp_path):
    path = tmp_path / "faq.csv"
    path.write_text('"What is it?",It is it.\nWho?,You.\nWhere?,There.\n')
    error = refused("no-schema", path)
    assert "reads like a row" in error.why
    command = error.fix.split(": ", 1)[1]
    subprocess.run(["sh", "-c", command], cwd=tmp_path, check=True)
    assert len(load(tmp_path / "faq_named.csv").conversations) == 3
    path.write_text('"q, what","a, that"\nfoo?,bar\nx,y\n')
    assert refused("no-schema", path).fix == (
        "rename the columns: 'q, what' to prompt, 'a, that' to completion"
    )
    # Long names that a survey has are no text.
    path.write_text("Your question,The best answer you know\nfoo?,bar\nx,y\n")
    assert "--columns" in refused("no-schema", path).fix


def test_lists_of_a_json_file_that_are_not_read_are_counted(tmp_path):
    path = tmp_path / "sets.json"
    path.write_text(json.dumps({"train": pairs("train", 3), "test": pairs("test", 2)}))
    loaded = load(path)
    assert asked(loaded) == ["train0", "train1", "train2"]
    (note,) = loaded.findings
    assert (note.code, note.level, note.count) == ("lists-not-read", "note", 1)
    assert note.what == "the list 'train' was read; not read: 'test' (2 elements)"
    assert f"jq -c '.test[]' {path} > test.jsonl" in note.fix
    # Under any other name they may be rows that were meant to be trained on.
    path.write_text(json.dumps({"data": pairs("a"), "part 2": pairs("b", 4), "items": pairs("c")}))
    loaded = load(path)
    assert asked(loaded) == ["a0"]
    (warning,) = loaded.findings
    assert (warning.level, warning.count) == ("warning", 2)
    assert warning.what.endswith("not read: 'part 2' (4 elements), 'items' (1 element)")
    assert """jq -c '.["part 2"][]' """ in warning.fix
    # One list, and facts about it.
    path.write_text(json.dumps({"data": pairs("a"), "tags": ["x"], "about": {"n": 1}}))
    assert load(path).findings == []


def test_folder_with_splits(tmp_path):
    put(tmp_path / "set_train.jsonl", *pairs("train"))
    put(tmp_path / "set_test.jsonl", *pairs("test"))
    put(tmp_path / "dev" / "0.jsonl", *pairs("dev"))
    loaded = load(tmp_path)
    assert asked(loaded) == ["train0"]
    (note,) = loaded.findings
    assert (note.code, note.level, note.count) == ("split-chosen", "note", 2)
    assert load(tmp_path, split="train").findings == []
    assert asked(load(tmp_path, split="validation")) == ["dev0"]
    assert asked(load(tmp_path, split="test")) == ["test0"]
    error = refused("no-such-split", tmp_path, split="extra")
    assert "test, train, validation" in error.fix
    # A file that belongs to no split was perhaps meant to be read.
    put(tmp_path / "more.jsonl", *pairs("more"))
    (warning,) = load(tmp_path).findings
    assert (warning.level, warning.count) == ("warning", 3)
    assert warning.what.endswith("; the names of 1 of them match no split")
    (tmp_path / "set_train.jsonl").unlink()
    refused("no-such-split", tmp_path)


def test_folder_skips_what_is_no_row(tmp_path):
    put(tmp_path / "a.jsonl", PAIR)
    for name in ("README.md", "LICENSE.txt", "dataset_info.json", "picture.png"):
        (tmp_path / name).write_text("x")
    loaded = load(tmp_path)
    (note,) = loaded.findings
    assert (note.code, note.level, note.count) == ("files-skipped", "note", 4)
    (tmp_path / "a.jsonl").unlink()
    assert load(tmp_path).schema == "text"


def test_folder_without_data(tmp_path):
    (tmp_path / "a.png").write_text("x")
    assert "a.png" in refused("no-data-files", tmp_path).why


# --- datasets ------------------------------------------------------------------------------------


@pytest.fixture
def repo(tmp_path, monkeypatch):
    """A dataset repository as the Hub holds it: a card, and parquet files by split."""
    datasets = pytest.importorskip("datasets")
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "repo"
    (folder / "data").mkdir(parents=True)
    for split, count in (("train", 3), ("test", 1)):
        table = pa.Table.from_pylist(pairs(split, count))
        pq.write_table(table, folder / "data" / f"{split}-00000-of-00001.parquet")
    card(folder, "main")
    return folder


def card(folder: Path, *configs: str) -> None:
    entries = "".join(
        f"- config_name: {config}\n  data_files:\n  - split: train\n    path: data/train-*\n"
        f"  - split: test\n    path: data/test-*\n"
        for config in configs
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{entries}---\n# A set\n")


def test_dataset_repository(repo):
    loaded = load(repo)
    assert asked(loaded) == ["train0", "train1", "train2"]
    assert loaded.schema == "prompt-completion"
    assert [c.where for c in loaded.conversations][2] == f"{repo} split train row 3"
    assert [f.code for f in loaded.findings] == ["split-chosen"]
    (info,) = loaded.files
    assert (info.path, info.num_rows) == (str(repo), 3)
    assert info.sha256 == load(repo, split="train").files[0].sha256
    assert info.sha256 != load(repo, split="test").files[0].sha256
    assert asked(load(repo, split="test")) == ["test0"]
    assert asked(load(repo, split="train[:2]")) == ["train0", "train1"]
    assert asked(load(repo, limit=1)) == ["train0"]
    assert load(repo, split="train").findings == []


def test_dataset_label_has_the_revision(repo):
    rows, info = read_dataset(str(repo), split="test", revision="abc")
    assert info.path == f"{repo}@abc"
    assert rows.rows[0].where == f"{repo}@abc split test row 1"


def test_dataset_without_the_split(repo):
    error = refused("no-such-split", repo, split="dev")
    assert "train, test" in error.fix


def test_dataset_with_configurations(repo):
    card(repo, "main", "other")
    error = refused("which-config", repo)
    assert "main, other" in error.why
    assert f"{repo}:main" in error.fix
    assert asked(load(f"{repo}:other", split="test")) == ["test0"]
    refused("which-config", f"{repo}:third")


def test_dataset_written_by_save_to_disk(repo, tmp_path):
    import datasets

    both = datasets.load_dataset(str(repo))
    both.save_to_disk(str(tmp_path / "both"))
    both["test"].save_to_disk(str(tmp_path / "one"))
    assert asked(load(tmp_path / "both")) == ["train0", "train1", "train2"]
    assert asked(load(tmp_path / "both", split="test")) == ["test0"]
    assert asked(load(tmp_path / "one")) == ["test0"]
    refused("no-such-split", tmp_path / "both", split="dev")
    refused("no-such-split", tmp_path / "one", split="dev")


def test_dataset_without_rows(repo):
    refused("empty-file", repo, split="train[:0]")


def test_dataset_out_of_reach(repo, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    error = refused("dataset-unreadable", "nobody/nothing")
    assert error.where == "nobody/nothing"
    assert "the Hub cannot be reached" in error.what


def test_hub_that_does_not_answer_is_asked_once(monkeypatch, tmp_path, capfd):
    """`datasets` alone asks six times, with 23 seconds of waiting and a line for each."""
    import socket

    import datasets

    calls = []

    def nowhere(host, *rest, **more):
        calls.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    begun = time.perf_counter()
    error = refused("dataset-unreadable", "nobody/nothing")
    assert "the Hub cannot be reached" in error.what
    assert time.perf_counter() - begun < 15
    assert len(calls) <= 1
    assert capfd.readouterr().err == ""
    assert datasets.config.HF_HUB_OFFLINE is False


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (404, "RepoNotFound", "no public dataset on the Hub"),
        (404, "RevisionNotFound", "no revision"),
        (403, "GatedRepo", "accepted its terms"),
    ],
)
def test_hub_that_says_no(status, code, said, monkeypatch, tmp_path):
    """What the Hub answers, by a server of our own."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    monkeypatch.chdir(tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        there = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", there)
        error = refused("dataset-unreadable", "nobody/nothing", revision="r1")
        server.shutdown()
    assert said in error.what


# --- speed, and real files -----------------------------------------------------------------------


def test_twenty_thousand_rows_are_quick(tmp_path):
    turns = [{"role": "user", "content": "q" * 300}, {"role": "assistant", "content": "a" * 300}]
    path = put(tmp_path / "a.jsonl", *[{"messages": turns}] * 20_000)
    start = time.process_time()
    assert len(load(path).conversations) == 20_000
    # About 0.5 s on a quiet machine; the bound is there to catch quadratic work.
    assert time.process_time() - start < 5


SHARED = Path(__file__).parents[1] / ".." / "shared" / "data"
REAL = [
    ("gsm8k_train.jsonl", "prompt-completion", 7473, 0),
    ("gsm8k_test.jsonl", "prompt-completion", 1319, 0),
    ("alpaca_en_demo.json", "alpaca", 999, 0),
    ("code_alpaca_2k.json", "alpaca", 2017, 2),
    ("glaive_toolcall_en_demo.json", "sharegpt", 300, 0),
    ("reason_tool_use_demo_50.jsonl", "messages", 50, 0),
    ("self_instruct_seed_tasks.jsonl", "instances", 175, 0),
    ("wikitext2_valid.txt", "text", 201, 0),
]


@pytest.mark.parametrize(("name", "schema", "num_rows", "num_bad"), REAL)
def test_real_file(name, schema, num_rows, num_bad):
    if not (SHARED / name).is_file():
        pytest.skip(f"../shared/data/{name} is not here; the same forms are tested on made rows")
    loaded = load(SHARED / name)
    assert (loaded.schema, loaded.num_rows) == (schema, num_rows)
    errors = [f for f in loaded.findings if f.level == "error"]
    assert [f.code for f in errors] == ["empty-answer"] * num_bad
    assert len(loaded.conversations) == num_rows - num_bad
    if name.startswith("gsm8k"):
        mapped = load(SHARED / name, columns="prompt=question,completion=answer")
        assert mapped == loaded


def test_real_tool_rows():
    if not (SHARED / "glaive_toolcall_en_demo.json").is_file():
        pytest.skip("../shared/data is not here; the same forms are tested on made rows")
    for name, num_calls in (
        ("glaive_toolcall_en_demo.json", 211),
        ("reason_tool_use_demo_50.jsonl", 68),
    ):
        loaded = load(SHARED / name)
        turns = [m for c in loaded.conversations for m in c.messages]
        calls = [call["function"] for m in turns for call in m.get("tool_calls", ())]
        assert len(calls) == num_calls
        assert all(isinstance(call["arguments"], dict) for call in calls)
        tools = [tool for c in loaded.conversations for tool in c.tools or ()]
        assert tools
        assert all(tool["type"] == "function" for tool in tools)
    assert sum("reasoning_content" in m for m in turns) == 112
