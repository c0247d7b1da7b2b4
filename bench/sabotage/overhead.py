"""What the one line costs: `truetune.audit` before a TRL run of 1,000 rows.

    python -m bench.sabotage.overhead [--rows N] [--words W]

Prints the seconds of building the trainer and of the audit, each the median of three in turn; on a
machine that others use, the seconds of computing are what the audit itself costs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

from bench.sabotage.build import trl
from bench.sabotage.house import MODELS, REAL, House, answer, messages


def main(arguments: Sequence[str] | None = None) -> None:
    import datasets

    import truetune

    parser = argparse.ArgumentParser(prog="python -m bench.sabotage.overhead", description=__doc__)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--words", type=int, default=150, help="about as many in an answer")
    parser.add_argument("--times", type=int, default=3)
    chosen = parser.parse_args(arguments)
    datasets.disable_progress_bars()
    house = House(real=(MODELS / REAL["instruct"]).is_dir())
    tokenizer = house.tokenizer()
    rows = [
        {"messages": messages(i, reply=lambda k: answer(k, words=chosen.words))}
        for i in range(chosen.rows)
    ]
    truetune.audit(trl(tokenizer, house.model(tokenizer), rows[:8]))  # imports and first use
    built, audited, busy = [], [], []
    for _ in range(chosen.times):
        start = time.perf_counter()
        # Held-out rows are read as well.
        trainer = trl(tokenizer, house.model(tokenizer), rows, eval_dataset=rows[:50])
        middle = time.perf_counter()
        computing = time.process_time()
        report = truetune.audit(trainer)
        built.append(middle - start)
        audited.append(time.perf_counter() - middle)
        busy.append(time.process_time() - computing)
    print(f"tokenizer {house.name}, {chosen.rows} rows, {report.summary['tokens']:,} tokens")
    print(f"build the trainer  {statistics.median(built):.2f} s")
    print(f"audit              {statistics.median(audited):.2f} s", end="")
    print(f", of them {statistics.median(busy):.2f} s of computing")


if __name__ == "__main__":
    main()
