"""The command line: its commands, and what their errors print. Each command has its own module.

Status 0: done. 1: done, and the answer is a bad one (each command says which). 2: it could not be done. Errors print
one line to stderr.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

import click

from .._version import __version__
from .bench import bench
from .check import check
from .info import info
from .serve import serve

_NAME = "grpc-batcher"

_COMMANDS = (serve, bench, check, info)


class _Interrupted(click.ClickException):
    """Ctrl-C, where no command handles it."""

    exit_code = 130  # what shells report for a program that SIGINT ended


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # for which click would print an empty line to stderr
            raise _Interrupted("interrupted") from None


# --version is not a setting: a container may use GRPC_BATCHER_VERSION for its own purposes.
@click.group(
    _NAME,
    cls=_Group,
    commands=_COMMANDS,
    context_settings={"max_content_width": 120, "show_default": True, "auto_envvar_prefix": "GRPC_BATCHER"},
)
@click.version_option(__version__, prog_name=_NAME, message="%(prog)s %(version)s", allow_from_autoenv=False)
def command() -> None:
    """Serve a function to many callers in batches, and query running servers.

    Every option can also be set by the environment variable its help names; the command line takes precedence.
    """


for _command in _COMMANDS:
    for _parameter in _command.params:
        if isinstance(_parameter, click.Option):
            _parameter.show_envvar = True


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its status. Errors print one line to stderr."""
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        # A container's process 1 ignores signals without a handler, and loading a module may take long.
        signal.signal(signal.SIGTERM, lambda number, _frame: os._exit(128 + number))
    try:
        return int(command.main(list(arguments), prog_name=_NAME, standalone_mode=False) or 0)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        _say(context.command_path if context else _command_path(arguments), error.format_message())
        return error.exit_code


def _command_path(arguments: Sequence[str]) -> str:
    """The command as the user typed it, where click does not say."""
    return f"{_NAME} {arguments[0]}" if arguments and arguments[0] in command.commands else _NAME


def _say(command_path: str, message: str) -> None:
    print(f"{command_path}: {' '.join(message.split())}", file=sys.stderr)
