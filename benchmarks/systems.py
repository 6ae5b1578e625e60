"""What is compared: which server, and how it is asked."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpc_batcher._proto.mukoe_batcher_pb2 import KeyValue, ModelResponse, MukoeResponse

import cpp_echo
from answers import FILLER, KEY, TAG_BYTES
from call import call
from processes import UNTUNED, Child, run_program
from servers import batcher as batcher_server
from servers import grpcio_echo as grpcio_server
from servers import inference as inference_server

BATCH_SIZE = 16
BATCH_TIMEOUT_S = 0.005


class Unavailable(Exception):
    """The reason why a system cannot run here."""


@dataclass(frozen=True)
class System:
    """A server and its callers.

    title: its name in the table; README.md says more.
    server: returns the function and the arguments of the server's process. Raises Unavailable.
    caller: one of the kinds that callers.connect knows.
    transport: this library's transport, for its own servers and for its client; None for systems without either, whose
        processes must not be tuned by this library.
    environment: more variables of this library, for both ends.
    own_callers: whether this library's client asks its own server; otherwise its callers are not tuned.
    """

    title: str
    server: Callable[[], tuple[Any, ...]]
    caller: str
    transport: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    own_callers: bool = True

    def spawn_server(self) -> Child:
        """Start a server, without waiting until it is ready. Raises Unavailable."""
        return Child(f"the server of {self.title!r}", *self.server(), environment=self._environment())

    def spawn_callers(self, server: Child) -> Child:
        """Start a process of callers, without waiting until it is ready."""
        address = f"127.0.0.1:{server.ready['port']}"
        environment = self._environment() if self.own_callers else UNTUNED
        return Child(f"callers of {self.title!r}", call, self.caller, address, environment=environment)

    def _environment(self) -> Mapping[str, str]:
        if self.transport is None:
            return UNTUNED
        return {"GRPC_BATCHER_TRANSPORT": self.transport, **self.environment}

    def check_ready(self, child: Child) -> None:
        """Wait until a process is ready. Raises Unavailable if it does not use the intended transport."""
        transport = child.ready.get("transport")
        if transport is not None and transport != self.transport:
            raise Unavailable(
                f"with this grpcio, the {transport} transport takes the place of the {self.transport} one"
            )


def batcher(
    transport: str,
    callback: str = "answer",
    caller: str = "batcher",
    *,
    batch_size: int = BATCH_SIZE,
    leave_early: bool = True,
) -> System:
    return System(
        f"{transport} transport",
        lambda: (batcher_server.run, batch_size, BATCH_TIMEOUT_S, callback, leave_early),
        caller,
        transport,
    )


def grpcio_echo(title: str, caller: str, threads: int) -> System:
    return System(title, lambda: (grpcio_server.run, threads), caller)


def _cpp_echo() -> tuple[Any, ...]:
    # The only value comes last in the message, and its tag last in the value.
    answer = ModelResponse(dictionary=[KeyValue(key=KEY, values=FILLER + bytes(TAG_BYTES))])
    reply = MukoeResponse(result=answer).SerializeToString()
    assert reply.endswith(bytes(TAG_BYTES))
    try:
        return run_program, str(cpp_echo.build()), reply.hex()
    except cpp_echo.NotBuilt as error:
        raise Unavailable(str(error)) from None


def _mosec() -> tuple[Any, ...]:
    if importlib.util.find_spec("mosec") is None:
        raise Unavailable("mosec is not installed (pip install mosec)")
    script = Path(__file__).parent / "servers" / "mosec_server.py"
    return run_program, sys.executable, str(script), str(BATCH_SIZE), str(BATCH_TIMEOUT_S)


def inference(name: str, payload_bytes: int, caller: str) -> System:
    """A server of the Open Inference Protocol, INFERENCE or PYTRITON, that Triton's client asks."""
    run, title, transport = {
        INFERENCE: (inference_server.run, "this library", DIRECT),
        PYTRITON: (inference_server.run_pytriton, "PyTriton", None),
    }[name]

    def server() -> tuple[Any, ...]:
        if importlib.util.find_spec("tritonclient") is None:
            raise Unavailable("Triton's client is not installed (pip install 'tritonclient[grpc]')")
        if name == PYTRITON and importlib.util.find_spec("pytriton") is None:
            raise Unavailable(
                "PyTriton is not installed (pip install nvidia-pytriton; it needs numpy 1, so at most Python 3.12)"
            )
        return run, BATCH_SIZE, BATCH_TIMEOUT_S, payload_bytes

    return System(title, server, caller, transport, own_callers=False)


DIRECT = "direct"
PUBLIC = "public"
STREAMS = "grpcio-streams"
CALLS = "grpcio-calls"
CPP = "cpp"
MOSEC = "mosec"
MOSEC_SOCKET = "mosec-socket"
INFERENCE = "inference"
PYTRITON = "pytriton"

SYSTEMS = {
    DIRECT: batcher("direct"),
    PUBLIC: batcher("public"),
    STREAMS: grpcio_echo("plain grpcio, persistent streams", "grpcio-streams", 32),
    CALLS: grpcio_echo("plain grpcio, a call per request", "grpcio-calls", 32),
    CPP: System("C++ echo", _cpp_echo, "batcher", "direct"),
    MOSEC: System("mosec", _mosec, "http"),
    MOSEC_SOCKET: System("mosec, bare socket", _mosec, "http-by-hand"),
}
