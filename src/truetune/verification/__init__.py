"""Verify in a fresh process that what was saved is what was trained."""
