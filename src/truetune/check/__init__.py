"""Preflight: what can be known to go wrong before the compute is spent.

One file a family, each with a tuple of functions; a function takes the facts of the coming run
and yields findings. Judged is the effect on ids, masks and stop ids, never a setting.
"""

from truetune.check.preflight import Preflight, preflight

__all__ = ["Preflight", "preflight"]
