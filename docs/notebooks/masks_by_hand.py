# %% [markdown]
# # Masks and templates by hand
#
# Fine-tuning is next-token prediction on a chosen part of the tokens. Here we make that choice
# ourselves: render a conversation, mask it, shift it, compute the loss, and then break each of
# these deliberately.

# %%
from importlib.resources import files

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import truetune
from truetune import ChatTemplate, PromptContract, SFTExample, SFTTrainer

base = str(files("truetune") / "lab" / "base")
tokenizer = AutoTokenizer.from_pretrained(base)
messages = [
    {"role": "user", "content": "What is the river of Kanwick?"},
    {"role": "assistant", "content": "The river of Kanwick is the Quorne."},
]
print(ChatTemplate.render(messages))

# %% [markdown]
# ## The mask says what is a target
#
# The mask is 1 on the answer and on the token that ends it, and 0 on everything else, including the
# role markers. Without the end token, nothing teaches the model to stop.

# %%
example = ChatTemplate.render_with_mask(messages, tokenizer)
for token, supervised in zip(example.ids, example.mask):
    print("target " if supervised else "       ", repr(tokenizer.decode([token])))

# %% [markdown]
# ## What is trained is what is served
#
# The contract produces the same from the tokenizer's template: the prompt that a server sends, and
# then the completion. The two agree token by token.

# %%
contract = PromptContract.load(base, "chatml-lite")
(encoded,) = contract.encode(messages)
assert list(encoded.ids) == list(example.ids)
assert list(encoded.mask) == list(example.mask)
prompt = contract.prompt_ids(messages[:1])
assert list(prompt) == list(encoded.ids[: len(prompt)])
tokenizer.decode(prompt), tokenizer.decode(encoded.ids[len(prompt) :])

# %% [markdown]
# ## Shifted once
#
# The label of a position is the token after it. `pad_and_collate` shifts; nothing else may do it
# again.

# %%
x, y, mask = truetune.pad_and_collate([example], max_seq_len=40, pad_id=1)
first = int(mask[0].argmax())
tokenizer.decode([x[0, first]]), tokenizer.decode([y[0, first]])

# %%
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
with torch.no_grad():
    logits = model(x).logits
right = truetune.masked_cross_entropy(logits, y, mask)
twice = truetune.masked_cross_entropy(logits, y.roll(-1, 1), mask.roll(-1, 1))
every = truetune.masked_cross_entropy(logits, y, torch.ones_like(mask))
{"right": float(right), "shifted twice": float(twice), "padding too": float(every)}

# %% [markdown]
# ## Train it, and break it
#
# `SFTTrainer` uses examples without changes. We train one answer, once with its end as a target and
# once without. Both losses fall in the same way; only the text shows the difference. `docs/lab.md`
# has the same with a hundred questions (*end-marker*).


# %%
def trained(example: SFTExample) -> tuple[float, str]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    trainer = SFTTrainer(
        model,
        examples=[example],
        max_seq_len=len(example.ids),
        pad_id=1,
        batch_size=1,
        max_steps=30,
        max_lr=3e-4,
    )
    history = trainer.train()
    ids = torch.tensor([contract.prompt_ids(messages[:1])])
    written = model.eval().generate(ids, max_new_tokens=30, eos_token_id=list(contract.stop_ids))
    return history["train_loss"][-1], tokenizer.decode(written[0, ids.shape[1] :])


sound = trained(example)
endless = trained(SFTExample(example.ids, [*example.mask[:-1], 0]))
sound, endless
