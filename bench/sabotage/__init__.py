"""Deliberate breakages of training scripts, each with its healthy twin, and who notices."""
