"""The command line: its commands, and how their errors end it. Each command has a module of its own.

Status 0: as asked. 1: what was asked has an answer, and it is not good (see each command). 2: it could not be done.
An error is one line on stderr.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

import click

from .._cli.bench import bench
from .._cli.check import check
from .._cli.serve import serve
from .._version import __version__

_NAME = "grpc-batcher"

_COMMANDS = (serve, bench, check)


class _Interrupted(click.ClickException):
    """Ctrl-C, where no command makes use of it."""

    exit_code = 130  # what shells say of a program that SIGINT ended


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # of which click would make an empty line on stderr
            raise _Interrupted("interrupted") from None


# --version is no setting: a container may have GRPC_BATCHER_VERSION for a purpose of its own.
@click.group(
    _NAME,
    cls=_Group,
    commands=_COMMANDS,
    context_settings={"max_content_width": 120, "show_default": True, "auto_envvar_prefix": "GRPC_BATCHER"},
)
@click.version_option(__version__, prog_name=_NAME, message="%(prog)s %(version)s", allow_from_autoenv=False)
def command() -> None:
    """Serve a function to many callers in batches, and ask those that serve.

    Each option may come from the environment, by the name that its help gives; what is on the command line wins.
    """


for _command in _COMMANDS:
    for _parameter in _command.params:
        if isinstance(_parameter, click.Option):
            _parameter.show_envvar = True


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its status. An error is a line on stderr."""
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        # Process 1 of a container has no default: without a handler it would not heed the signal while a module loads.
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
    """The command as the user named it, where click does not say."""
    return f"{_NAME} {arguments[0]}" if arguments and arguments[0] in command.commands else _NAME


def _say(command_path: str, message: str) -> None:
    print(f"{command_path}: {' '.join(message.split())}", file=sys.stderr)
