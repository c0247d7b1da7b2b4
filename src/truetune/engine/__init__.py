"""Optimiser, schedule, checkpoint and resume, the loop."""
