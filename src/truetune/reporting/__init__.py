"""Pages of a run, made from its directory alone."""
