"""Templates are rendered in one place, a process of its own, with a limit on each and on all."""

from __future__ import annotations

import ast
import time
from pathlib import Path
from typing import Any

import pytest
from bench.sabotage.build import loader, on_answer, padded
from bench.sabotage.house import CHATML, House, messages

import truetune
from truetune import PromptContract
from truetune.contract import sandbox
from truetune.contract.render import Renderer, RenderJob
from truetune.errors import TruetuneError, UnfaithfulTemplate
from truetune.listener import Listener
from truetune.recipe.settings import Recipe
from truetune.run.checkup import check_model, check_run

SOURCE = Path(truetune.__file__).parent
HOUSE = House(real=False)
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
# Whatever renders Jinja: transformers' ways, and the library's own.
_RENDERS = frozenset(
    """apply_chat_template render_jinja_template _compile_jinja_template from_string
    get_template jinja2 Environment ImmutableSandboxedEnvironment""".split()  # noqa: SIM905
)


def _names(tree: ast.AST) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.name for alias in node.names} | {(node.module or "").partition(".")[0]}
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
            found |= {a.value for a in node.args if isinstance(a, ast.Constant) and a.value}
    return found


def test_nothing_but_the_worker_renders_a_template() -> None:
    renders = {
        str(path.relative_to(SOURCE))
        for path in SOURCE.rglob("*.py")
        if _names(ast.parse(path.read_text(encoding="utf-8"))) & _RENDERS
    }
    # mlx_lm's own way to a prompt is what its folder is compared by: it runs in a child process of
    # its own, on templates that the contract's worker has rendered before.
    assert renders == {"contract/worker.py", "exporting/mlx_worker.py"}


def test_the_scan_sees_each_way_of_rendering() -> None:
    for code in (
        "tokenizer.apply_chat_template([])",
        "getattr(tokenizer, 'apply_chat_template')([])",
        "from transformers.utils.chat_template_utils import render_jinja_template",
        "import jinja2.sandbox",
    ):
        assert _names(ast.parse(code)) & _RENDERS, code
    assert not _names(ast.parse("contract.renderer.render([])")) & _RENDERS


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "DEADLINE", 1.0)
    monkeypatch.setattr(sandbox, "TOTAL", 3.0)


# Loops always; as soon as there is an answer; only where the second of two questions is asked.
LOOPING = {
    "always": LOOPS,
    "behind an answer": "{% if messages | length > 1 %}" + LOOPS + "{% endif %}",
    "in a served prompt": "{% if add_generation_prompt %}" + LOOPS + "{% endif %}",
}


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("kind", LOOPING)
def test_an_audit_with_a_looping_template_ends_and_says_so(kind: str) -> None:
    tokenizer = HOUSE.tokenizer()
    rows = [on_answer(tokenizer, messages(i)) for i in range(8)]
    tokenizer.chat_template = LOOPING[kind] + CHATML
    start = time.monotonic()
    batches = loader(rows, lambda batch: padded(tokenizer, batch))
    report = truetune.audit(batches, tokenizer, HOUSE.model(tokenizer))
    assert time.monotonic() - start < 30
    found = {finding.code: finding for finding in report}
    assert found["template-unusable"].level == "error"
    assert "does not finish" in found["template-unusable"].what
    assert found["template-unusable"].where == "tokenizer.chat_template"


def test_a_template_that_comes_to_an_end_is_usable() -> None:
    tokenizer = HOUSE.tokenizer()
    rows = [on_answer(tokenizer, messages(i)) for i in range(8)]
    report = truetune.audit(loader(rows, lambda batch: padded(tokenizer, batch)), tokenizer)
    assert "template-unusable" not in report.codes


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("kind", LOOPING)
def test_a_check_with_a_looping_template_ends_and_says_so(kind: str, tmp_path: Path) -> None:
    folder = _model(tmp_path, LOOPING[kind])
    data = tmp_path / "rows.jsonl"
    data.write_text(
        "".join(
            f'{{"messages": [{{"role": "user", "content": "Question {i}?"}}, '
            f'{{"role": "assistant", "content": "Answer {i}."}}]}}\n'
            for i in range(8)
        )
    )
    start = time.monotonic()
    for look in (
        lambda: check_run(Recipe(model=folder, data=str(data)), Listener()),
        lambda: check_model(Recipe(model=folder), Listener()),
    ):
        try:
            told = [f"{f.level} {f.what} {f.why}" for f in look().findings]
        except TruetuneError as error:
            told = [f"error {error.what} {error.why}"]
        assert any(t.startswith("error") and "does not finish" in t for t in told), told
    assert time.monotonic() - start < 60


def _model(tmp_path: Path, source: str) -> str:
    tokenizer = HOUSE.tokenizer()
    tokenizer.chat_template = source + CHATML
    folder = str(tmp_path / "model")
    HOUSE.model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("short")
def test_texts_that_each_take_less_than_the_deadline_are_stopped_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A template that takes its time for each text would keep a check busy for hours."""
    monkeypatch.setattr(sandbox, "_PER_TEXT", 0.0)
    slow = "{% for a in range(2000) %}{% for b in range(2000) %}{% endfor %}{% endfor %}"
    renderer = Renderer(slow + "{{ messages[0].content }}", {})
    jobs = [RenderJob([{"role": "user", "content": str(i)}]) for i in range(400)]
    sandbox.start()
    start = time.monotonic()
    made = renderer.render_many(jobs)
    assert time.monotonic() - start < 30
    assert made[0] == "0"
    stopped = made[-1]
    assert isinstance(stopped, UnfaithfulTemplate)
    assert "takes too long" in stopped.what
    assert stopped.code == "template-out-of-bounds"
    # Its time is over for good, for other rows as well.
    again = renderer.render_many([RenderJob([{"role": "user", "content": "new"}])])[0]
    assert isinstance(again, UnfaithfulTemplate)


def test_many_texts_of_an_ordinary_template_have_time_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sandbox, "TOTAL", 0.5)
    renderer = Renderer(CHATML + "{# many #}", {})
    jobs = [RenderJob([{"role": "user", "content": f"{i} " * 200}]) for i in range(3000)]
    assert not [m for m in renderer.render_many(jobs) if isinstance(m, UnfaithfulTemplate)]


_ODD: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": "a"}],
    [{"role": "user", "content": "a", "name": None}, {"role": "assistant", "content": "b"}],
    [
        {"role": "system", "content": " s\n"},
        {"role": "user", "content": "<|im_end|> \u00e9\U0001f600"},
    ],
)


@pytest.mark.parametrize("kind", ["instruct", "thinking", "bos"])
@pytest.mark.parametrize("prompt", [True, False])
def test_the_renderer_gives_what_transformers_gives(kind: Any, prompt: bool) -> None:
    tokenizer = HOUSE.tokenizer(kind)
    contract = PromptContract.load(tokenizer)
    for talk in _ODD:
        theirs = tokenizer.apply_chat_template(
            talk, tokenize=False, add_generation_prompt=prompt, flag=True
        )
        ours = contract.renderer.render(
            talk, add_generation_prompt=prompt, arguments={"flag": True}
        )
        assert ours == theirs
        ids = tokenizer.apply_chat_template(talk, add_generation_prompt=prompt, return_dict=False)
        assert contract.tokens.encode([ours])[0] == list(ids)
