"""The command line: the verbs and the screens. Nothing else prints."""

import sys


def main() -> None:
    """Entry point of `truetune`."""
    # Ctrl-C while the verbs are imported, or while an end is told, is Ctrl-C as well: without this,
    # Python prints a traceback and dies of the signal.
    try:
        from truetune.cli.verbs import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
