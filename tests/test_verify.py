"""Verification: files alone must show that what was saved is what was trained."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fresh_process import in_this_process  # noqa: F401  (a fixture)
from tiny_families import MORE
from tiny_models import edit_json, tiny_tokenizer, write_model
from tiny_runs import command, sums, write_rows
from truetune.compare import Agreement, Measured, agreement, at_clear_leads
from truetune.errors import InputError, UsageError
from truetune.run_dir import RunDir, sha256
from truetune.verification.artifact import verify
from truetune.verification.record import PADDING, _digest, read_record, settings_of
from truetune.verification.rows import VERIFY_ROWS, read_rows
from truetune.verification.verdict import Verdict, judge, judge_rounding

pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in bfloat16, and a run of each kind on it."""
    folder = tmp_path_factory.mktemp("verify")
    write_model(folder / "base", dtype="bfloat16", tie_word_embeddings=True)
    data = write_rows(folder / "rows.jsonl", sums(110))
    for kind, more in (("adapter", ["--lora"]), ("model", [])):
        shown = command(
            *("train", folder / "base", data, *more, "-o", folder / kind),
            *("--max-steps", 2, "--batch-size", 4, "--eval-steps", 2, "--save-steps", 1),
        )
        assert shown.code == 0, shown.err
    return folder


@pytest.fixture
def run(place: Path, tmp_path: Path) -> Path:
    """The adapter's run, on a base of its own."""
    shutil.copytree(place / "base", tmp_path / "base")
    folder = Path(shutil.copytree(place / "adapter", tmp_path / "run"))
    with_manifest(
        folder,
        lambda: edit_json(
            folder / "adapter/adapter_config.json",
            base_model_name_or_path=str(tmp_path / "base"),
        ),
    )
    return folder


def with_manifest(folder: Path, change: Callable[[], Any]) -> None:
    """Change a run so that its hashes and settings still fit: as if it had been saved like this."""
    change()
    *rows, last = (folder / VERIFY_ROWS).read_text().splitlines()
    record = json.loads(last)["record"]
    for names in (record["files"], record["run"]):
        for name in names:
            if (folder / name).is_file():
                names[name] = sha256(folder / name)
    artifact = RunDir(folder).artifact()
    assert artifact is not None
    record["settings"] = settings_of(artifact)
    last = json.dumps({"record": record, "sha256": _digest(record)})
    (folder / VERIFY_ROWS).write_text("".join(line + "\n" for line in [*rows, last]))
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in list(manifest["files"]):
        path = folder / name
        if path.is_file():
            manifest["files"][name] = {"sha256": sha256(path), "bytes": path.stat().st_size}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def states(verdict: Verdict) -> dict[str, str]:
    return {check.name: check.state for check in verdict.checks}


def failure(verdict: Verdict) -> Any:
    (check,) = [check for check in verdict.checks if check.state == "failed"]
    return check


@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_a_run_as_it_was_saved(place: Path, kind: str) -> None:
    verdict = verify(str(place / kind))
    assert verdict.passed
    looked_at = ["files", "record", "opens", "contract", "rows", "logits"]
    if kind == "model":
        # All weights were rounded to the base's bfloat16; what that cost is a check of its own.
        looked_at.append("rounding")
    assert states(verdict) == dict.fromkeys(looked_at, "passed")
    numbers = next(check.numbers for check in verdict.checks if check.name == "logits")
    assert numbers["bit_equal"]
    assert numbers["positions"] > 64
    assert verdict.findings() == []


