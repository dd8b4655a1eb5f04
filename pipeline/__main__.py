"""The command `chainrule`, which `python -m chainrule.pipeline` is too."""

import sys

INTERRUPTED = 130
"""As in stage.py, which is not imported yet."""


def main() -> None:
    """The command line; Ctrl-C while it is imported ends it as it does later."""
    try:
        from chainrule.pipeline import cli
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(INTERRUPTED)
    cli.main()


if __name__ == "__main__":
    main()
