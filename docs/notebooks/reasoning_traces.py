# %% [markdown]
# # Reasoning traces
#
# The base can add two numbers but has never added three. We give it rows with a worked step between
# think markers, and look at the effect of the markers, the step and the length limit.

# %%
import json
import random
from importlib.resources import files
from pathlib import Path

import truetune

base = str(files("truetune") / "lab" / "base")
rng = random.Random(1)


def row(a: int, b: int, c: int) -> dict[str, str]:
    return {
        "problem": f"What is {a} plus {b} plus {c}?",
        "thinking": f"{a} plus {b} is {a + b}. {a + b} plus {c} is {a + b + c}.",
        "solution": f"The result is {a + b + c}.",
    }


triples = [(a, b, c) for a in range(1, 16) for b in range(1, 16) for c in range(1, 16)]
rng.shuffle(triples)
folder = Path("runs/traces")
folder.mkdir(parents=True, exist_ok=True)


def write(name: str, chosen: list[tuple[int, int, int]]) -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row(*t)) + "\n" for t in chosen), encoding="utf-8")
    return str(path)


train, held_out = write("train.jsonl", triples[:800]), write("held_out.jsonl", triples[800:850])
row(*triples[0])

# %% [markdown]
# ## Where the thinking goes
#
# The template writes it between markers. The markers are new to this base: with LoRA, their
# embeddings must be trained too, which `add_token` does (*new-tokens* in `docs/lab.md`).

# %%
options = {
    "chat_template": "user-assistant-think",
    "add_token": ["<think>", "</think>"],
    "lora": True,
    "lora_r": 32,
    "lora_alpha": 64,
    "lora_dropout": 0.0,
    "learning_rate": 2e-3,
    "max_steps": 200,
    "batch_size": 8,
}
checked = truetune.check(base, train, quiet=True, **options)
checked.ok

# %% [markdown]
# ## A length limit cuts the end off
#
# A length limit cuts the end of a trace: the closing marker, the answer and the stop token. `check`
# refuses to lose many rows that way (*cut-reasoning* in `docs/lab.md` trains on them anyway).

# %%
cut = truetune.check(base, train, quiet=True, **options, max_length=30)
[finding.code for finding in cut.findings if finding.level == "error"]

# %% [markdown]
# ## Train and ask what was not trained

# %%
run = truetune.train(
    base, train, output="runs/traces/run", overwrite=True, quiet=True, verify=False, **options
)
chat = truetune.chat("runs/traces/run", max_new_tokens=64)
reply = chat.ask("What is 3 plus 4 plus 5?")
reply.text, reply.stopped

# %%
found = truetune.evaluate("runs/traces/run", held_out, match="exact", max_new_tokens=64, quiet=True)
found
