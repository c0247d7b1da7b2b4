"""Tokens that are added: only their rows move, in embedding and head, and they are saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tiny_models import NUM_TOKENS, edit_json, tiny_tokenizer, write_model
from tiny_runs import command, write_rows
from truetune.contract.contract import PromptContract
from truetune.contract.example import SFTExample
from truetune.data.conversation import Conversation
from truetune.errors import ModelError, UsageError
from truetune.model.load import LoadedModel, load_model
from truetune.model.lora import LoraSettings, add_lora
from truetune.model.new_tokens import (
    NewToken,
    add_tokens,
    make_room,
    rows_now,
    rows_report,
    start_full_rows,
)
from truetune.model.save import save_model
from truetune.model.tokenizer import num_ids
from truetune.run.account import unused_tokens
from truetune.verification.new_tokens import written_findings, written_tokens
from truetune.verification.rows import VerifyRow

KINDS = ["llama", "qwen2", "qwen3", "phi3", "gemma"]
THINK = ["<think>", "</think>"]
MANY = [f"<{i}>" for i in range(5)]  # the tiny models have 3 spare rows


def prepared(
    folder: Path, texts: list[str], kind: str = "llama", *, dtype: str = "float32", **changes: Any
) -> tuple[LoadedModel, list[NewToken]]:
    """An adapter with new rows on a tiny model."""
    source = folder / f"{kind}-{len(texts)}"
    if not source.exists():
        write_model(source, kind, **changes)
    loaded = load_model(source, purpose="lora", device="cpu", dtype=dtype)
    tokens, _ = add_tokens(loaded.tokenizer, texts)
    make_room(loaded.model, num_ids(loaded.tokenizer))
    return add_lora(loaded, LoraSettings(r=2, dropout=0.0), seed=0, new_tokens=tokens), tokens


def ids_with(tokens: list[NewToken]) -> Any:
    """Two rows (2, 14) in which every new token occurs."""
    import torch

    new = torch.tensor([t.id for t in tokens] * 12)[:12]
    return torch.stack([torch.arange(14), torch.cat([new, torch.tensor([5, 6])])])


def train(model: Any, ids_BT: Any, steps: int = 3, decay: float = 0.1) -> None:
    import torch

    model.train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=decay
    )
    for _ in range(steps):
        optimizer.zero_grad()
        model(ids_BT, labels=ids_BT, use_cache=False).loss.backward()
        optimizer.step()


def logits(model: Any, ids_BT: Any) -> Any:
    import torch

    model.eval()
    with torch.no_grad():
        return model(ids_BT).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_only_the_new_rows_move_and_come_back(tmp_path: Path, kind: str, tied: bool) -> None:
    import torch
    from safetensors import safe_open

    loaded, tokens = prepared(tmp_path, THINK, kind, tie_word_embeddings=tied)
    before = rows_now(loaded.model, tokens, is_adapter=True, at_start=True)
    frozen = {n: p.clone() for n, p in loaded.model.named_parameters() if not p.requires_grad}
    ids_BT = ids_with(tokens)
    train(loaded.model, ids_BT)
    after = rows_now(loaded.model, tokens, is_adapter=True)
    report, findings = rows_report(before, after, tokens)
    assert findings == []
    assert len(report["largest_change"]) == (1 if tied else 2)
    assert all(c > 1e-3 for changes in report["largest_change"].values() for c in changes)
    assert set(report["other_rows_identical"].values()) == {True}
    assert all(torch.equal(p, frozen[n]) for n, p in loaded.model.named_parameters() if n in frozen)

    contract = PromptContract.load(loaded.tokenizer)
    save_model(loaded, contract, tmp_path / "out")
    with safe_open(tmp_path / "out/adapter_model.safetensors", framework="pt") as file:
        names = [n for n in file.keys() if "trainable_tokens" in n]  # noqa: SIM118
        assert len(names) == (1 if tied else 2)
        assert all(file.get_slice(n).get_shape() == [2, 32] for n in names)
    again = load_model(tmp_path / "out", device="cpu")
    assert torch.equal(logits(loaded.model, ids_BT), logits(again.model, ids_BT))
    assert len(again.tokenizer) == len(loaded.tokenizer)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("texts", [THINK, MANY])
@pytest.mark.parametrize("tied", [True, False])
def test_peft_opens_what_was_saved(tmp_path: Path, kind: str, texts: list[str], tied: bool) -> None:
    import torch
    from peft import AutoPeftModelForCausalLM

    loaded, tokens = prepared(tmp_path, texts, kind, tie_word_embeddings=tied)
    ids_BT = ids_with(tokens)
    train(loaded.model, ids_BT)
    save_model(loaded, PromptContract.load(loaded.tokenizer), tmp_path / "out")
    again = load_model(tmp_path / "out", device="cpu")
    ours = logits(loaded.model, ids_BT)
    assert torch.equal(ours, logits(again.model, ids_BT))
    opened = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    # float32: peft multiplies with the whole table, so that sums run in another order.
    assert torch.allclose(ours, logits(opened, ids_BT), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma"])
@pytest.mark.parametrize("tied", [True, False])
def test_rows_give_what_the_whole_table_gives(tmp_path: Path, kind: str, tied: bool) -> None:
    """Logits and gradients of peft's own layer, which copies the table."""
    import torch
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    loaded, tokens = prepared(tmp_path, THINK, kind, tie_word_embeddings=tied)
    ids_BT = ids_with(tokens)
    train(loaded.model, ids_BT, steps=1)

    def gradients() -> dict[str, Any]:
        loaded.model.zero_grad()
        loaded.model(ids_BT, labels=ids_BT, use_cache=False).loss.backward()
        return {n: p.grad.clone() for n, p in loaded.model.named_parameters() if p.requires_grad}

    ours, our_logits = gradients(), logits(loaded.model, ids_BT)
    layers = [m for m in loaded.model.modules() if isinstance(m, TrainableTokensLayer)]
    assert len(layers) == 2
    for layer in layers:
        assert type(layer) is not TrainableTokensLayer
        layer.__class__ = TrainableTokensLayer
    theirs, their_logits = gradients(), logits(loaded.model, ids_BT)
    assert torch.allclose(our_logits, their_logits, atol=1e-5, rtol=1e-5)
    for name, gradient in theirs.items():
        scale = max(float(gradient.abs().max()), 1e-3)
        assert float((ours[name] - gradient).abs().max()) < 1e-5 * scale + 1e-7, name


