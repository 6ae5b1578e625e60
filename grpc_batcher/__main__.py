"""The command `grpc-batcher`, which is also `python -m grpc_batcher`."""

from __future__ import annotations

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line, and exit with its status."""
    try:
        import click  # noqa: F401
    except ImportError:
        print('grpc-batcher: the command line needs click: pip install "grpc-batcher[cli]"', file=sys.stderr)
        sys.exit(2)
    from ._cli.command import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
