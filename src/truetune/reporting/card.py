"""Write the model card of a saved model: Hub metadata, training data and method, measurements, and
the lines that load and serve it."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from truetune.data.sources import is_hub_id
from truetune.errors import InputError
from truetune.findings import counted, escaped, visible
from truetune.reporting.facts import RunFacts
from truetune.reporting.html import words
from truetune.reporting.serving import load_line, serve_line
from truetune.reporting.verdict import LOSSES, SHARES, verdict
from truetune.run_dir import RunDir, write_text

CARD = "README.md"
# The Hub allows 96 characters; a path may be longer than what a file system answers for.
_LONGEST_ID = 200
# What a front matter calls its licence, and what holds one.
_FRONT = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
_USE = "<!-- truetune: how to use it -->", "<!-- truetune: end -->"
# Rows of the recipe, files and findings that a card lists.
_MOST = 40


def write_card(run: RunDir, artifact: Path) -> None:
    """Write README.md of a run's artifact.

    Raises:
        SaveError: it cannot be written.
    """
    facts = RunFacts.read(run, state="finished")
    write_text(artifact / CARD, card(facts, str(artifact), is_adapter=bool(facts.adapter)))


def write_merged_card(
    run: RunDir | None, adapter: Path, folder: Path, name: Path, verdict_: Mapping[str, Any]
) -> None:
    """Write README.md of an adapter that was merged into its base.

    Args:
        run: the run that trained the adapter; None if it is not available.
        adapter: its folder.
        folder: of the merged model, under the name that it has now.
        name: that it will have.
        verdict_: what verify.json holds of the merged model; {} if nothing was compared.

    Raises:
        SaveError: it cannot be written.
    """
    facts = RunFacts.read(run or RunDir(adapter), state="finished")
    config = facts.adapter or RunFacts.read_adapter(adapter)
    merged = RunFacts(**{**vars(facts), "adapter": config, "verdict": verdict_})
    write_text(folder / CARD, card(merged, str(name), is_adapter=False))


def card(run: RunFacts, folder: str, *, is_adapter: bool) -> str:
    """The text of a model card.

    Args:
        folder: of the model, as it is to be named in commands.
        is_adapter: else the weights are whole.
    """
    base = str(run.adapter.get("base_model_name_or_path") or run.setting("model") or "")
    license_ = _license(base, run.adapter.get("revision") or run.setting("revision"))
    parts = [
        f"---\n{_metadata(run, base, license_, is_adapter=is_adapter)}\n---\n",
        f"# {_text(_title(Path(folder).absolute()))}\n",
        _summary(run, base, is_adapter=is_adapter),
        "## How to use it\n",
        use_block(run, folder, base if is_adapter else None),
        "## Is it what was trained?\n",
        *(f"- **{a.question}: {a.word}.** {_text(a.why)}" for a in verdict(run)),
        "\n## What it can do and what it cannot\n",
        *_abilities(run),
        "\n## What it was trained on\n",
        *_rows(run),
        "\n## How it was trained\n",
        *_recipe(run),
        "\n## Prompt and answer\n",
        *_contract(run, is_adapter=is_adapter),
        "\n## Licence\n",
        f"The base is licensed under `{_code(license_)}`; training adds no further terms."
        if license_
        else "The base's files name no licence, so this card names none: read the base's terms "
        "before you distribute the model.",
        "",
    ]
    return "\n".join(parts)


def _title(folder: Path) -> str:
    """Its name; of a run's artifact that of the run."""
    return folder.parent.name if folder.name in ("adapter", "model") else folder.name


def _metadata(run: RunFacts, base: str, license_: str, *, is_adapter: bool) -> str:
    from huggingface_hub import ModelCardData

    method = [name for name in ("qlora", "dora", "lora") if run.setting(name)][:1]
    data = run.data.get("files") or ()
    sets = [str(file.get("path", "")).partition(" ")[0].partition("@")[0] for file in data]
    hub_sets = sorted({name.partition(":")[0] for name in sets if _is_on_hub(name)})
    made = ModelCardData(
        base_model=base if _is_on_hub(base) else None,
        datasets=hub_sets or None,
        license=license_ or None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["truetune", "sft", *method],
    )
    return made.to_yaml().strip()


def _is_on_hub(name: str) -> bool:
    """Whether a name is one of the Hub: the same text may be a folder here."""
    return len(name) <= _LONGEST_ID and not Path(name).exists() and is_hub_id(name)


