"""`python -m truetune`, and `torchrun ... -m truetune`: the command line."""

from truetune.cli import main

main()
