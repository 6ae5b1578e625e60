"""What the commands share: seconds, metadata, TLS files, and addresses that lead nowhere."""

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

from .._contract import fault_of

_Command = TypeVar("_Command", bound=Callable[..., Any])

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
NEW_FILE = click.Path(dir_okay=False, writable=True, path_type=Path)

_MOST_S = 1e9

# Targets that gRPC resolves without a name server.
_NOT_BY_NAME = re.compile(r"(unix|unix-abstract|ipv4|ipv6|vsock|xds):")


class Failure(click.ClickException):
    """The command can not do what it was asked to; the message names the value that is to blame."""

    exit_code = 2


def seconds(value: Any) -> float:
    """Read a number of seconds that is neither negative nor endless. Raises BadParameter."""
    return _seconds(value, "from 0", lambda number: number >= 0)


def seconds_above_0(value: Any) -> float:
    """The same for those that may not be 0."""
    return _seconds(value, "above 0, up", lambda number: number > 0)


def _seconds(value: Any, allowed: str, is_good: Callable[[float], bool]) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not (is_good(number) and number <= _MOST_S):
        raise click.BadParameter(f"{value!r} is no number of seconds {allowed} to {_MOST_S:.0f}.")
    return number


class KeyValue(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """Metadata as key=value; in an environment variable a line each. No error shows a value: it may be a secret."""

    name = "KEY=VALUE"
    envvar_list_splitter = "\n"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):  # click asks again
            return value
        key, separator, content = value.partition("=")
        if not separator:
            self.fail("what was given is not of the form key=value.", param, ctx)
        key = key.strip().lower()  # gRPC takes lower case alone
        if fault := fault_of(key, content):
            self.fail(f"{fault}.", param, ctx)
        return key, content


def metadata_option(when: str) -> Callable[[_Command], _Command]:
    """The option for metadata that is sent `when` its help says."""
    return click.option(
        "--metadata",
        type=KeyValue(),
        multiple=True,
        help=f"Sent {when}, such as a token. May be given again, or in several lines of the variable.",
    )


# ---- TLS ----


@dataclass(frozen=True)
class Security:
    """How a client trusts a server, and shows itself to it. Plain values, for another process to have.

    encrypted: whether to speak TLS. What follows is for it.
    ca: the certificates to trust, in PEM; None for those that come with gRPC.
    key, certificate: the client's own, in PEM, or None.
    server_name: the name that is to stand in the server's certificate; None for that of the address.
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
        """The channel options that go with them."""
        return (("grpc.ssl_target_name_override", self.server_name),) if self.server_name else ()


def security_options(command: _Command) -> _Command:
    """Give a command the options that `security` takes."""
    for option in (
        click.option("--tls-server-name", help="The name in the server's certificate, where it is not the address's."),
        click.option("--tls-key", type=FILE, help="The private key of --tls-cert, in PEM."),
        click.option("--tls-cert", type=FILE, help="This caller's certificate, in PEM, for servers that ask for one."),
        click.option(
            "--tls-ca", type=FILE, help="Certificates to trust, in PEM; those that come with gRPC if not given."
        ),
        click.option("--tls/--no-tls", help="Speak TLS. Any other TLS option implies it."),
    ):
        command = option(command)
    return command


def security(
    tls: bool, tls_ca: Path | None, tls_cert: Path | None, tls_key: Path | None, tls_server_name: str | None
) -> Security:
    """Read the files that the options name. Raises Failure."""
    key, certificate = read_pair(tls_cert, tls_key)
    ca = None if tls_ca is None else read_certificates("--tls-ca", tls_ca)
    encrypted = tls or ca is not None or certificate is not None or tls_server_name is not None
    return Security(encrypted, ca, key, certificate, tls_server_name)


def read_certificates(option: str, path: Path) -> bytes:
    """Return a file of certificates in PEM. gRPC itself says nothing of one that does not parse. Raises Failure."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
        return path.read_bytes()
    except OSError as error:  # ssl's errors are some, too
        raise Failure(f"{option} {path}: no PEM certificates can be read from it: {error}") from None


def read_pair(certificate: Path | None, key: Path | None) -> tuple[bytes | None, bytes | None]:
    """Return the private key and the certificate of --tls-cert and --tls-key, or two None. Raises Failure."""
    if certificate is None and key is None:
        return None, None
    if certificate is None or key is None:
        raise click.UsageError("--tls-cert and --tls-key go together; only one is given")
    content = read_certificates("--tls-cert", certificate)
    try:
        # With a password, or OpenSSL would ask for that of an encrypted key, which gRPC does not take.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="none")
        return key.read_bytes(), content
    except OSError as error:
        if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
            raise Failure(f"--tls-key {key}: it is not the key of --tls-cert {certificate}") from None
        raise Failure(f"--tls-key {key}: no plain PEM private key can be read from it: {error}") from None


# ---- addresses ----


def check_has_port(address: str) -> None:
    """Raises UsageError for a host without a port, for which gRPC would take 443."""
    if _NOT_BY_NAME.match(address):
        return
    port = re.search(r":(\d+)$", address)
    if not port:
        raise click.UsageError(f"the address {address!r} has no port; write it as host:port, or unix:/path")
    if int(port[1]) > 65535:  # gRPC would take it modulo 65,536
        raise click.UsageError(f"the address {address!r} has a port above 65535")


def unresolved(address: str) -> str | None:
    """Why the host of an address is not found, to be asked after gRPC failed; None if it is, or if that is unknown.

    Not before: behind a proxy, which gRPC may use, names need not be known here.
    """
    if _NOT_BY_NAME.match(address):
        return None
    host, _, port = address.rpartition("/")[2].rpartition(":")
    try:
        socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        return f"the address {address!r} does not resolve: {error}"
    return None