def test_a_folder_that_was_never_a_run_or_a_model(place: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("buy milk")
    for folder in (tmp_path, tmp_path / "notes"):
        shown = command("verify", folder)
        assert (shown.code, shown.out) == (2, "")
        assert f"error[no-run]: {folder} is neither a run nor a model" in shown.err
    # A run without its manifest is one still, and so is one that lost its contract.
    for name in ("manifest.json", "contract.json"):
        run = shutil.copytree(place / "adapter", tmp_path / name)
        (run / name).unlink()
        shown = command("verify", run)
        assert "no-run" not in shown.err
        if name == "manifest.json":
            told = "there is no manifest.json: it is written last, when a run has been verified"
            assert told in shown.out.replace("\n", " ").replace("  ", " ")


def test_a_checkpoint_and_a_plain_folder(place: Path) -> None:
    assert states(verify(str(place / "base"))) == {"opens": "passed"}
    verdict = verify(str(place / "adapter/checkpoints/step-00000001"))
    assert verdict.passed
    assert states(verdict)["logits"] == "not-checked"
    # The artifact by its own path is the run's.
    assert states(verify(str(place / "adapter/adapter")))["logits"] == "passed"


def test_a_checkpoint_does_not_stand_for_a_run(place: Path, tmp_path: Path) -> None:
    run = shutil.copytree(place / "adapter", tmp_path / "run")
    shutil.rmtree(run / "adapter")
    (run / "manifest.json").unlink()
    with pytest.raises(UsageError, match="the run is not finished") as caught:
        verify(str(run))
    assert caught.value.code == "run-unfinished"
    checkpoint = caught.value.fix.rsplit(" ", 1)[1]
    assert verify(checkpoint).passed


def test_rows_are_those_held_out_and_whole(place: Path) -> None:
    rows = read_rows(RunDir(place / "adapter"))
    assert len(rows) == 6
    assert all(row.held_out for row in rows)
    record = read_record(RunDir(place / "adapter"))
    assert record is not None
    # The last probe is a long row of random ids.
    assert [len(probe.ids) for probe in record.probes[:-1]] == [len(r.examples[0][0]) for r in rows]
    assert len(record.probes[-1].ids) == 256 - PADDING  # the context, with room for padding
    assert len(record.reading.greedy) == sum(len(probe.positions) for probe in record.probes)


def test_a_changed_file(run: Path) -> None:
    path = run / "adapter/adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x40
    path.write_bytes(data)
    verdict = verify(str(run))
    assert states(verdict)["files"] == states(verdict)["record"] == "failed"
    assert "changed: adapter/adapter_model.safetensors" in verdict.checks[0].what
    (finding, *_) = verdict.findings()
    assert (finding.code, finding.level) == ("verify-failed", "error")


def test_a_missing_file(run: Path) -> None:
    (run / "adapter/chat_template.jinja").unlink()
    verdict = verify(str(run))
    assert "missing: adapter/chat_template.jinja" in verdict.checks[0].what


def test_other_weights_with_fitting_hashes(run: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = run / "adapter/adapter_model.safetensors"
    tensors = {name: tensor * 3 for name, tensor in load_file(path).items()}
    with_manifest(run, lambda: save_file(tensors, path, metadata={"format": "pt"}))
    check = failure(verify(str(run)))
    assert check.name == "logits"
    assert "nats apart on average" in check.what


def test_another_base(run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = tmp_path / "base/model.safetensors"
    tensors = {name: -tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    verdict = verify(str(run))
    check = failure(verdict)
    assert (check.name, check.numbers["code"]) == ("opens", "adapter-wrong-base")
    # Both values side by side.
    (finding,) = verdict.findings()
    assert [line.split()[0] for line in finding.why.splitlines()[:2]] == ["trained", "found"]


def test_a_moved_base(run: Path, tmp_path: Path) -> None:
    moved = (tmp_path / "base").rename(tmp_path / "moved")
    assert failure(verify(str(run))).numbers["code"] == "adapter-no-base"
    assert verify(str(run), base=str(moved)).passed


def test_another_template(run: Path) -> None:
    path = run / "adapter/chat_template.jinja"
    with_manifest(
        run,
        lambda: path.write_text(
            path.read_text()
            .replace("<|user|>", "<|system|>")
            .replace("<|{{ m.role }}|>", "{{ m.role }}: ")
        ),
    )
    verdict = verify(str(run))
    failed = {check.name: check.what for check in verdict.checks if check.state == "failed"}
    assert list(failed) == ["contract", "rows"]
    assert "its chat template is different" in failed["contract"]
    assert "6 of 6 rows give different ids" in failed["rows"]


def test_another_stop_set(run: Path) -> None:
    path = run / "adapter/generation_config.json"
    with_manifest(run, lambda: edit_json(path, eos_token_id=[257, 258]))
    verdict = verify(str(run))
    check = next(check for check in verdict.checks if check.name == "contract")
    assert check.state == "failed"
    assert "stop: [257] then, [257, 258] now" in check.what


def test_another_tokenizer(run: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["x1"])

    with_manifest(run, lambda: tokenizer.save_pretrained(run / "adapter"))
    assert failure(verify(str(run))).numbers["code"] == "adapter-wrong-tokenizer"


def test_an_unfinished_run(run: Path) -> None:
    (run / "manifest.json").unlink()
    verdict = verify(str(run))
    assert verdict.passed
    assert states(verdict)["files"] == "not-checked"
    (run / VERIFY_ROWS).unlink()
    # The rows are written before the artifact gets its name: without them it cannot be judged.
    verdict = verify(str(run))
    assert not verdict.passed
    assert states(verdict)["record"] == "failed"
    assert states(verdict)["rows"] == states(verdict)["logits"] == "not-checked"
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UsageError):
        verify(str(run))


@pytest.mark.parametrize("name", [VERIFY_ROWS, "manifest.json", "contract.json"])
def test_damaged_records(run: Path, name: str) -> None:
    (run / name).write_text('{"conversation": 3}\n')
    with pytest.raises(InputError):
        verify(str(run))


@pytest.mark.usefixtures("verified_runs")
@pytest.mark.parametrize("method", [["--lora"], []])
def test_a_run_ends_with_its_verification(place: Path, tmp_path: Path, method: list[str]) -> None:
    run = tmp_path / "run"
    shown = command(
        *("train", place / "base", place / "rows.jsonl", *method, "-o", run),
        *("--max-steps", 1, "--batch-size", 4, "--eval-steps", 1),
    )
    assert shown.code == 0, shown.err
    checks = 5 if method else 6
    assert f"verified by a fresh process: {checks} checks passed (verify.json)" in shown.out
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["verified"] is True
    assert "verify.json" in manifest["files"]
    verdict = json.loads((run / "verify.json").read_text())
    # The manifest is written after it.
    assert [c["name"] for c in verdict["checks"] if c["state"] != "passed"] == ["files"]
    assert verify(str(run)).passed


def test_an_interrupted_save_leaves_the_old_artifact(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import truetune.run.artifact as module

    run = Path(shutil.copytree(place / "model", tmp_path / "run"))
    # As if the process had died between its artifact and its manifest.
    (run / "manifest.json").unlink()
    before = {p.name: sha256(p) for p in (run / "model").iterdir()}
    save = module.save_model

    def interrupted(loaded: Any, contract: Any, folder: Path, **settings: Any) -> Any:
        if folder.name == ".model.partial":
            raise KeyboardInterrupt
        return save(loaded, contract, folder, **settings)

    monkeypatch.setattr(module, "save_model", interrupted)
    assert command("train", "--resume", run).code == 130
    assert {p.name: sha256(p) for p in (run / "model").iterdir()} == before
    monkeypatch.setattr(module, "save_model", save)
    shown = command("train", "--resume", run)
    assert shown.code == 0, shown.err
    # Resumed to the same weights; nothing is left of the two attempts. The model card names the
    # folder that it is in, and this run is a copy.
    after = {p.name: sha256(p) for p in (run / "model").iterdir()}
    assert before.pop("README.md") != after.pop("README.md")
    assert after == before
    assert not [p.name for p in run.iterdir() if p.name.startswith(".")]


@pytest.mark.usefixtures("verified_runs")
def test_positions_that_end_with_the_context(tmp_path: Path) -> None:
    """Learned positions: no probe, and no padding behind one, reaches beyond the last of them."""
    context = 40
    settings = {**MORE["gpt2"], "n_positions": context}
    write_model(tmp_path / "base", "gpt2", **settings)
    data = write_rows(tmp_path / "rows.jsonl", [{"text": f"{i} {'ab' * 90}"} for i in range(6)])
    seen = command(
        *("train", tmp_path / "base", data, "-o", tmp_path / "run"),
        *("--max-steps", 2, "--batch-size", 2, "--max-length", context),
    )
    assert seen.code == 0, seen.out + seen.err
    verdict = json.loads((tmp_path / "run" / "verify.json").read_text())
    assert verdict["passed"], verdict
    assert "logits" in {c["name"] for c in verdict["checks"] if c["state"] == "passed"}


@pytest.mark.usefixtures("verified_runs")
def test_a_run_that_does_not_verify_fails_and_keeps_what_it_saved(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import truetune.run.artifact as module

    save = module.save_model

    def forgetful(loaded: Any, contract: Any, folder: Path, **settings: Any) -> Any:
        report = save(loaded, contract, folder, **settings)
        if folder.name == ".model.partial":
            edit_json(folder / "generation_config.json", eos_token_id=[258])
        return report

    monkeypatch.setattr(module, "save_model", forgetful)
    run = tmp_path / "run"
    shown = command(
        *("train", place / "base", place / "rows.jsonl", "-o", run, "--max-steps", 1),
        *("--batch-size", 4, "--eval-steps", 1),
    )
    assert shown.code == 1
    assert "what was saved is not what was trained" in shown.err
    assert shown.err.count("stop: [257] then, [257, 258] now") == 1
    assert "stop: [257] then" not in shown.out
    recorded = (run / "findings.jsonl").read_text()
    # The folder is not the one that was written, and it is served otherwise.
    assert recorded.count('"verify-failed"') == 2
    assert json.loads((run / "manifest.json").read_text())["verified"] is False
    assert (run / "model/model.safetensors").is_file()


def found(**changes: Any) -> Agreement:
    same: dict[str, Any] = {
        "max_difference": 0.0, "mean_difference": 0.0, "spread": 1.0,
        "max_logprob_difference": 0.0, "greedy": 1.0, "reference_loss": 2.0, "loss": 2.0,
        "num_positions": 100,
    }  # fmt: skip
    return Agreement(**(same | changes))


@pytest.mark.parametrize(
    ("dtype", "changes", "state"),
    [
        ("float32", {}, "passed"),
        ("float32", {"mean_difference": 9e-5}, "passed"),
        ("float32", {"mean_difference": 2e-4}, "failed"),
        ("bfloat16", {"mean_difference": 0.05}, "passed"),
        ("bfloat16", {"mean_difference": 0.8}, "failed"),
        ("bfloat16", {"greedy": 0.95}, "passed"),
        ("bfloat16", {"greedy": 0.5}, "failed"),
        # 95 % over many positions; one in six of 30 is still chance.
        ("bfloat16", {"greedy": 0.93, "num_positions": 1000}, "passed"),
        ("bfloat16", {"greedy": 0.92, "num_positions": 1000}, "failed"),
        ("bfloat16", {"greedy": 0.84, "num_positions": 30}, "passed"),
        ("bfloat16", {"greedy": 0.8, "num_positions": 30}, "failed"),
        ("float32", {"greedy": 0.999, "num_positions": 1000}, "passed"),
        ("float32", {"greedy": 0.998, "num_positions": 1000}, "failed"),
        ("float32", {"greedy": 0.99, "num_positions": 100}, "failed"),
        ("float16", {"loss": 2.1}, "failed"),
        ("bfloat16", {"loss": 2.05, "mean_difference": None, "spread": None}, "passed"),
    ],
)
def test_what_is_too_far(dtype: str, changes: dict[str, Any], state: str) -> None:
    assert judge("merge", found(**changes), dtype, "a against b").state == state


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({"mean_difference": 0.014}, "passed"),
        ({"mean_difference": 0.016}, "failed"),
        ({"greedy": 0.955}, "passed"),
        ({"greedy": 0.95}, "failed"),
        ({"loss": 2.014}, "passed"),
        ({"loss": 2.02}, "failed"),
    ],
)
def test_what_is_too_far_for_this_model(changes: dict[str, Any], state: str) -> None:
    """Three times what rounding by chance costs it, where that was measured."""
    floor = found(mean_difference=0.005, greedy=0.99, num_positions=1000)
    asked = found(**{"num_positions": 1000, **changes})
    assert judge("merge", asked, "bfloat16", "a against b", floor).state == state
    # The same is within what any model is allowed, or not far beyond it.
    if "mean_difference" in changes:
        assert judge("merge", asked, "bfloat16", "a against b").state == "passed"


def test_a_token_without_a_lead_may_change_when_weights_are_rounded() -> None:
    """A model that has hardly been trained favours no token; only clear favourites count."""
    import torch

    def measured(logits_PV: torch.Tensor) -> Measured:
        logprobs = logits_PV.log_softmax(dim=-1)[:, 0].tolist()
        greedy = tuple(logits_PV.argmax(dim=-1).tolist())
        return Measured((tuple(logprobs),), (greedy,), (logits_PV,))

    draw = torch.Generator().manual_seed(0)
    unsure = 0.01 * torch.randn((200, 50), generator=draw)
    noise = 0.01 * torch.randn((200, 50), generator=draw)
    found = at_clear_leads(measured(unsure), measured(unsure + noise))
    # The share that is required of tokens is 0.95.
    assert agreement(measured(unsure), measured(unsure + noise)).greedy < 0.9
    assert (found.greedy, found.num_positions) == (1.0, 0)
    # The same noise beside clear favourites; and one of ten favourites that is another one.
    sure = unsure.clone()
    sure[:, 7] += 1
    found = at_clear_leads(measured(sure), measured(sure + noise))
    assert (found.greedy, found.num_positions) == (1.0, 200)
    turned = (sure + noise).clone()
    turned[::10, 7] -= 2
    assert at_clear_leads(measured(sure), measured(turned)).greedy == pytest.approx(0.9)


def test_training_that_saving_undid_is_named() -> None:
    check = judge_rounding(found(loss=2.12, mean_difference=0.0), "bfloat16")
    assert check.state == "failed"
    assert "less than bfloat16 can represent" in check.numbers["why"]
    assert "higher learning rate" in check.fix
    assert judge_rounding(found(loss=2.05, mean_difference=0.0), "bfloat16").state == "passed"


def test_from_the_command_line_through_a_fresh_process(
    place: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run / "adapter/generation_config.json"
    with_manifest(run, lambda: edit_json(path, eos_token_id=[258]))
    shown = command("verify", run, "--json")
    assert (shown.code, json.loads(shown.out)["passed"]) == (1, False)
    monkeypatch.undo()
    shown = command("verify", place / "model")
    assert shown.code == 0, shown.err
    assert "passed       opens" in shown.out
    assert "reloaded model compared with the trained one in memory at" in shown.out
    assert "positions; bit-identical" in shown.out
    # A process that dies, as one without memory does.
    monkeypatch.setattr(sys, "executable", "/bin/false")
    shown = command("verify", run)
    assert shown.code == 1
    assert "failed       opens" in shown.out
    # Once, with its place and what to do.
    assert (shown.out + shown.err).count("ended with 1") == 1


def test_a_crash_says_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in Python is not explained as a want of memory."""
    from truetune.verification import fresh

    request = {"artifact": {"folder": "somewhere"}}

    def why(start: str) -> tuple[str, str]:
        worker = tmp_path / "worker.py"
        worker.write_text(start)
        monkeypatch.setattr(fresh, "_WORKER", worker)
        with pytest.raises(fresh.VerifyError) as told:
            fresh.ask(request)
        assert told.value.code == "verify-crashed"
        return told.value.why, told.value.fix

    cause, fix = why("def f():\n    raise ImportError('no such name')\nf()")
    assert cause.startswith("ImportError: no such name\n")
    assert 'worker.py", line 2, in f' in cause
    assert "memory" not in cause + fix
    cause, fix = why("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert "memory" in cause
    assert "memory" in fix
    cause, fix = why("import os, signal; os.kill(os.getpid(), signal.SIGTERM)")
    assert "SIGTERM" in cause
    assert "memory" not in cause + fix
    cause, fix = why("raise MemoryError")
    assert "memory" in fix
    # Half a reply is none.
    assert "exit code 0" in why("print('{')")[0]


def test_the_process_ends_with_its_parent() -> None:
    """Killed, a verify leaves neither its fresh process nor the rows it sent there."""
    import os
    import signal
    import subprocess
    import time

    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from truetune.verification import fresh\n"
        "fresh._WORKER = Path(sys.argv[1])\n"
        "fresh.ask({'artifact': {'folder': 'x'}})\n"
    )
    worker = (
        "import os, sys, time\n"
        "sys.stdin.buffer.readline()\n"
        "open(__file__ + '.pid', 'w').write(str(os.getpid()))\n"
        "time.sleep(600)\n"
    )
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        mark = Path(folder) / "child.py"
        mark.write_text(worker)
        environment = {**os.environ, "TMPDIR": folder}
        parent = subprocess.Popen([sys.executable, "-c", code, str(mark)], env=environment)
        for _ in range(600):
            if (found := Path(f"{mark}.pid")).exists() and found.read_text():
                break
            time.sleep(0.1)
        child = int(found.read_text())
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        for _ in range(200):
            try:
                os.kill(child, 0)
            except ProcessLookupError:
                break
            time.sleep(0.05)
        else:
            os.kill(child, signal.SIGKILL)
            raise AssertionError("the fresh process outlived its parent")
        assert sorted(path.name for path in Path(folder).iterdir()) == ["child.py", "child.py.pid"]


def test_rows_of_one_place(tmp_path: Path, place: Path) -> None:
    """A JSON array on one line, as json.dump writes it: every row is line 1 of the file."""
    path = tmp_path / "one.json"
    path.write_text(json.dumps([*sums(120), {"prompt": "?", "completion": "<|user|>"}]))
    shown = command(
        *("train", place / "base", path, "-o", tmp_path / "run", "--max-steps", 1),
        *("--batch-size", 4, "--eval-steps", 1, "--bad-rows", "drop", "--content-specials"),
        "error",
    )
    assert shown.code == 0, shown.err
    data = json.loads((tmp_path / "run/data.json").read_text())
    assert (data["train"]["examples"], data["held_out"]["examples"]) == (114, 6)
    assert len(data["dropped"]) == 1
    rows = read_rows(RunDir(tmp_path / "run"))
    assert len({str(row.conversation.messages) for row in rows}) == len(rows) == 6
    assert verify(str(tmp_path / "run")).passed
    # The rows of a small set are trained ones; all of them are kept apart too.
    path.write_text(json.dumps(sums(24)))
    shown = command(
        *("train", place / "base", path, "-o", tmp_path / "small", "--max-steps", 1),
        *("--batch-size", 4),
    )
    assert shown.code == 0, shown.err
    verdict = verify(str(tmp_path / "small"))
    assert verdict.passed, verdict.findings()
    assert len(read_rows(RunDir(tmp_path / "small"))) == 24
