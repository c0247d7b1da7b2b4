"""`python -m truetune`, and `torchrun ... -m truetune`: the command line."""

import sys

# `python -m` puts the working folder before Python's own modules: a stranger's json.py there would
# run. What Python imports before this line it has imported from there already; only `truetune` and
# `python -P -m truetune` do not look there at all.
if not sys.flags.safe_path:
    del sys.path[0]

from truetune.cli import main

main()
