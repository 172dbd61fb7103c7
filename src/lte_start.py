"""Start of the command ``lte``: Ctrl-C while its libraries are imported, which takes seconds, ends in one line too."""

import sys


def main() -> int:
    try:
        from lte.cli.main import main as run
    except KeyboardInterrupt:
        print("lte: error: interrupted", file=sys.stderr)
        return 130
    return run()