def _license(base: str, revision: Any) -> str:
    """What the base's own card or config says; "" if neither says anything."""
    for name in (CARD, "config.json"):
        here = Path(base) / name
        path = here if os.path.isfile(here) else _cached(base, name, revision)
        try:
            text = path.read_text(encoding="utf-8")[:100_000] if path else ""
        except (OSError, UnicodeDecodeError):
            continue
        if found := _said(name, text):
            return found
    return ""


def _said(name: str, text: str) -> str:
    import yaml

    try:
        if name == CARD:
            front = _FRONT.match(text)
            value = yaml.safe_load(front[1]) if front else {}
        else:
            value = json.loads(text)
        said = value.get("license") if isinstance(value, dict) else None
    except (ValueError, RecursionError, yaml.YAMLError):
        return ""
    return said if isinstance(said, str) and re.fullmatch(r"[\w.+-]{1,60}", said) else ""


def _cached(base: str, name: str, revision: Any) -> Path | None:
    """A file of the Hub that is here already; nothing is fetched."""
    from huggingface_hub import try_to_load_from_cache

    if not _is_on_hub(base):
        return None
    try:
        found = try_to_load_from_cache(base, name, revision=str(revision) if revision else None)
    except (ValueError, OSError):
        return None
    return Path(found) if isinstance(found, str) else None


# ------------------------------------------------------------------------------------- parts


def _text(value: Any) -> str:
    """Escape foreign text for Markdown, on one line and without markup."""
    line = " ".join(str(value).split())[:1000]
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", escaped(line))


def _code(value: Any) -> str:
    """Foreign text between backticks or in a fence."""
    return visible(str(value)).replace("`", "'").replace("<!--", "<! --")[:2000]


def _summary(run: RunFacts, base: str, *, is_adapter: bool) -> str:
    named = _text(base if _is_on_hub(base) else Path(base).name) if base else "a base model"
    version = (run.env.get("versions") or {}).get("truetune")
    tool = f"truetune {_text(version)}" if version else "truetune"
    if is_adapter:
        kind = "A QLoRA adapter" if run.setting("qlora") else "A LoRA adapter"
        what = f"{kind} for {named}"
    elif run.adapter:
        what = f"{named} with an adapter merged into it"
    else:
        what = f"{named}, fine-tuned with all weights"
    train = run.data.get("train") or {}
    rows = f" on {counted(train['examples'], 'example')}" if train.get("examples") else ""
    local = "" if _is_on_hub(base) or not base else " The base came from a local folder."
    return f"{what}, trained by supervised fine-tuning{rows} with {tool}.{local}\n"


def use_block(run: RunFacts, folder: str, base: str | None, repo: str | None = None) -> str:
    """The lines that load, chat with and serve it, between two marks.

    Args:
        folder: of the model, as it is to be named.
        base: of an adapter; None of a whole model.
        repo: its name on the Hub, where it comes from there.
    """
    settings = {name: run.setting(name) for name in run.recipe}
    unread = any(f.get("code") == "adapter-stop-unread" for f in run.findings)
    unread = unread or "skipped" in str(run.env.get("check", ""))
    stops = [s.get("id") for s in run.contract.get("stop") or ()] if unread and base else []
    lines = [f"hf download {repo} --local-dir {shlex.quote(folder)}"] if repo else []
    lines += [
        serve_line(
            folder,
            settings,
            run=str(run.path),
            base=base,
            base_revision=run.adapter.get("revision"),
            stops=stops,
            dtype=str(run.manifest.get("dtype") or ""),
        ),
        f"truetune chat {shlex.quote(folder)}",
    ]
    kind = "AutoPeftModelForCausalLM" if base else "AutoModelForCausalLM"
    home = "peft" if base else "transformers"
    load = load_line(repo or folder, settings, is_adapter=base is not None)
    return "\n".join(
        [
            _USE[0],
            "```python",
            f"from {home} import {kind}",
            f"model = {_code(load)}",
            "```",
            "```",
            *(_code(line) for line in lines),
            "```",
            _USE[1],
            "",
        ]
    )


def with_use_block(text: str, block: str) -> str:
    """Replace the lines that use the model; leave a card without our marks unchanged."""
    before, found, rest = text.partition(_USE[0])
    after = rest.partition(_USE[1])
    return f"{before}{block.rstrip()}{after[2]}" if found and after[1] else text


