"""The experiments, one module each: `EXPERIMENT` is its declaration, committed before its first
run."""
