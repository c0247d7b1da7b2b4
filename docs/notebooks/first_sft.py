# %% [markdown]
# # A first fine-tuning run
#
# A base model continues text. It does not answer, and it does not stop. Here we teach the small
# base that ships with truetune to do both, with 97 hand-written rows and about half a minute of
# CPU time. The base has read about an invented country, so every answer can be checked.

# %%
import json
from importlib.resources import files

import truetune

lab = files("truetune") / "lab"
base, instructions = str(lab / "base"), str(lab / "instructions.jsonl")
rows = [json.loads(line)["messages"] for line in open(instructions, encoding="utf-8")]
len(rows), rows[0]

# %% [markdown]
# ## Before: the text continues
#
# We ask the base through the template that we are about to train. It continues writing about its
# country, because it has never seen a question.

# %%
before = truetune.chat(base, chat_template="chatml-lite", max_new_tokens=30)
before("What is the river of Flanbarrow?")

# %% [markdown]
# ## Check first
#
# `check` renders every row through the template, compares what will be trained with what a server
# will send, and says what would go wrong. No weights are loaded.

# %%
options = {
    "chat_template": "chatml-lite",
    "max_steps": 150,
    "learning_rate": 1e-4,
    "batch_size": 16,
}
checked = truetune.check(base, instructions, quiet=True, **options)
checked.ok, [finding.code for finding in checked.findings]

# %% [markdown]
# ## Train
#
# The loss covers only the answers, each with the token that ends it. After training, a fresh
# process loads what was saved and compares it with what was trained.

# %%
run = truetune.train(base, instructions, output="runs/first", overwrite=True, quiet=True, **options)
run.train_loss, run.verdict.passed

# %% [markdown]
# ## After: it answers and stops
#
# Flanbarrow occurs in no row. The river is not new knowledge: the base had read about it, and now
# it answers when it is asked. `docs/lab.md` measures this on a hundred places (*knowledge*).

# %%
after = truetune.chat("runs/first")
reply = after.ask("What is the river of Flanbarrow?")
reply.text, reply.stopped

# %% [markdown]
# ## Count
#
# One reply shows little. `evaluate` asks the questions of rows, compares the replies, and gives
# intervals. These rows were trained, so this measures what was learned; held-out rows measure how
# well it generalises.

# %%
found = truetune.evaluate(
    [base, "runs/first"],
    instructions,
    match="exact",
    max_new_tokens=40,
    chat_template="chatml-lite",
    limit=40,
    quiet=True,
)
found
