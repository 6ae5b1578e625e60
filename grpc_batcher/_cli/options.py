"""What the commands share: durations, metadata, TLS files, and addresses that lead nowhere."""

from __future__ import annotations

import math
import re
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click
import grpc

from .._contract import MAX_DURATION_S, metadata_fault

_Command = TypeVar("_Command", bound=Callable[..., Any])

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
NEW_FILE = click.Path(dir_okay=False, writable=True, path_type=Path)

# Targets that gRPC resolves without asking a name server.
_NOT_BY_NAME = re.compile(r"(unix|unix-abstract|ipv4|ipv6|vsock|xds):")


class CommandError(click.ClickException):
    """The command cannot do what was asked; the message names the value to blame."""

    exit_code = 2


def seconds(value: Any) -> float:
    """Parse a number of seconds from 0. Raises BadParameter."""
    return _seconds(value, "from 0", lambda number: number >= 0)


def seconds_above_0(value: Any) -> float:
    """Parse a number of seconds above 0. Raises BadParameter."""
    return _seconds(value, "above 0, up", lambda number: number > 0)


def _seconds(value: Any, allowed: str, is_good: Callable[[float], bool]) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not (is_good(number) and number <= MAX_DURATION_S):
        raise click.BadParameter(f"{value!r} is not a number of seconds {allowed} to {MAX_DURATION_S:.0f}.")
    return number


def sizes(value: Any) -> list[int]:
    """Parse numbers separated by commas. Raises BadParameter."""
    try:
        return [int(number) for number in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers such as 1,4,16.") from None


class KeyValue(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """Metadata as key=value; in an environment variable, one per line. Errors never show values: they may be secret."""

    name = "KEY=VALUE"
    envvar_list_splitter = "\n"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):  # click asks again
            return value
        key, separator, content = value.partition("=")
        if not separator:
            self.fail("the value is not of the form key=value.", param, ctx)
        key = key.strip().lower()  # gRPC accepts only lower case
        if fault := metadata_fault(key, content):
            self.fail(f"{fault}.", param, ctx)
        return key, content


def metadata_option(when: str) -> Callable[[_Command], _Command]:
    """Return the option for metadata. Its help says when the metadata is sent."""
    return click.option(
        "--metadata",
        type=KeyValue(),
        multiple=True,
        help=f"Sent {when}, for instance a token. Repeatable; in the variable, one per line.",
    )


# ---- TLS ----


@dataclass(frozen=True)
class Security:
    """How a client verifies a server, and identifies itself to it. Plain values, to be sent to other processes.

    encrypted: whether to use TLS. The other fields configure it.
    ca: the certificates to trust, in PEM; None for gRPC's own.
    key, certificate: the client's own, in PEM, or None.
    server_name: the name expected in the server's certificate; None for the address's.
    """

    encrypted: bool = False
    ca: bytes | None = None
    key: bytes | None = None
    certificate: bytes | None = None
    server_name: str | None = None

    def credentials(self) -> grpc.ChannelCredentials | None:
        """gRPC's credentials; None for plaintext."""
        return grpc.ssl_channel_credentials(self.ca, self.key, self.certificate) if self.encrypted else None

    def options(self) -> tuple[tuple[str, str], ...]:
        """The channel options that belong to them."""
        return (("grpc.ssl_target_name_override", self.server_name),) if self.server_name else ()


def security_options(command: _Command) -> _Command:
    """Give a command the options that `security` takes."""
    for option in (
        click.option("--tls-server-name", help="The name in the server's certificate, if it differs from the address."),
        click.option("--tls-key", type=FILE, help="The private key of --tls-cert, in PEM."),
        click.option("--tls-cert", type=FILE, help="This caller's certificate, in PEM, for servers that require one."),
        click.option("--tls-ca", type=FILE, help="Certificates to trust, in PEM. Default: gRPC's own."),
        click.option("--tls/--no-tls", help="Use TLS. Any other TLS option implies it."),
    ):
        command = option(command)
    return command


def security(
    tls: bool, tls_ca: Path | None, tls_cert: Path | None, tls_key: Path | None, tls_server_name: str | None
) -> Security:
    """Read the files named by the options. Raises CommandError."""
    key, certificate = read_pair(tls_cert, tls_key)
    ca = None if tls_ca is None else read_certificates("--tls-ca", tls_ca)
    encrypted = tls or ca is not None or certificate is not None or tls_server_name is not None
    return Security(encrypted, ca, key, certificate, tls_server_name)


def read_certificates(option: str, path: Path) -> bytes:
    """Return a file of PEM certificates. gRPC itself is silent about files that do not parse. Raises CommandError."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
        return path.read_bytes()
    except OSError as error:  # ssl's errors are OSErrors, too
        raise CommandError(f"{option} {path}: it contains no readable PEM certificates: {error}") from None


def read_pair(certificate: Path | None, key: Path | None) -> tuple[bytes | None, bytes | None]:
    """Return the private key and the certificate of --tls-cert and --tls-key, or two None. Raises CommandError."""
    if certificate is None and key is None:
        return None, None
    if certificate is None or key is None:
        raise click.UsageError("--tls-cert and --tls-key go together; only one was given")
    content = read_certificates("--tls-cert", certificate)
    try:
        # With a password, or OpenSSL would ask for the one of an encrypted key, which gRPC does not accept.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="none")
        return key.read_bytes(), content
    except OSError as error:
        if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
            raise CommandError(f"--tls-key {key}: it does not match --tls-cert {certificate}") from None
        raise CommandError(f"--tls-key {key}: it contains no readable, unencrypted PEM private key: {error}") from None


# ---- addresses ----


def check_has_port(address: str) -> None:
    """Raise UsageError for a host without a port, where gRPC would assume 443."""
    if _NOT_BY_NAME.match(address):
        return
    port = re.search(r":(\d+)$", address)
    if not port:
        raise click.UsageError(f"the address {address!r} has no port; write it as host:port, or unix:/path")
    if int(port[1]) > 65535:  # gRPC would reduce it modulo 65,536
        raise click.UsageError(f"the address {address!r} has a port above 65535")


def unresolved(address: str) -> str | None:
    """Say why an address's host does not resolve; None if it does, or if that is unknown.

    Ask only after gRPC has failed: behind a proxy, which gRPC may use, names need not resolve here.
    """
    if _NOT_BY_NAME.match(address):
        return None
    host, _, port = address.rpartition("/")[2].rpartition(":")
    try:
        socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        return f"the address {address!r} does not resolve: {error}"
    return None
