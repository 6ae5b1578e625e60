"""The choice between the gears, the direct gear's private names, and that neither leaves anything behind."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from serving import METHOD, address_of, connect, echo, error_of, eventually, old_style_request, run_program, serving

from grpc_batcher import MukoeBatcherClient, RequestError, _gears
from grpc_batcher._models import MODELS

REQUEST_PROGRAM = """
    import logging
    logging.basicConfig(level=logging.DEBUG, format="LOG %(levelname)s %(message)s", stream=__import__("sys").stdout)
    {break_grpcio}
    from grpc_batcher import MukoeBatcherClient, create_batcher

    def echo(requests):
        return [({{"result": data}}, 0) for data in requests]

    with create_batcher("repr", 4, 0.0, 0, batch_process_fn=echo, host="127.0.0.1") as batcher:
        with MukoeBatcherClient(f"127.0.0.1:{{batcher.port}}") as client:
            for _ in range(3):
                try:
                    answer = client.send_request(b"hi")
                except Exception as error:  # at most the stream that found the name missing
                    answer = client.send_request(b"hi")
                assert answer == ({{"result": b"hi"}}, 0), answer
            print("GEARS", batcher.gear, client.gear)
"""


def request_program(folder: Path, break_grpcio: str = "", gear: str = "") -> tuple[str, list[str]]:
    """Serve and send a few requests in a program; returns the gears in the end, and what was logged."""
    lines = run_program(
        folder, REQUEST_PROGRAM.format(break_grpcio=break_grpcio), environment={"GRPC_BATCHER_GEAR": gear}
    )
    gears = [line for line in lines if line.startswith("GEARS")]
    return gears[0].removeprefix("GEARS "), [line for line in lines if line.startswith("LOG")]


@pytest.mark.parametrize(
    ("wanted", "server", "client"),
    [
        ("", "direct", "direct"),
        ("direct", "direct", "direct"),
        ("public", "public", "public"),
        ("public/direct", "public", "direct"),
        ("direct/public", "direct", "public"),
    ],
)
def test_the_environment_chooses_the_gear_and_a_debug_line_says_so(
    tmp_path: Path, wanted: str, server: str, client: str
) -> None:
    gears, log = request_program(tmp_path, gear=wanted)
    assert gears == f"{server} {client}"
    assert [line for line in log if f"with the {server} gear" in line]
    assert not [line for line in log if "WARNING" in line]


def test_an_unknown_gear_is_an_error_on_import(tmp_path: Path) -> None:
    program = """
        try:
            import grpc_batcher
        except ImportError as error:
            print(error)
    """
    assert run_program(tmp_path, program, environment={"GRPC_BATCHER_GEAR": "fast"}) == [
        "GRPC_BATCHER_GEAR is 'fast' in the environment; it must be 'direct' or 'public'"
    ]


# The names that _direct.py says it leans on. grpcio needs them itself: a program hides them while this library is
# imported, and puts them back.
HIDDEN = """
    import sys, types
    import grpc, grpc._channel, grpc._server
    from grpc._cython import cygrpc
    module, name = {module}, {name!r}
    hidden = types.ModuleType(module.__name__)
    hidden.__dict__.update({{each: value for each, value in vars(module).items() if each != name}})
    package = sys.modules[module.__name__.rpartition(".")[0]]
    short_name = module.__name__.rpartition(".")[2]
    sys.modules[module.__name__] = hidden
    setattr(package, short_name, hidden)
    import grpc_batcher
    sys.modules[module.__name__] = module
    setattr(package, short_name, module)
