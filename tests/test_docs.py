"""The pages: their links lead somewhere, their commands exist, and their examples run.

An example that cannot run here has an HTML comment before it, which no reader sees:
`<!-- not run: needs the Hub -->`, or `<!-- not run: needs the Hub: truetune push -->` for some of
its lines. Outputs have one too, which names the command that prints them.
"""

from __future__ import annotations

import functools
import html
import importlib.util
import itertools
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import typer.main
from markdown_it import MarkdownIt
from markdown_it.token import Token

import truetune
from tiny_runs import command, write_rows
from truetune.cli.options import canonical
from truetune.cli.verbs import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "src").rglob("README.md")]
)
# What was, in the words of its day.
HISTORY = {"CHANGELOG.md", "docs/log.md"}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


MANUAL = [page for page in PAGES if name_of(page) not in HISTORY]


@functools.cache
def tokens(page: Path) -> list[Token]:
    reader = MarkdownIt("commonmark").enable("table")
    return reader.parse(page.read_text(encoding="utf-8"))


def inline(page: Path) -> Iterator[Token]:
    """Links, pictures and code within text."""
    for token in tokens(page):
        yield from token.children or ()


# ---------------------------------------------------------------- links


@functools.cache
def anchors(page: Path) -> set[str]:
    """What GitHub makes of headings."""
    found: list[str] = []
    made = tokens(page)
    for opening, token in itertools.pairwise(made):
        if opening.type != "heading_open":
            continue
        text = "".join(c.content for c in token.children or () if c.type in ("text", "code_inline"))
        slug = re.sub(r"[^\w\- ]", "", html.unescape(text).lower()).replace(" ", "-")
        found.append(slug if slug not in found else f"{slug}-{found.count(slug)}")
    return set(found)


def broken_links(page: Path) -> list[str]:
    broken = []
    for token in inline(page):
        goal = token.attrGet("href" if token.type == "link_open" else "src")
        if token.type not in ("link_open", "image") or re.match(r"[a-z]+:", str(goal)):
            continue
        place, _, anchor = unquote(str(goal)).partition("#")
        target = (page.parent / place).resolve() if place else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(str(goal))
    return broken


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# What `it` is, in short\n\n[here](#what-it-is-in-short) [there](#gone) [file](no.md)\n"
        "![picture](no.png) [it](page.md#what-it-is-in-short) [web](https://example.org/x#y)\n"
        "`[code](no.md)`\n"
    )
    assert broken_links(page) == ["#gone", "no.md", "no.png"]


# ---------------------------------------------------------------- commands


@dataclass(frozen=True)
class Block:
    """A fenced example, and what is said of running it."""

    page: Path
    line: int
    kind: str
    text: str
    not_run: str

    def commands(self) -> list[list[str]]:
        """Its lines that begin with `truetune`, as words."""
        lines = [line.removeprefix("$ ") for line in self.text.splitlines()]
        return [shlex.split(n, comments=True)[1:] for n in lines if n.startswith("truetune ")]

    def is_left_out(self, words: list[str]) -> bool:
        if not self.not_run:
            return False
        _, _, which = self.not_run.partition(": ")
        return not which or " ".join(["truetune", *words]).startswith(tuple(which.split(", ")))


def blocks(page: Path) -> list[Block]:
    found = []
    made = tokens(page)
    for before, token in itertools.pairwise([None, *made]):
        if token and token.type == "fence":
            said = re.match(r"<!-- not run: (.*) -->", before.content if before else "")
            line = (token.map or [0])[0] + 1
            found.append(
                Block(page, line, token.info.strip(), token.content, said[1] if said else "")
            )
    return found


def unknown(words: list[str], *, whole: bool) -> str:
    """What of a command line truetune does not know.

    Args:
        whole: its arguments are all there; else verb and options alone are looked at.
    """
    there: Any = typer.main.get_command(app)
    context = there.make_context("truetune", [], resilient_parsing=True)
    left = list(words)
    while left and hasattr(there, "commands"):
        if left[0] not in there.commands:
            return f"no verb {left[0]}"
        there = there.commands[left.pop(0)]
    if whole:
        try:
            there.make_context("x", canonical(left), parent=context)
        except typer.TyperException as error:
            return str(error)
        return ""
    known = {name for p in there.params for name in (*p.opts, *p.secondary_opts, "-h", "--help")}
    given = [word.split("=")[0] for word in left if re.match(r"--?[a-z]", word)]
    gone = [word for word in given if word not in known]
    return f"no options {gone}" if gone else ""


@pytest.mark.parametrize("page", MANUAL, ids=name_of)
def test_commands_exist(page: Path) -> None:
    wrong = {}
    for block in blocks(page):
        for words in block.commands():
            if said := unknown(words, whole=True):
                wrong[shlex.join(words)] = said
    for token in inline(page):
        if token.type == "code_inline" and re.match(r"truetune [a-z-]", token.content):
            words = re.split(r"\s+", token.content)[1:]
            if said := unknown(words, whole=False):
                wrong[token.content] = said
    assert wrong == {}


def test_a_command_that_is_gone_is_found() -> None:
    assert unknown(["trian", "x"], whole=False) == "no verb trian"
    assert unknown(["lab", "runn"], whole=False) == "no verb runn"
    assert unknown(["train", "x", "--loora"], whole=False) == "no options ['--loora']"
    assert "--loora" in unknown(["train", "x", "y", "--loora"], whole=True)
    assert unknown(["train", "x", "y", "--lora", "-o", "z"], whole=True) == ""


