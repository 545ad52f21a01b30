"""Starts the command line; a probe goes its own way, which imports little: it runs every few seconds, on a busy machine."""

from __future__ import annotations

import sys


def main() -> None:
    """What the command `ai4thai` runs."""
    from ai4thai import probe

    arguments = sys.argv[1:]
    if probe.is_meant(arguments):
        sys.exit(probe.main(arguments[1:]))
    from ai4thai import cli

    cli.main()


if __name__ == "__main__":
    main()
