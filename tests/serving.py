"""What the end-to-end tests share: servers, clients, callbacks that wait, and calls on threads of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import grpc

from grpc_batcher import MukoeBatcher, MukoeBatcherClient, RequestError, create_batcher

METHOD = "/mukoe_batcher.MukoeService/ProcessRequest"

# How long a program that a test runs may take before it is taken for one that hangs. pytest's own limit is longer.
PROGRAM_LIMIT_S = 50


# ---- servers and clients ----


def echo(requests: list[Any]) -> list[tuple[dict[str, bytes], int]]:
    """A callback that answers with the data it got, and the action for a step."""
    return [answer(*request) if isinstance(request, tuple) else answer(request) for request in requests]


def answer(data: bytes, action: int = 0) -> tuple[dict[str, bytes], int]:
    """What `echo` answers."""
    return {"result": data}, action


@contextmanager
def serving(
    batch_process_fn: Callable[[list[Any]], Any] = echo,
    *,
    model: str = "repr",
    batch_size: int = 8,
    batch_timeout_s: float = 0.0,
    port: int = 0,
    host: str = "127.0.0.1",
    **options: Any,
) -> Iterator[MukoeBatcher]:
    """A started batcher, shut down without a grace in the end."""
    batcher = create_batcher(
        model, batch_size, batch_timeout_s, port, batch_process_fn=batch_process_fn, host=host, **options
    )
    batcher.start()
    try:
        yield batcher
    finally:
        batcher.shutdown(grace_s=0)


def address_of(batcher: MukoeBatcher) -> str:
    return f"127.0.0.1:{batcher.port}"


def connect(batcher: MukoeBatcher, **options: Any) -> MukoeBatcherClient:
    """A client of the batcher; close it, or enter it as a context manager."""
    return MukoeBatcherClient(address_of(batcher), **options)


class Held:
    """A callback that holds every batch until the test releases it. Leaving it as a context manager releases all.

    batches: what it was given so far, oldest first.
    """

    def __init__(self, batch_process_fn: Callable[[list[Any]], Any] = echo) -> None:
        self.batches: list[list[Any]] = []
        self._batch_process_fn = batch_process_fn
        self._released = 0.0
        self._changed = threading.Condition()

    def __call__(self, requests: list[Any]) -> Any:
        with self._changed:
            self.batches.append(list(requests))
            number = len(self.batches)
            self._changed.wait_for(lambda: number <= self._released)
        return self._batch_process_fn(requests)

    def release(self, batches: float = 1) -> None:
        """Let go so many more batches, those that are yet to come included."""
        with self._changed:
            self._released += batches
            self._changed.notify_all()

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *_: object) -> None:
        self.release(float("inf"))


# ---- calls on other threads ----


def eventually(holds: Callable[[], object]) -> None:
    """Wait until something holds. pytest's timeout is the limit."""
    while not holds():
        time.sleep(0.002)


def open_files() -> int:
    """How many files and sockets this process has open."""
    return len(os.listdir("/proc/self/fd"))


def resident_bytes() -> int:
    """How much memory this process has in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def in_background(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
    """Make a call on a thread that does not keep a failed test's process from ending."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def in_callback(held: Held, client: MukoeBatcherClient, *args: Any, **kwargs: Any) -> Future[Any]:
    """Send a request, and return once the callback holds it. To be used while the server has nothing else to do."""
    before = len(held.batches)
    request = in_background(client.send_request, *args, **kwargs)
    eventually(lambda: len(held.batches) > before or request.done())
    return request


def waiting(batcher: MukoeBatcher, send: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
    """Make a call that sends a request, and return once it waits. To be used while a callback is held."""
    before = batcher.metrics().waiting
    request = in_background(send, *args, **kwargs)
    eventually(lambda: batcher.metrics().waiting > before or request.done())
    return request


def error_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> RequestError:
    """Make a call that has to end in a RequestError, and return that."""
    try:
        result = function(*args, **kwargs)
    except RequestError as error:
        return error
    raise AssertionError(f"no RequestError was raised, but {result!r:.200} returned")


# ---- plain grpcio, as old peers use it ----


class OldStyleReply(NamedTuple):
    """Everything that came on a stream until its end."""

    messages: list[bytes]
    code: grpc.StatusCode
    details: str


@contextmanager
def old_style_call(address: str, message: bytes, timeout_s: float | None = None) -> Iterator[Any]:
    """A stream with one message, half-closed behind it, on a channel of its own: a grpcio call to read from."""
    with grpc.insecure_channel(address, options=(("grpc.max_receive_message_length", -1),)) as channel:
        yield channel.stream_stream(METHOD)(iter((message,)), timeout=timeout_s)


def old_style_request(address: str, message: bytes, timeout_s: float | None = None) -> OldStyleReply:
    """What an old client does for a request: one stream, one message, half-close, and read to the end."""
    with old_style_call(address, message, timeout_s) as call:
        messages = []
        with suppress(grpc.RpcError):  # the call says which
            messages.extend(call)
        return OldStyleReply(messages, call.code(), call.details() or "")


class _OneMethod(grpc.GenericRpcHandler):  # type: ignore[misc]
    def __init__(self, behaviour: Callable[[Iterator[bytes], grpc.ServicerContext], Iterable[bytes]]) -> None:
        self._handler = grpc.stream_stream_rpc_method_handler(behaviour)

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        return self._handler if details.method == METHOD else None


@contextmanager
def plain_server(behaviour: Callable[[Iterator[bytes], grpc.ServicerContext], Iterable[bytes]]) -> Iterator[str]:
    """A server in plain grpcio whose streams are served by a function from messages to messages; its address."""
    with ThreadPoolExecutor(64) as threads:
        server = grpc.server(threads, handlers=(_OneMethod(behaviour),), options=(("grpc.so_reuseport", 0),))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(None).wait()


# ---- programs ----


class Program(subprocess.Popen[str]):
    """A Python program. Leaving it as a context manager ends it, and the processes it started, if it still runs."""

    def read_line(self) -> str:
        """Wait for a line on its stdout, and return it without its end; nothing if the program is over."""
        assert self.stdout is not None
        return self.stdout.readline().rstrip("\n")

    def type_line(self, line: str) -> None:
        assert self.stdin is not None
        self.stdin.write(f"{line}\n")
        self.stdin.flush()

    def __exit__(self, *error: Any) -> None:
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
        super().__exit__(*error)


def start_program(folder: Path, text: str, *arguments: str, environment: dict[str, str] | None = None) -> Program:
    """Start a Python program in a folder of its own, so that it imports the package from where this process does."""
    script = folder / "program.py"
    script.write_text(textwrap.dedent(text))
    return Program(
        [sys.executable, str(script), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONFAULTHANDLER": "1", **(environment or {})},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish_program(program: Program, typed: str | None = None) -> tuple[int, str, str]:
    """Wait for a program's end; return its status and what it wrote to stdout and stderr."""
    try:
        output, errors = program.communicate(typed, timeout=PROGRAM_LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(program.pid, signal.SIGABRT)  # on which Python writes the stack of every thread
        output, errors = program.communicate()
        raise AssertionError(f"the program hangs; so far it wrote {output!r} and on stderr:\n{errors}") from None
    return program.returncode, output, errors


def run_program(folder: Path, text: str, *arguments: str, environment: dict[str, str] | None = None) -> list[str]:
    """Run a Python program that has to end with status 0; return the lines it wrote to stdout."""
    with start_program(folder, text, *arguments, environment=environment) as program:
        status, output, errors = finish_program(program)
    assert status == 0, f"status {status}; it wrote {output!r} and on stderr:\n{errors}"
    return output.splitlines()
