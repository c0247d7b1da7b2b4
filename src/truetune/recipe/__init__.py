"""Settings of a run, and what they are made from."""