"""
MISSING_NAMES = [
    ("cygrpc", "Channel"),
    ("cygrpc", "SegregatedCall"),
    ("cygrpc", "SendInitialMetadataOperation"),
    ("cygrpc", "ReceiveInitialMetadataOperation"),
    ("cygrpc", "SendMessageOperation"),
    ("cygrpc", "ReceiveMessageOperation"),
    ("cygrpc", "ReceiveStatusOnClientOperation"),
    ("grpc._server", "_Context"),
    ("grpc._server", "_RPCState"),
    ("grpc._server", "_get_initial_metadata_operation"),
    ("grpc._server", "_is_rpc_state_active"),
    ("grpc._server", "_possibly_finish_call"),
]


@pytest.mark.parametrize(("module", "name"), MISSING_NAMES)
def test_where_a_private_name_is_missing_the_public_gear_serves_and_one_warning_says_so(
    tmp_path: Path, module: str, name: str
) -> None:
    gears, log = request_program(tmp_path, break_grpcio=HIDDEN.format(module=module, name=name))
    assert gears == "public public"
    warnings = [line for line in log if "WARNING" in line]
    assert len(warnings) == 1
    assert "the public gear serves" in warnings[0]
    assert name in warnings[0]


def test_where_opening_a_stream_behaves_otherwise_the_client_goes_on_in_the_public_gear(tmp_path: Path) -> None:
    other_parameters = """
    from grpc._cython import cygrpc
    whole = cygrpc.Channel
    class Changed:
        def __init__(self, *arguments): self._whole = whole(*arguments)
        def segregated_call(self, only): raise AssertionError
        def __getattr__(self, name): return getattr(self._whole, name)
    cygrpc.Channel = Changed
    """
    gears, log = request_program(tmp_path, break_grpcio=other_parameters)
    assert gears == "public public"
    assert len([line for line in log if "WARNING" in line]) == 1


def test_where_a_call_on_the_server_behaves_otherwise_the_next_stream_gets_the_public_gear(tmp_path: Path) -> None:
    """The callers of the streams until then get UNAVAILABLE, as of a server that restarts."""
    no_batches = """
    import grpc._server
    whole = grpc._server._Context.__init__
    def renamed(self, rpc_event, state, deserializer):
        whole(self, rpc_event, state, deserializer)
        if rpc_event is not None:
            self._event_of_rpc = self.__dict__.pop("_rpc_event")
    grpc._server._Context.__init__ = renamed
    grpc._server._Context.time_remaining = lambda self: None
    """
    gears, log = request_program(tmp_path, break_grpcio=no_batches)
    assert gears == "public public"
    assert len([line for line in log if "WARNING" in line]) == 1


class WrappingInterceptor(grpc.ServerInterceptor):  # type: ignore[misc]
    """Puts a function of its own between grpcio and the handler, as interceptors that log or trace do."""

    def __init__(self) -> None:
        self.streams = 0
        self.messages = 0

    def look(self, message: bytes) -> bytes:
        self.messages += 1
        return message

    def intercept_service(self, continuation: Callable[..., Any], details: grpc.HandlerCallDetails) -> Any:
        handler = continuation(details)

        def wrapped(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            self.streams += 1
            context.send_initial_metadata((("wrapped", "yes"),))
            yield from map(self.look, handler.stream_stream(map(self.look, messages), context))

        return grpc.stream_stream_rpc_method_handler(wrapped)


def test_a_handler_that_an_interceptor_wrapped_answers_and_ends_as_ever() -> None:
    interceptor = WrappingInterceptor()
    with serving(interceptors=(interceptor,)) as batcher, connect(batcher) as client:
        assert [client.send_request(b"a"), client.send_request(b"b")] == [({"result": b"a"}, 0), ({"result": b"b"}, 0)]
        reply = old_style_request(address_of(batcher), MODELS["repr"].write_request({"data": b"old"}))
        assert reply.code is grpc.StatusCode.OK
        assert len(reply.messages) == 1
        assert old_style_request(address_of(batcher), b"\xff").code is grpc.StatusCode.INVALID_ARGUMENT
        assert interceptor.streams == 3
        assert interceptor.messages == 2 * 2 + 2 + 1  # requests and replies, also those of the direct gear's callers


def test_metadata_and_interceptors_of_the_client_reach_the_server() -> None:
    class Token(grpc.StreamStreamClientInterceptor):  # type: ignore[misc]
        def intercept_stream_stream(self, continuation: Callable[..., Any], details: Any, messages: Any) -> Any:
            return continuation(details, messages)

    seen: list[dict[str, Any]] = []

    class Look(grpc.ServerInterceptor):  # type: ignore[misc]
        def intercept_service(self, continuation: Callable[..., Any], details: grpc.HandlerCallDetails) -> Any:
            seen.append(dict(details.invocation_metadata))
            return continuation(details)

    with serving(interceptors=(Look(),)) as batcher:
        with MukoeBatcherClient(address_of(batcher), metadata=(("token", "t1"),)) as client:
            assert client.gear == _gears.client_gear()
            client.send_request(b"x")
        with MukoeBatcherClient(address_of(batcher), metadata=(("token", "t2"),), interceptors=(Token(),)) as client:
            assert client.gear == "public"
            assert client.send_request(b"x") == ({"result": b"x"}, 0)
    assert [metadata["token"] for metadata in seen] == ["t1", "t2"]


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.timeout(180)
def test_a_thousand_rounds_of_open_use_and_close_leave_nothing_behind() -> None:
    """Streams that end well, by the caller's cancel, by an error and by a time limit, and whole clients."""
    message = MODELS["repr"].write_request({"data": b"x"})

    def round_of_streams(channel: grpc.Channel) -> None:
        with connect(batcher) as client:
            for each in range(3):
                client.send_request(b"%d" % each)
            with suppress(RequestError):  # it may be in time
                client.send_request(b"late", timeout_s=1e-4)
            assert error_of(client.send_request, b"not for repr", 1).code() is grpc.StatusCode.INVALID_ARGUMENT
        # On one channel: grpcio 1.49 now and then leaves the socket of a channel open.
        cancelled = channel.stream_stream(METHOD)(iter((message, message)))
        next(cancelled)
        cancelled.cancel()

    with serving(echo) as batcher, grpc.insecure_channel(address_of(batcher)) as channel:
        for _ in range(100):
            round_of_streams(channel)
        eventually(lambda: batcher.metrics().open_streams == 0)
        gc.collect()
        threads, files, objects = threading.active_count(), open_files(), len(gc.get_objects())
        for _ in range(1000):
            round_of_streams(channel)
        eventually(lambda: batcher.metrics().open_streams == 0)
        # Idle threads end, and gRPC closes connections, a little later; grpcio 1.49 only when it next has to wait.
        eventually(lambda: threading.active_count() <= threads)
        assert open_files() - files < 100  # a leak of one a round would be 1,000
        gc.collect()
        assert len(gc.get_objects()) - objects < 500  # a leak of one object a round would be 1,000


def test_servers_that_start_serve_and_stop_leave_nothing_behind() -> None:
    def round_of_server() -> None:
        with serving(echo) as batcher, connect(batcher) as client:
            client.send_request(b"x")

    for _ in range(5):
        round_of_server()
    gc.collect()
    threads, files = threading.active_count(), open_files()
    for _ in range(50):
        round_of_server()
    eventually(lambda: threading.active_count() <= threads)
    gc.collect()
    assert open_files() - files < 25
