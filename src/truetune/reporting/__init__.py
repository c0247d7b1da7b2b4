"""Pages of a run: read from its directory alone, and from nothing else."""
