"""Where a server listens: whether it can be had, and why not."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import grpc

from .._errors import BindError
from .._server.threads import DaemonThreadPool


def address_of(host: str, port: int) -> str:
    """The address as gRPC writes it: "0.0.0.0:50051", "[::1]:50051", "unix:/run/batcher.sock"."""
    if is_unix(host):
        return host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def listen(server: grpc.Server, host: str, port: int, credentials: grpc.ServerCredentials | None) -> int:
    """Have a server listen, and return its port; for a unix socket what was given.

    Raises BindError if the address can not be had, and ValueError if gRPC can not use the credentials.
    """
    address = address_of(host, port)
    if why := _why_not(host, port):
        raise BindError(f"can not listen on {address}: {why}")
    found = _add_port(server, address, credentials)
    if found == 0:
        if credentials is not None and not _can_be_used(credentials):
            raise ValueError(
                f"credentials is {credentials!r}, of which gRPC can not use the certificate, the key or the "
                "root certificates (it said which on stderr); they must be PEM, and the key that of the certificate"
            )
        raise BindError(f"can not listen on {address}; gRPC said why on stderr")
    return port if is_unix(host) else found


def is_unix(host: str) -> bool:
    """Whether it is a unix socket's path, which has no port."""
    return host.startswith(("unix:", "unix-abstract:"))


def is_local(host: str) -> bool:
    """Whether only this machine's processes can reach it."""
    return is_unix(host) or host.startswith("127.") or host in ("localhost", "::1")


def _why_not(host: str, port: int) -> str | None:
    """Why the system will not let a server listen there; None if it will.

    gRPC would take a unix socket's path from another server, and be content with one of the addresses of a name.
    """
    if host.startswith("unix:"):
        folder = Path(host.removeprefix("unix:").removeprefix("//")).parent
        if not os.access(folder, os.W_OK):
            return f"there is no folder {folder} to write to"
    if is_unix(host):
        return "another server does" if _is_served(host) else None
    whys = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, _, _, address in found:
            try:
                with socket.socket(family, kind) as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC does
                    probe.bind(address)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    return error.strerror
                whys.append(error.strerror)  # such as of a family that this machine does not have
    except (OSError, UnicodeError) as error:
        return str(error)
    return whys[0] if len(whys) == len(found) else None


def _is_served(host: str) -> bool:
    """Whether a server listens on a unix socket. gRPC would take the path away from it without a word."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(host.removeprefix("unix:"))
        except BlockingIOError:  # it has more callers than it can take
            return True
        except OSError:  # nobody; or a process that was killed left the socket behind, which gRPC replaces
            return False
        return True


def _add_port(server: grpc.Server, address: str, credentials: grpc.ServerCredentials | None) -> int:
    """Return the port, or 0 if it can not be had, as grpcio did before 1.60."""
    try:
        if credentials is None:
            return int(server.add_insecure_port(address))
        return int(server.add_secure_port(address, credentials))
    except RuntimeError:
        return 0


def _can_be_used(credentials: grpc.ServerCredentials) -> bool:
    """Whether gRPC takes them for an address that can surely be had."""
    return _add_port(grpc.server(DaemonThreadPool("grpc_batcher-probe")), "127.0.0.1:0", credentials) != 0
