"""What the end-to-end tests share: servers, clients, callbacks that wait, background calls, programs."""

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

from grpc_batcher import MukoeBatcher, MukoeBatcherClient, RequestError, create_batcher

import grpc

METHOD = "/mukoe_batcher.MukoeService/ProcessRequest"

# A program that runs longer than this counts as hanging. Shorter than pytest's own limit.
PROGRAM_LIMIT_S = 100


# ---- servers and clients ----


def echo(requests: list[Any]) -> list[tuple[dict[str, bytes], int]]:
    """A callback that returns the data it gets, with the action as the step."""
    return [answer(*request) if isinstance(request, tuple) else answer(request) for request in requests]


def answer(data: bytes, action: int = 0) -> tuple[dict[str, bytes], int]:
    """The answer of `echo`."""
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
    """A started batcher, which is shut down without a grace period afterwards."""
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
    """Return a client of the batcher. Close it, or use it as a context manager."""
    return MukoeBatcherClient(address_of(batcher), **options)


class Held:
    """A callback that holds every batch until the test releases it. Leaving the context manager releases all.

    batches: the batches it has been given, oldest first.
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
        """Release this many more batches, including ones still to come."""
        with self._changed:
            self._released += batches
            self._changed.notify_all()

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *_: object) -> None:
        self.release(float("inf"))


# ---- calls in the background ----


def eventually(holds: Callable[[], object]) -> None:
    """Wait until a condition holds. pytest's timeout is the limit."""
    while not holds():
        time.sleep(0.002)


def open_files() -> int:
    """Return how many files and sockets this process has open."""
    return len(os.listdir("/proc/self/fd"))


def resident_bytes() -> int:
    """Return how much memory this process uses."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def in_background(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
    """Make a call on a daemon thread, so that a failed test's process can still end."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def in_callback(held: Held, client: MukoeBatcherClient, *args: Any, **kwargs: Any) -> Future[Any]:
    """Send a request, and return once the callback holds it. Use it only while the server is otherwise idle."""
    before = len(held.batches)
    request = in_background(client.send_request, *args, **kwargs)
    eventually(lambda: len(held.batches) > before or request.done())
    return request


def waiting(batcher: MukoeBatcher, send: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
    """Make a call that sends a request, and return once it is waiting. Use it only while a callback is held."""
    before = batcher.metrics().waiting
    request = in_background(send, *args, **kwargs)
    eventually(lambda: batcher.metrics().waiting > before or request.done())
    return request


def error_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> RequestError:
    """Make a call that must raise a RequestError, and return the error."""
    try:
        result = function(*args, **kwargs)
    except RequestError as error:
        return error
    raise AssertionError(f"no RequestError was raised, but {result!r:.200} returned")


# ---- plain grpcio, as peers with the C++ wheel use it ----


class OldStyleReply(NamedTuple):
    """Everything received on a stream until its end."""

    messages: list[bytes]
    code: grpc.StatusCode
    details: str


@contextmanager
def old_style_call(address: str, message: bytes, timeout_s: float | None = None) -> Iterator[Any]:
    """A half-closed stream with one message, on its own channel: a grpcio call to read from."""
    with grpc.insecure_channel(address, options=(("grpc.max_receive_message_length", -1),)) as channel:
        yield channel.stream_stream(METHOD)(iter((message,)), timeout=timeout_s)


def old_style_request(address: str, message: bytes, timeout_s: float | None = None) -> OldStyleReply:
    """Make a request as old clients do: one stream, one message, half-close, read to the end."""
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
    """Serve streams in plain grpcio, with a function from messages to messages. Yields the address."""
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
    """A Python program. Leaving the context manager kills it and its children if it still runs."""

    def read_line(self) -> str:
        """Wait for a line on stdout and return it without its newline; "" if the program has ended."""
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
    """Start a Python program in a folder, where it imports the same package as this process."""
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
    """Wait until a program ends; return its status, stdout and stderr."""
    try:
        output, errors = program.communicate(typed, timeout=PROGRAM_LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(program.pid, signal.SIGABRT)  # makes Python write the stack of every thread
        output, errors = program.communicate()
        raise AssertionError(f"the program hangs; its stdout is {output!r}, and its stderr:\n{errors}") from None
    return program.returncode, output, errors


def run_program(folder: Path, text: str, *arguments: str, environment: dict[str, str] | None = None) -> list[str]:
    """Run a Python program that must exit with status 0; return the lines of its stdout."""
    with start_program(folder, text, *arguments, environment=environment) as program:
        status, output, errors = finish_program(program)
    assert status == 0, f"status {status}; its stdout is {output!r}, and its stderr:\n{errors}"
    return output.splitlines()
