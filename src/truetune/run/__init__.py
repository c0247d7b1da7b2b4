"""A run from recipe to manifest: the pipeline, and its stages one file each.

`pipeline.py` is the page to read first.
"""
