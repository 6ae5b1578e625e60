"""Where a server listens: whether the address is available, and if not, why."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import grpc

from .._contract import is_unix_socket
from .._errors import BindError
from .threads import DaemonThreadPool


def address_of(host: str, port: int) -> str:
    """The address as gRPC writes it: "0.0.0.0:50051", "[::1]:50051", "unix:/run/batcher.sock"."""
    if is_unix_socket(host):
        return host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def listen(server: grpc.Server, host: str, port: int, credentials: grpc.ServerCredentials | None) -> int:
    """Have a server listen, and return its port; for a unix socket the one given.

    Raises BindError if the address is not available, and ValueError if gRPC cannot use the credentials.
    """
    address = address_of(host, port)
    check_available(host, port)
    found = _add_port(server, address, credentials)
    if found == 0:
        if credentials is not None and not _can_be_used(credentials):
            raise ValueError(
                f"credentials is {credentials!r}, in which gRPC cannot use the certificate, the key or the root "
                "certificates (it said which on stderr); they must be PEM, and the key must match the certificate"
            )
        check_available(host, port)  # another process may have taken it since
        raise BindError(f"cannot listen on {address}; gRPC said why on stderr")
    return port if is_unix_socket(host) else found


def is_local(host: str) -> bool:
    """Whether only processes of this machine can reach it."""
    return is_unix_socket(host) or host.startswith("127.") or host in ("localhost", "::1")


def check_available(host: str, port: int) -> None:
    """Raise BindError if the system will not let a server listen there.

    gRPC itself would take a unix socket's path away from another server, and would be content with one of the addresses
    of a name.
    """
    address = address_of(host, port)
    if host.startswith("unix:"):
        folder = Path(host.removeprefix("unix:").removeprefix("//")).parent
        if not os.access(folder, os.W_OK):
            number = errno.EACCES if folder.is_dir() else errno.ENOENT
            raise BindError(
                f"cannot listen on {address}: the folder {folder} does not exist or is not writable", number
            )
    if is_unix_socket(host):
        if _is_served(host):
            raise BindError(f"cannot listen on {address}: another server is listening there", errno.EADDRINUSE)
        return
    errors = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:  # the numbers of name resolution's errors are not errno's
        raise BindError(f"cannot listen on {address}: {error}") from None
    for family, kind, _, _, socket_address in found:
        try:
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC does
                probe.bind(socket_address)
        except OSError as error:
            errors.append(error)  # EAFNOSUPPORT, for instance, on a machine without IPv6
            if error.errno == errno.EADDRINUSE:
                break
    if errors and (errors[-1].errno == errno.EADDRINUSE or len(errors) == len(found)):
        raise BindError(f"cannot listen on {address}: {errors[-1].strerror}", errors[-1].errno)


def _is_served(host: str) -> bool:
    """Whether a server listens on a unix socket. gRPC would silently take the path away from it."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            if host.startswith("unix-abstract:"):
                probe.connect("\0" + host.removeprefix("unix-abstract:"))
            else:
                probe.connect(host.removeprefix("unix:"))
        except BlockingIOError:  # it has more callers than it can take
            return True
        except OSError:  # nobody, or a killed process left the socket behind, which gRPC replaces
            return False
        return True


def _add_port(server: grpc.Server, address: str, credentials: grpc.ServerCredentials | None) -> int:
    """Return the port, or 0 if gRPC cannot listen there, as grpcio did before 1.60."""
    try:
        if credentials is None:
            return int(server.add_insecure_port(address))
        return int(server.add_secure_port(address, credentials))
    except RuntimeError:
        return 0


def _can_be_used(credentials: grpc.ServerCredentials) -> bool:
    """Whether gRPC accepts them for an address that is surely available."""
    return _add_port(grpc.server(DaemonThreadPool("grpc_batcher-probe")), "127.0.0.1:0", credentials) != 0