def test_rows_start_at_the_mean_of_their_pieces(tmp_path: Path) -> None:
    import torch

    loaded, tokens = prepared(tmp_path, ["<ab>"], tie_word_embeddings=False)
    (token,) = tokens
    assert token.id == NUM_TOKENS
    assert list(token.pieces) == tiny_tokenizer().encode("<ab>")
    model = loaded.transformers_model
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = table.original_module.weight
        row = table.token_adapter.trainable_tokens_delta["default"]
        assert torch.equal(row[0], weight[list(token.pieces)].mean(dim=0))


def test_rows_are_float32_on_a_bfloat16_base(tmp_path: Path) -> None:
    import torch

    loaded, tokens = prepared(tmp_path, THINK, dtype="bfloat16")
    rows = [p for n, p in loaded.model.named_parameters() if "trainable_tokens" in n]
    assert {p.dtype for p in rows} == {torch.float32}
    ids_BT = ids_with(tokens)
    train(loaded.model, ids_BT)
    save_model(loaded, PromptContract.load(loaded.tokenizer), tmp_path / "out")
    again = load_model(tmp_path / "out", device="cpu", dtype="bfloat16", purpose="lora")
    assert torch.equal(logits(loaded.model, ids_BT), logits(again.model, ids_BT))


@pytest.mark.parametrize("tied", [True, False])
def test_all_weights_with_new_rows(tmp_path: Path, tied: bool) -> None:
    import torch

    source = write_model(tmp_path / "m", tie_word_embeddings=tied)
    loaded = load_model(source, device="cpu")
    tokens, _ = add_tokens(loaded.tokenizer, MANY)
    added = make_room(loaded.model, num_ids(loaded.tokenizer))
    assert added == 2
    start_full_rows(loaded.model, tokens)
    before = rows_now(loaded.model, tokens, is_adapter=False)
    table = loaded.model.get_input_embeddings().weight
    assert torch.allclose(table[tokens[0].id], table[list(tokens[0].pieces)].mean(dim=0))
    ids_BT = ids_with(tokens)
    train(loaded.model, ids_BT)
    report, findings = rows_report(before, rows_now(loaded.model, tokens, is_adapter=False), tokens)
    assert (findings, report["other_rows_identical"]) == ([], {})
    save_model(loaded, PromptContract.load(loaded.tokenizer), tmp_path / "out")
    again = load_model(tmp_path / "out", device="cpu")
    assert again.findings == ()
    assert torch.equal(logits(loaded.model, ids_BT), logits(again.model, ids_BT))
    head, embedding = again.model.get_output_embeddings(), again.model.get_input_embeddings()
    assert (head.weight is embedding.weight) == tied
    assert len(head.weight) == NUM_TOKENS + 5


