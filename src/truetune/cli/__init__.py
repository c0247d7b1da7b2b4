"""The command line: the verbs and the screens. Nothing else prints."""


def main() -> None:
    """Entry point of `truetune`."""
    from truetune.cli.verbs import main as run

    run()
