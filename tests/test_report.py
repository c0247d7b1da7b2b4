"""The page of a run: complete, self-contained, and whole whatever the files hold."""

from __future__ import annotations

import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import truetune
from run_folders import EVIL, files, finding, steps, vitals, write_run
from tiny_models import write_model
from tiny_runs import command, lines, sums, write_rows
from truetune.errors import UsageError
from truetune.reporting.facts import RunFacts
from truetune.reporting.page import page, write_report
from truetune.reporting.svg import Line, chart, histogram, thinned
from truetune.reporting.verdict import verdict
from truetune.run_dir import REPORT, RunDir


class Seen(HTMLParser):
    """Tags, their balance, their attributes, and the text between them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def shown(folder: Path) -> str:
    return page(RunFacts.read(RunDir(folder)))


def words(folder: Path) -> dict[str, str]:
    return {a.question: a.word for a in verdict(RunFacts.read(RunDir(folder)))}


@pytest.mark.parametrize("text", ["plain", EVIL])
@pytest.mark.parametrize("healthy", [True, False])
def test_the_page_is_whole_runs_nothing_and_fetches_nothing(
    tmp_path: Path, text: str, healthy: bool
) -> None:
    html = shown(write_run(tmp_path / "run", files(text, healthy=healthy, adapter=True)))
    seen = Seen(html)
    assert seen.open == []
    assert not {"script", "img", "link", "iframe", "object", "form", "base"} & set(seen.tags)
    names = {name for name, _ in seen.attributes}
    assert not {"src", "href", "srcset", "action"} & names
    assert not [name for name in names if name.startswith("on")]
    assert "default-src 'none'" in html
    assert "http" not in html.replace("http-equiv", "")
    assert "\u202e" not in html
    assert "\x1b" not in html
    assert "url(" not in html
    assert "@import" not in html


def test_a_sign_that_was_not_taken_at_first_is_not_said_of_then(tmp_path: Path) -> None:
    made = files()
    lines = [line for line in made["metrics.jsonl"] if line.get("probe")]
    del lines[0]["stop_rate"]
    text = Seen(shown(write_run(tmp_path / "first", made))).text
    assert "Replies that end by themselves: 100 % (at step 10: 14 %)." in text
    del lines[-1]["stop_rate"]
    text = Seen(shown(write_run(tmp_path / "last", made))).text
    assert "Replies that end by themselves: 100 % at step 90 (at step 10: 14 %)." in text


def test_a_healthy_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "first", files())
    assert words(folder) == {
        "Trained as served": "yes",
        "Saved as trained": "yes",
        "Behaves": "yes",
    }
    text = Seen(shown(folder)).text
    for part in (
        "first: finished",
        "step 100 of 100",
        "900 supervised tokens",
        "<|endoftext|> (0), <|end|> (4)",
        "5 checks passed",
        "Replies that end by themselves: 100 % (before: 0 %)",
        "Loss on text to keep: 0.950 nats per token (before: 0.800)",
        "before the first step",
        "a base goes on plain",
        "tuned, step 100",
        "Answer. 100 plain",
        "answer in the row",
        "Answer 1. plain",
        "rows.jsonl:7: 10 tokens, 3 supervised",
        "and 5 more tokens",
        "4 dropped, rows-overlong",
        "default: a base of 5 M parameters",
        "settings at their defaults",
        "built-in chatml-lite",
        '{"enable_thinking": false}',
        "cpu (no GPU)",
        "limit 100",
    ):
        assert part in text, part


def test_a_prompt_that_is_known_by_its_tokens_alone_is_shown_as_served(tmp_path: Path) -> None:
    contents = files()
    contents["samples.jsonl"] = [
        {
            "step": s,
            "where": "/deep/rows.jsonl:9",
            "messages": [],
            "prompt": "<|user|>\nHi",
            "held_out": h,
        }
        for s, h in ((0, False), (9, False))
    ]
    text = Seen(shown(write_run(tmp_path / "run", contents))).text
    assert "rows.jsonl:9, trained" in text
    assert "/deep/" not in text
    assert "<|user|>\nHi" in text
    assert "(empty)" in text


def test_every_curve_has_axes_units_and_words(tmp_path: Path) -> None:
    html = shown(write_run(tmp_path / "run", files()))
    told = re.findall(r'<svg [^>]*aria-label="([^"]*)"', html)
    for start in (
        "Loss, nats per token: training from 3.05",
        "Text to keep, nats per token: loss from 0.8 at step 0 to 0.95 at step 100",
        "Replies that end by themselves, share: stop rate from 0 % at step 0 to 100 %",
        "Replies that go wrong, share: repetition from 0 %",
        "Gradient norm: before clipping from 4.9",
        "Learning rate: rate from 1.98e-4 at step 1 to 0 at step 100",
        "10 rows by length in tokens",
    ):
        assert any(text.startswith(start) for text in told), (start, told)
    assert html.count("optimizer step</text>") == 8
    # The probes in numbers stand there too.
    assert "stop rate</th>" in html
    assert "; measured 11 times, in 18.3 % of the step time)" in html
    assert "held-out from 3.4 at step 0 to 0.5545 at step 100" in html


def test_a_collapsed_run_says_which_probe_and_shows_where(tmp_path: Path) -> None:
    contents = files(healthy=False, adapter=True)
    folder = write_run(tmp_path / "run", contents)
    assert words(folder)["Behaves"] == "no"
    assert words(folder)["Saved as trained"] == "not measured"
    html = shown(folder)
    text = Seen(html).text
    assert "run: stopped by a probe" in text
    assert "88% of the replies to 8 fixed prompts go round in a circle" in text
    assert "Red line at step 60" in text
    assert "A probe stopped the run early" in text
    # The training loss keeps falling, and the page shows it beside the share that goes wrong.
    assert re.search(r"training from [23]\.\d+ at step 1 to 0\.2\d+ at step 60", html)
    assert "repetition from 0 % at step 0 to 100 % at step 60" in html
    assert "not ended" in text


def test_a_run_that_went_back_and_recovered(tmp_path: Path) -> None:
    contents = files()
    contents["findings.jsonl"] += [
        finding("stops-lost", "error", "0% of the replies end by themselves at step 40"),
        finding("rewound", "note", "the run went back to step 20 with half the learning rate"),
    ]
    folder = write_run(tmp_path / "run", contents)
    (answer,) = verdict(RunFacts.read(RunDir(folder)))[2:]
    assert answer.word == "yes"
    assert ". The run went back to step 20" in answer.why
    assert "Red line at step 40" in Seen(shown(folder)).text
    # What comes after the return counts.
    contents["findings.jsonl"].append(finding("stops-lost", "error", "again at step 60"))
    assert words(write_run(tmp_path / "more", contents))["Behaves"] == "no"


def test_warnings_are_doubts_and_other_findings_are_not(tmp_path: Path) -> None:
    contents = files()
    contents["findings.jsonl"].append(finding("rows-overlong", "warning", "rows are dropped"))
    assert words(write_run(tmp_path / "rows", contents))["Behaves"] == "yes"
    contents["findings.jsonl"].append(finding("forgetting", "warning", "text lost 1.3 nats"))
    assert words(write_run(tmp_path / "more", contents))["Behaves"] == "doubtful"


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    contents = files()
    contents["metrics.jsonl"] = [*steps(100)]
    contents["samples.jsonl"] = []
    del contents["verify.json"]
    folder = write_run(tmp_path / "run", contents)
    assert words(folder)["Behaves"] == "not measured"
    assert words(folder)["Saved as trained"] == "not measured"
    text = Seen(shown(folder)).text
    assert "samples.jsonl contains no replies" in text
    contents["verify.json"] = {"checks": [{"name": "rows", "state": "failed", "what": "2 differ"}]}
    failed = write_run(tmp_path / "failed", contents)
    assert words(failed)["Saved as trained"] == "no"
    assert "rows: 2 differ" in Seen(shown(failed)).text
    contents["data.json"] = {"schema": "text", "train": {"examples": 1}}
    (answer, *_) = verdict(RunFacts.read(RunDir(write_run(tmp_path / "text", contents))))
    assert (answer.word, answer.why) == (
        "not measured",
        "1 piece of plain text: no prompt is served, and none was used in training.",
    )


def test_an_adapter_whose_stop_no_server_reads_is_a_doubt(tmp_path: Path) -> None:
    contents = files(adapter=True)
    fix = "serve with stop_token_ids=[0, 4]"
    contents["findings.jsonl"].append(
        finding("adapter-stop-unread", "warning", "so it is", fix=fix)
    )
    (answer, *_) = verdict(RunFacts.read(RunDir(write_run(tmp_path / "run", contents))))
    assert answer.word == "doubtful"
    assert fix in answer.why


def test_a_page_of_nothing(tmp_path: Path) -> None:
    html = shown(tmp_path)
    assert Seen(html).open == []
    assert "not finished" in html


DAMAGE: dict[str, Any] = {
    "recipe.yaml": ["{", "- 1", "a: b", "model: {value: [[[[1]]]], origin: 3}"],
    "contract.json": ["", "[1]", '{"stop": 4}', '{"stop": [4], "template": "x"}', "{" * 9000],
    "data.json": ["null", '{"train": 1}', '{"train": {"examples": "many"}}', '{"pictures": [1]}'],
    "env.json": ['{"choices": {"a": 1}, "versions": []}'],
    "verify.json": ['{"checks": [3]}', '{"checks": {"a": "b"}}'],
    "metrics.jsonl": [
        "not json\n",
        '{"step": "x", "loss": 1}\n',
        '{"step": 1e999, "loss": 1}\n',
        '{"step": 1, "loss": NaN, "grad_norm": Infinity}\n',
        '{"step": 1, "loss": "low", "probe": true, "stop_rate": []}\n',
        '{"step": 1, "los',
        "[" * 5000 + "\n",
    ],
    "samples.jsonl": ['{"step": 1}\n', '{"step": 1, "messages": 3, "where": {}}\n', "[]\n"],
    "findings.jsonl": ['{"code": 1, "level": [], "rows": "abc", "count": "x"}\n', "3\n"],
    "adapter/adapter_config.json": ["[]"],
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_costs_its_own_part_only(tmp_path: Path, name: str) -> None:
    for number, text in enumerate(DAMAGE[name]):
        folder = write_run(tmp_path / str(number), {**files(adapter=True), name: text})
        html = shown(folder)
        assert Seen(html).open == []
        other = "Environment" if name != "env.json" else "Recipe"
        assert f"<h2>{other}</h2>" in html, text[:40]


def test_any_cut_and_any_flipped_byte_leaves_a_page(tmp_path: Path) -> None:
    draw = random.Random(7)
    contents = files(adapter=True)
    folder = write_run(tmp_path / "run", contents)
    for name in contents:
        whole = (folder / name).read_bytes()
        for _ in range(6):
            at = draw.randrange(len(whole))
            (folder / name).write_bytes(whole[:at] + bytes([draw.randrange(256)]) + whole[at + 1 :])
            assert Seen(shown(folder)).open == []
            (folder / name).write_bytes(whole[:at])
            assert Seen(shown(folder)).open == []
        (folder / name).write_bytes(whole)


def test_a_link_out_of_the_run_is_not_read(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", files())
    secret = tmp_path / "secret.jsonl"
    secret.write_text('{"step": 0, "where": "a", "answer": "the password"}\n')
    (folder / "samples.jsonl").unlink()
    (folder / "samples.jsonl").symlink_to(secret)
    html = shown(folder)
    assert "password" not in html
    assert "a link to outside the run" in html


def test_a_huge_run_stays_under_two_megabytes(tmp_path: Path) -> None:
    contents = files()
    contents["metrics.jsonl"] = [*steps(50_000)] + [
        vitals(s, s / 50_000) for s in range(0, 50_000, 50)
    ]
    contents["findings.jsonl"] *= 3000
    long = "word \u0e01\x01" * 4_000
    contents["samples.jsonl"] = [
        {
            **line,
            "answer": long,
            "expected": long,
            "messages": [{"role": "user", "content": long}] * 9,
        }
        for line in contents["samples.jsonl"]
    ]
    contents["data.json"]["dropped"] *= 5000
    html = shown(write_run(tmp_path / "run", contents))
    assert len(html.encode()) < 2_000_000
    text = Seen(html).text
    assert "more characters" in text
    assert "more findings" in text
    assert "20,000 dropped" in text
    assert "and 19,980 more" in text


# Curves.


def test_peaks_survive_thinning() -> None:
    points = [(float(x), math.sin(x)) for x in range(10_000)]
    points[4567] = (4567.0, 50.0)
    kept = thinned(points)
    assert len(kept) <= 242
    assert (4567.0, 50.0) in kept
    assert kept[-1] == points[-1]
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([4.39, 0.006], ["0", "1", "2", "3", "4", "5"]),
        ([2e-4, 0.0], ["0", "5e-5", "1e-4", "1.5e-4", "2e-4"]),
        ([1e-3, 1e4], ["0.001", "0.1", "10", "1000"]),
        ([-2.0, 2.0], ["-2", "-1", "0", "1", "2"]),
        ([0.0, 0.0], ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        ([3.0], ["0", "1", "2", "3"]),
    ],
)
def test_ticks_are_round_numbers(values: list[float], ticks: list[str]) -> None:
    svg = chart("T", "", [Line("a", list(enumerate(values)))], log=True)
    assert re.findall(r'text-anchor="end">([^<o]*)</text>', svg) == ticks


def test_what_is_no_number_is_left_out_of_a_curve() -> None:
    nan = float("nan")
    assert chart("T", "", [Line("a", [(1, nan), (2, float("inf"))])]) == ""
    svg = chart("T", "", [Line("a", [(1, 1.0), (2, nan), (3, 3.0)])])
    assert "nan" not in svg
    assert svg.count("<circle") == 2


def test_the_share_axis_and_the_marks() -> None:
    svg = chart("T", "", [Line("a", [(0, 0.5), (10, 1.0)])], share=True, marks=[(7, "<b>")])
    assert ">100 %</text>" in svg
    assert "step 7: &lt;b&gt;" in svg


def test_a_histogram_says_what_lies_beyond_the_limit() -> None:
    bins = [{"from": 1, "to": 10, "rows": 3}, {"from": 11, "to": 20, "rows": 2}]
    assert "2 rows are in ranges above it" in histogram(bins, 10)
    assert "limit" not in histogram(bins, 0)


# Through the command line, and at the end of a run.


def test_the_command_and_the_function(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", files())
    told = command("report", folder)
    assert told.code == 0
    assert "Behaves: yes." in told.out
    assert (folder / REPORT).read_text().startswith("<!doctype html>")
    written = truetune.report(folder, tmp_path / "deep" / "page.html")
    assert written.path.read_text() == (folder / REPORT).read_text()
    assert [a.word for a in written.answers] == ["yes", "yes", "yes"]


def test_the_command_refuses_what_is_no_run_and_what_is_no_page(tmp_path: Path) -> None:
    told = command("report", tmp_path)
    assert told.code == 2
    assert "error[no-run]" in told.err
    folder = write_run(tmp_path / "run", files())
    rows = write_rows(tmp_path / "rows.jsonl", sums(3))
    before = rows.read_text()
    told = command("report", folder, "-o", rows)
    assert told.code == 2
    assert "error[page-not-written]" in told.err
    assert "--output FILE" in told.err
    assert rows.read_text() == before
    with pytest.raises(UsageError, match="cannot be written"):
        write_report(RunDir(folder), rows / "page.html")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_model(folder / "tiny")
    write_rows(folder / "rows.jsonl", sums(110))
    return folder


def train(place: Path, out: Path, *more: Any) -> Any:
    return command(
        "train", place / "tiny", place / "rows.jsonl", "-o", out, "--max-steps", 4, *more
    )


def test_a_run_ends_with_its_page(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    told = train(place, out)
    assert told.code == 0, told.err
    assert f"report  {out / REPORT}" in told.out
    manifest = json.loads((out / "manifest.json").read_text())
    assert REPORT in manifest["files"]
    html = (out / REPORT).read_text()
    text = Seen(html).text
    assert "run: finished" in text
    assert "step 4 of 4" in text
    # What tokens are supervised, and how long the rows are.
    data = json.loads((out / "data.json").read_text())
    (first, *_) = data["pictures"]
    assert {p["kind"] for p in first["pieces"]} == {"prompt", "supervised", "stop"}
    assert sum(len(p["ids"]) for p in first["pieces"]) == first["tokens"]
    assert first["supervised"] < first["tokens"]
    assert sum(b["rows"] for b in data["lengths"]["histogram"]) == data["train"]["examples"]
    for picture in data["pictures"]:
        assert Path(picture["where"]).name in text
    # Made again it is the same page, and a page of another day makes nobody doubt the run.
    assert command("report", out).code == 0
    assert (out / REPORT).read_text() == html
    (out / REPORT).write_text("<!doctype html>")
    from truetune.verification.files import check_files

    assert check_files(RunDir(out)).state == "passed"
    (out / REPORT).unlink()
    assert check_files(RunDir(out)).state == "passed"
    # A run with a page is replaced like any other.
    assert command("report", out).code == 0
    assert train(place, out, "--overwrite").code == 0


def test_a_failed_run_has_a_page_that_says_so(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    out = tmp_path / "run"
    told = train(place, out, "--save-steps", 2)
    assert told.code == 1
    text = Seen((out / REPORT).read_text()).text
    assert "run: failed" in text
    assert "No space left on device" in text
    assert "truetune train --resume" in text
    # Made again it still does.
    assert command("report", out).code == 0
    assert "No space left on device" in Seen((out / REPORT).read_text()).text


def test_a_stopped_run_has_a_page_that_says_so(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from truetune.run.job import Job

    once = Job.on_step

    def interrupted(self: Job, facts: Any) -> None:
        once(self, facts)
        if facts.step == 2:
            raise KeyboardInterrupt

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Job, "on_step", interrupted)
        assert train(place, out, "--save-steps", 1).code == 130
    text = Seen((out / REPORT).read_text()).text
    assert "run: not finished" in text
    assert "step 2 of 4" in text
    assert command("train", "--resume", out).code == 0
    assert "run: finished" in Seen((out / REPORT).read_text()).text


def test_a_page_that_cannot_be_written_fails_no_run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> str:
        raise RuntimeError("no page today")

    monkeypatch.setattr("truetune.run.pages.page", broken)
    out = tmp_path / "run"
    told = train(place, out)
    assert told.code == 0
    assert "warning[report-not-written]" in told.out
    assert "no page today" in told.out
    assert not (out / REPORT).exists()
    assert "report  " not in told.out
    codes = [line["code"] for line in lines(out / "findings.jsonl")]
    assert "report-not-written" in codes


@pytest.mark.parametrize("program", ["/opt/bin/truetune", "/opt/truetune/__main__.py"])
def test_the_command_is_a_line_to_copy_whose_options_stay_whole(
    tmp_path: Path, program: str
) -> None:
    contents = files()
    contents["env.json"]["command"] = [program, "train", "my rows.jsonl", "--lora-r", "8"]
    html = shown(write_run(tmp_path / "run", contents))
    assert "truetune train 'my rows.jsonl' --lora-r 8" in Seen(html).text
    assert '<span class="name">--lora-r</span> 8' in html


def test_files_that_the_manifest_came_after_are_not_called_unchecked(tmp_path: Path) -> None:
    contents = files()
    early = {"name": "files", "state": "not-checked", "what": "there is no manifest.json"}
    contents["verify.json"]["checks"].append(early)
    assert "there is no manifest.json" not in shown(write_run(tmp_path / "early", contents))
    failed = {"name": "files", "state": "failed", "what": "model.safetensors was changed"}
    contents["verify.json"]["checks"].append(failed)
    assert "model.safetensors was changed" in shown(write_run(tmp_path / "late", contents))


def test_curves_of_a_running_run_have_every_evaluation_and_one_axis(tmp_path: Path) -> None:
    contents = files()
    lines = [line for line in contents["metrics.jsonl"] if not line.get("probe")]
    lines = [line for line in lines if "eval_loss" not in line]
    told = [{"step": step, "eval_loss": 4 - step / 50} for step in range(0, 101, 10)]
    contents["metrics.jsonl"] = [vitals(0, 0.0), *lines, *told]
    html = shown(write_run(tmp_path / "run", contents))
    assert "held-out from 4 at step 0 to 2 at step 100" in html
    # The stop rate was measured at step 0 alone: its axis is that of the run all the same.
    assert "; measured once, in" in html
    stops = html.split('aria-label="Replies that end by themselves')[1].split("</svg>")[0]
    assert ">100</text>" in stops