def test_a_row_that_did_not_move_is_told(tmp_path: Path) -> None:
    loaded, tokens = prepared(tmp_path, THINK, tie_word_embeddings=False)
    before = rows_now(loaded.model, tokens, is_adapter=True, at_start=True)
    train(loaded.model, ids_with(tokens[:1]), decay=0.0)
    report, (finding,) = rows_report(
        before, rows_now(loaded.model, tokens, is_adapter=True), tokens
    )
    assert (finding.code, finding.level, finding.count) == ("new-row-unmoved", "warning", 1)
    assert "'</think>'" in finding.what
    # It is in no row: its embedding stays, its row in the head is pushed down by every target.
    assert [changes[1] > 0 for changes in report["largest_change"].values()] == [False, True]


def test_an_other_row_that_moved_is_an_error(tmp_path: Path) -> None:
    import torch

    loaded, tokens = prepared(tmp_path, THINK)
    before = rows_now(loaded.model, tokens, is_adapter=True, at_start=True)
    train(loaded.model, ids_with(tokens))
    with torch.no_grad():
        table = loaded.transformers_model.get_input_embeddings().original_module.weight
        table[3, 0] += 1e-6 + table[3, 0].abs() * 1e-6
    _, findings = rows_report(before, rows_now(loaded.model, tokens, is_adapter=True), tokens)
    assert [(f.code, f.level) for f in findings] == [("other-rows-moved", "error")]


def test_tokens_that_the_model_writes_and_those_it_does_not(tmp_path: Path) -> None:
    import torch

    loaded, tokens = prepared(tmp_path, THINK, tie_word_embeddings=True)
    first, last = (token.id for token in tokens)
    contract = PromptContract.load(loaded.tokenizer)
    ids = [*contract.prompt_ids([{"role": "user", "content": "1+1?"}]), first, 50, last, 51, 257]
    start = ids.index(first)
    chat = Conversation(({"role": "user", "content": "1+1?"},), where="rows:1")
    row = VerifyRow(chat, True, ((ids, [0] * start + [1] * 5),))
    plain = VerifyRow(chat, True, (([*ids[:start], 50, 257], [0] * start + [1] * 2),))
    (before, _) = written_tokens(loaded, contract, [plain, row, row], tokens)
    assert (before.text, before.asked, before.written) == ("<think>", 2, 0)
    (finding,) = written_findings([before])
    assert (finding.code, finding.level, finding.count) == ("new-token-unwritten", "warning", 1)
    assert "held-out prompts should contain new tokens" in finding.what

    train(loaded.model, torch.tensor([ids]), steps=40)
    counts = written_tokens(loaded, contract, [plain, row, row], tokens)
    assert [(c.text, c.asked, c.written) for c in counts] == [("<think>", 2, 2), ("</think>", 2, 2)]
    (finding,) = written_findings(counts)
    assert (finding.code, finding.level) == ("new-tokens-written", "note")
    assert "'<think>' in 2 of 2, '</think>' in 2 of 2" in finding.what
    # A token that no answer should hold is not asked for.
    assert written_tokens(loaded, contract, [plain], tokens) == []
    assert written_findings([]) == []


