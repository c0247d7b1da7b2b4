"""Evaluate models on rows: replies, matches, loss, and the differences between models."""
