"""Optimizer, schedule, checkpoint and resume, the loop."""
