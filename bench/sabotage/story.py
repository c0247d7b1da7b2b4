"""A TRL script with the best-known mistake in it, and the line that stops it.

    python -m bench.sabotage.story            stopped before the first step
    python -m bench.sabotage.story --mended   the same script with the fix applied

It trains the model that truetune ships, so it needs no files; any other folder or id of a chat
model may be named behind it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

BASE = Path(__file__).parents[2] / "src" / "truetune" / "lab" / "base"


def main(arguments: Sequence[str] | None = None) -> None:
    import torch
    from bench.sabotage.house import scratch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling
    from trl import SFTConfig, SFTTrainer

    import truetune
    from truetune.contract.builtin import builtin_template

    parser = argparse.ArgumentParser(prog="python -m bench.sabotage.story", description=__doc__)
    parser.add_argument("model", nargs="?", default=str(BASE))
    parser.add_argument("--mended", action="store_true", help="with the fix applied")
    chosen = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    model = AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.float32)
    if chosen.model == str(BASE):  # a base model: it has no template of its own
        tokenizer.chat_template = builtin_template("chatml-lite", tokenizer)
        tokenizer.eos_token = "<|end|>"
    tokenizer.pad_token = tokenizer.eos_token

    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {n} plus {n}?"},
                {"role": "assistant", "content": f"It is {2 * n}."},
            ]
        }
        for n in range(64)
    ]
    # This collator masks the pad token wherever it stands, the real end of each answer included.
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            output_dir=scratch("story"),
            max_steps=3,
            per_device_train_batch_size=1,
            report_to=[],
            bf16=False,
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        data_collator=None if chosen.mended else collator,
    )
    print(truetune.audit(trainer).raise_for_errors())
    trainer.train()


if __name__ == "__main__":
    main()