def _abilities(run: RunFacts) -> Iterator[str]:
    """The numbers of the first probe and the last, and what was found."""
    table = []
    for name, label in {**SHARES, **LOSSES}.items():
        points = run.series(name)
        if not points:
            continue
        first, last = points[0], points[-1]
        if name in SHARES:
            row = f"{100 * first[1]:.0f} %", f"{100 * last[1]:.0f} %"
        else:
            row = f"{first[1]:.3f}", f"{last[1]:.3f}"
        begin = row[0] if first[0] == 0 else "\u2013"
        # Some signs could not be taken at the last step.
        stale = name in SHARES and run.vitals and last[0] != run.vitals[-1].get("step")
        after = f"{row[1]} (step {last[0]:,})" if stale else row[1]
        if name != "eval_loss" or not run.series("held_out_loss"):
            table.append(f"| {label} | {begin} | {after} |")
    if table:
        yield "| measured on fixed prompts and texts | before | after |\n|---|---|---|"
        yield from table
        yield "\nLosses are in nats per token; prompts were rendered as they are served."
    else:
        yield "Not measured: the run had no probes and no held-out rows."
    found = run.behaviour("error", "warning", "note")
    for finding in found[:_MOST]:
        yield f"- {_text(finding.get('what', ''))}"
    yield (
        "\nNothing else was measured: whether its answers are correct, safe or up to date is "
        "unknown."
    )


def _rows(run: RunFacts) -> Iterator[str]:
    for name, title in (("train", "trained"), ("held_out", "held out")):
        count = run.data.get(name) or {}
        if count.get("examples"):
            yield (
                f"- {title}: {counted(count['examples'], 'example')}, {count.get('tokens', 0):,} "
                f"tokens, {count.get('supervised_tokens', 0):,} of them supervised (sha256 of ids "
                f"and masks `{_code(count.get('sha256', ''))}`)"
            )
    dropped = run.data.get("dropped") or ()
    if run.data:
        yield f"- read: {counted(run.data.get('rows_read', 0), 'row')}; dropped: {len(dropped):,}"
    else:
        yield "Unknown: the run that trained it is not available here."
    for file in (run.data.get("files") or ())[:_MOST]:
        path = str(file.get("path", ""))
        # Where it lay on somebody's disk is nobody else's business.
        shown = path if _is_on_hub(path.partition("@")[0]) else Path(path).name
        yield (
            f"- `{_code(shown)}`: {counted(file.get('num_rows', 0), 'row')}, sha256 "
            f"`{_code(file.get('sha256', ''))}`"
        )


# Settings that name folders of somebody's disk.
_PLACES = {"model", "data", "eval_data", "output", "chat_template"}


def _recipe(run: RunFacts) -> Iterator[str]:
    rows = []
    for name, row in run.recipe.items():
        if not isinstance(row, Mapping) or row.get("origin") == "default":
            continue
        value = words(row.get("value"))
        if not value or name in ("output", "overwrite"):
            continue
        if name in _PLACES and not _is_on_hub(value):
            value = Path(value).name
        rows.append(f"| {_text(name)} | {_text(value)} | {_text(row.get('origin', ''))} |")
    if not rows:
        yield "Unknown: the run that trained it is not available here."
        return
    yield "| setting | value | origin |\n|---|---|---|"
    yield from rows[:_MOST]
    versions = run.env.get("versions") or {}
    if versions:
        yield "\nWith " + ", ".join(f"{_text(n)} {_text(v)}" for n, v in versions.items()) + "."


def _contract(run: RunFacts, *, is_adapter: bool) -> Iterator[str]:
    if not run.contract:
        yield "See the chat template and generation_config in this folder."
        return
    template = run.contract.get("template") or {}
    yield f"- template: {_text(template.get('origin', ''))}, saved as `chat_template.jinja`"
    if arguments := run.contract.get("template_kwargs"):
        shown = _code(json.dumps(arguments, ensure_ascii=False))
        yield f"- template arguments, saved as its defaults: `{shown}`"
    stops = run.contract.get("stop") or ()
    ends = ", ".join(f"`{_code(s.get('token', ''))}` ({_code(s.get('id', ''))})" for s in stops)
    yield f"- answers end on: {ends or 'nothing'}"
    if is_adapter:
        yield (
            "- the stop tokens are listed in this folder's `generation_config.json`; a server "
            "reads the base's instead, so requests may have to list them"
        )


def read_card(folder: Path) -> str:
    """The card of a folder; "" if it has none.

    Raises:
        InputError: it cannot be read.
    """
    path = folder / CARD
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"the model card cannot be read: {error}",
            where=str(path),
            fix="write the model card again",
        ) from error