def modules(page: Path) -> Iterator[tuple[str, Path]]:
    """What a page says to start with Python or make, and the file that would be started."""
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"python -m ((?:bench|tests)[\w.]*)", text):
        place = ROOT / name.replace(".", "/")
        yield name, place / "__main__.py" if place.is_dir() else place.with_suffix(".py")
    for name in re.findall(r"(?:python |`)((?:bench|scripts|tests)/[\w/]+(?:\.py)?)[ `]", text):
        yield name, ROOT / name


@pytest.mark.parametrize("page", MANUAL, ids=name_of)
def test_scripts_and_targets_exist(page: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    asked = re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert [name for name in asked if name not in targets] == []
    assert [name for name, place in modules(page) if not place.exists()] == []


# ---------------------------------------------------------------- examples


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with what the examples name; their model is the embedded base, and they
    train two steps."""
    base = ROOT / "src/truetune/lab/base"
    for name in ("Qwen/Qwen2.5-0.5B-Instruct", "src/truetune/lab/base"):
        shutil.copytree(base, tmp_path / name)
    rows = (ROOT / "src/truetune/lab/instructions.jsonl").read_text(encoding="utf-8").splitlines()
    for name, part in {"rows": rows[:48], "held_out": rows[48:56], "questions": rows[:8]}.items():
        write_rows(tmp_path / f"{name}.jsonl", part)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(truetune, "train", functools.partial(truetune.train, max_steps=2))
    return tmp_path


def shortened(words: list[str]) -> list[str]:
    return [*words, "--max-steps", "2"] if words[0] == "train" else words


def with_runs(page: Path) -> None:
    """Runs that a page names and does not make."""
    text = "".join(block.text for block in blocks(page))
    for name in ("runs/first", "runs/quickstart"):
        if name in text and f"-o {name}" not in text and f'output="{name}"' not in text:
            words = ["train", "embedded", "rows.jsonl", "--lora", "-o", name]
            assert command(*shortened(words)).code == 0


def trainer(folder: Path) -> Any:
    """Somebody else's, set up as it should be."""
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    contract = truetune.PromptContract.load("src/truetune/lab/base")
    text = (folder / "rows.jsonl").read_text(encoding="utf-8")
    conversations = [json.loads(line)["messages"] for line in text.splitlines()]
    examples = [contract.encode(messages)[0] for messages in conversations]
    rows = [
        {"input_ids": e.ids, "labels": [i if m else -100 for i, m in zip(*e, strict=True)]}
        for e in examples
    ]
    model = AutoModelForCausalLM.from_pretrained("src/truetune/lab/base")
    model.generation_config.eos_token_id = sorted(contract.stop_ids)
    arguments = TrainingArguments(
        str(folder / "other"),
        per_device_train_batch_size=1,
        max_steps=1,
        report_to=[],
        use_cpu=True,
    )
    return Trainer(model, arguments, train_dataset=rows, processing_class=contract.tokenizer)


def having(kind: str) -> list[Path]:
    return [page for page in MANUAL if any(b.kind == kind for b in blocks(page))]


@pytest.mark.parametrize("page", MANUAL, ids=name_of)
def test_an_example_that_does_not_run_says_why(page: Path) -> None:
    silent = []
    for block in blocks(page):
        _, _, which = block.not_run.partition(": ")
        if block.kind in ("python", "yaml") or (block.not_run and not which):
            continue
        said = ("truetune ", "$ truetune ", "#", *(which.split(", ") if which else ()))
        lines = [line for line in block.text.splitlines() if line.strip()]
        silent += [(block.line, line) for line in lines if not line.startswith(said)]
    assert silent == []


@pytest.mark.slow
@pytest.mark.parametrize("page", having("python"), ids=name_of)
def test_python_runs(page: Path, folder: Path) -> None:
    with_runs(page)
    names: dict[str, Any] = {"truetune": truetune, "trainer": trainer(folder)}
    for block in blocks(page):
        if block.kind == "python" and not block.not_run:
            exec(compile(block.text, f"{page}:{block.line}", "exec"), names)


# What a command needs that is not installed everywhere: a word of it, and the module.
_EXTRAS = {"gguf": "xllamacpp", "ollama": "xllamacpp", "mlx": "mlx_lm", "nf4": "bitsandbytes"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [p for p in MANUAL if any(b.commands() for b in blocks(p))], ids=name_of
)
def test_commands_run(page: Path, folder: Path) -> None:
    with_runs(page)
    for block in blocks(page):
        for words in block.commands():
            line = shlex.join(words)
            there = all(importlib.util.find_spec(m) for w, m in _EXTRAS.items() if w in line)
            if there and not block.is_left_out(words):
                shown = command(*shortened(words))
                assert shown.code == 0, (words, shown.out, shown.err)


@pytest.mark.slow
@pytest.mark.parametrize("page", having("yaml"), ids=name_of)
def test_recipes_are_taken(page: Path, folder: Path) -> None:
    for block in blocks(page):
        if block.kind == "yaml":
            (folder / "recipe.yaml").write_text(block.text, encoding="utf-8")
            shown = command("check", "recipe.yaml")
            assert shown.code == 0, shown
