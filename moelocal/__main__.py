"""The `moelocal` command; `python -m moelocal` is the same."""

import gc
import os
import sys


def main() -> None:
    """Starts the command line. Starting makes many objects and no garbage, so nothing is collected meanwhile; a model
    that is open turns the collector on again."""
    gc.disable()
    if sys.stdout is None:  # closed by the caller: `>&-`
        sys.exit("Error: Standard output is closed, so the answer would be lost.\nTo do without it: > /dev/null")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        from moelocal.cli.app import main as command_line

        command_line()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