def test_a_token_that_exists_keeps_its_value() -> None:
    tokenizer = tiny_tokenizer()
    tokens, (note,) = add_tokens(tokenizer, ["<|user|>", "<new>", "<new>"])
    assert (note.code, note.level) == ("token-exists", "note")
    assert [(t.id, bool(t.pieces)) for t in tokens] == [(258, False), (NUM_TOKENS, True)]
    assert tokenizer.decode([NUM_TOKENS], skip_special_tokens=True) == "<new>"


@pytest.mark.parametrize("text", ["", " ", " <a>", "<a>\n"])
def test_texts_that_cannot_be_tokens(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        add_tokens(tiny_tokenizer(), [text])
    assert caught.value.code == "add-token"


@pytest.mark.parametrize("target", ["embed_tokens", "model.embed_tokens"])
def test_a_table_is_not_trained_twice(tmp_path: Path, target: str) -> None:
    loaded = load_model(write_model(tmp_path / "m"), purpose="lora")
    tokens, _ = add_tokens(loaded.tokenizer, THINK)
    settings = LoraSettings(r=2, target_modules=["q_proj", target])
    with pytest.raises(UsageError) as caught:
        add_lora(loaded, settings, seed=0, new_tokens=tokens)
    assert caught.value.code == "lora-table-twice"


def test_an_adapter_row_beyond_its_tokenizer(tmp_path: Path) -> None:
    loaded, _ = prepared(tmp_path, THINK)
    save_model(loaded, PromptContract.load(loaded.tokenizer), tmp_path / "out")
    edit_json(
        tmp_path / "out/adapter_config.json",
        trainable_token_indices={"embed_tokens": [10**12], "lm_head": [10**12]},
    )
    with pytest.raises(ModelError) as caught:
        load_model(tmp_path / "out")
    assert caught.value.code == "adapter-wrong-tokenizer"


ROWS = [{"prompt": f"{i}+1?", "completion": f"<think>add</think>{i + 1}."} for i in range(110)]


@pytest.mark.parametrize("method", [["--lora"], []])
def test_from_the_command_line(tmp_path: Path, method: list[str]) -> None:
    write_model(tmp_path / "m", tie_word_embeddings=True)
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    run = tmp_path / "run"
    shown = command(
        *("train", tmp_path / "m", data, *method, "-o", run, "--max-steps", 4),
        *("--batch-size", 4, "--eval-steps", 4, "--save-steps", 2),
        *("--add-token", "<think>", "--add-token", "</think>"),
    )
    assert shown.code == 0, shown.err
    report = json.loads((run / "new_tokens.json").read_text())
    assert [token["text"] for token in report["tokens"]] == THINK
    assert all(c > 0 for changes in report["largest_change"].values() for c in changes)
    assert [(entry["text"], entry["asked"]) for entry in report["written"]] == [
        ("<think>", 6),
        ("</think>", 6),
    ]
    artifact = run / ("adapter" if method else "model")
    assert load_model(artifact).tokenizer.encode("<think>") == [NUM_TOKENS]
    # A checkpoint is an artifact as well.
    (step,) = [p for p in (run / "checkpoints").iterdir() if p.name.endswith("2")]
    assert load_model(step).tokenizer.encode("</think>") == [NUM_TOKENS + 1]


def test_tokens_that_no_row_trains_are_told(tmp_path: Path) -> None:
    write_model(tmp_path / "m")
    rows = [{"prompt": f"<q>{i}+1?", "completion": f"{i + 1}."} for i in range(30)]
    shown = command(
        *("train", tmp_path / "m", write_rows(tmp_path / "rows.jsonl", rows), "--lora"),
        *("-o", tmp_path / "run", "--max-steps", 1),
        *("--add-token", "<q>", "--add-token", "<never>"),
    )
    assert shown.code == 0, shown.err
    assert "'<q>' occurs only in prompts" in shown.out
    assert "'<never>' does not occur in the training rows" in shown.out


def test_no_token_for_an_adapter_or_beyond_the_model(tmp_path: Path) -> None:
    loaded, _ = prepared(tmp_path, THINK)
    save_model(loaded, PromptContract.load(loaded.tokenizer), tmp_path / "adapter")
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    more = ("--lora", "-o", tmp_path / "run", "--add-token", "<x>")
    shown = command("train", tmp_path / "adapter", data, *more)
    assert (shown.code, "tokens cannot be added to an adapter" in shown.err) == (2, True)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(MANY)
    source = write_model(tmp_path / "beyond", tokenizer=tokenizer)
    shown = command("train", source, data, *more)
    assert (shown.code, "no token can be added" in shown.err) == (2, True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("ids", "mask", "said"),
    [
        ([3, 4, 5], [0, 1, 1], "does not occur in the training rows"),
        ([3, 9, 5], [0, 0, 1], "occurs only in prompts"),
        ([3, 9, 9], [0, 0, 1], ""),
    ],
)
def test_a_new_token_that_no_row_asks_for(ids: list[int], mask: list[int], said: str) -> None:
    found = unused_tokens([NewToken("<|map|>", 9, (1, 2))], [SFTExample(ids, mask)])
    assert [f.code for f in found] == ["new-token-untrained"] * bool(said)
    assert all(said in f.what for f in found)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_new_rows_in_the_head_leave_its_logits_in_chunks(
    tmp_path: Path, kind: str, tied: bool
) -> None:
    """Loss and gradients to 1e-5 of those from all logits, which are never made."""
    import contextlib

    import torch

    from truetune.compute.packing import pack
    from truetune.compute.route import find_route

    loaded, tokens = prepared(tmp_path, THINK, kind, tie_word_embeddings=tied)
    model, new = loaded.model, [token.id for token in tokens]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens" in name or "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(3))
    route = find_route(model, longest=40)
    assert route.head is not None
    assert route.head.tail is not None
    vocabulary = model.config.vocab_size
    assert route.head.buffer_bytes(contextlib.nullcontext) > 4 * vocabulary
    rows = [[1, 2, new[0], 4, new[1], 6, 7, new[0], 9], [3, new[1], new[0], 8, 5]]
    batch = pack([SFTExample(ids, [0, 0] + [1] * (len(ids) - 2)) for ids in rows], [0, 1])
    shapes: list[Any] = []
    layer = next(m for m in route.head.module.modules() if isinstance(m, torch.nn.Linear))
    handle = layer.register_forward_hook(lambda module, args, out: shapes.append(out.shape))
    results = []
    for tail in (route.head.tail, None):
        route.head.tail = tail
        with route.scope(batch):
            loss = route.loss_sum(batch)
            loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((float(loss.detach()), grads))
        model.zero_grad()
    handle.remove()
    assert [shape[-2] for shape in shapes] == [0, len(batch.positions_N)]
    (fused, by_chunks), (own, whole) = results
    assert fused == pytest.approx(own, rel=1e-5)
    assert by_chunks.keys() == whole.keys()
    assert any("trainable_tokens" in name for name in whole)
    for name, gradient in whole.items():
        limit = 1e-5 * float(gradient.abs().max())
        assert float((by_chunks[name] - gradient).abs().max()) <= limit, name
