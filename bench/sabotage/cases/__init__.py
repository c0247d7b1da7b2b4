"""The breakages, one module a family."""

from bench.sabotage.cases import (
    adapters,
    decoders,
    ends,
    labels,
    lengths,
    packing,
    prompts,
    rows,
    served,
    steps,
    tables,
)

FAMILIES = (
    ends,
    prompts,
    served,
    lengths,
    labels,
    packing,
    rows,
    tables,
    adapters,
    steps,
    decoders,
)
CASES = tuple(case for family in FAMILIES for case in family.CASES)
