"""Which transport is chosen, the private names that the direct one uses, and that neither leaves anything behind."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial, wraps
from pathlib import Path
from typing import Any

from grpc_batcher import MukoeBatcherClient, RequestError
from grpc_batcher._models import MODELS
from grpc_batcher._server.session import Session
from grpc_batcher._transport import choice, direct_server, grpcio_private

import grpc
import pytest
from serving import (
    METHOD,
    Held,
    address_of,
    connect,
    echo,
    error_of,
    eventually,
    in_background,
    old_style_request,
    open_files,
    run_program,
    serving,
    start_program,
)

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
                except Exception:  # at most the first stream that needs a missing name
                    answer = client.send_request(b"hi")
                assert answer == ({{"result": b"hi"}}, 0), answer
            print("TRANSPORTS", batcher.transport, client.transport)
"""


def request_program(folder: Path, break_grpcio: str = "", transport: str = "") -> tuple[str, list[str]]:
    """Serve and send a few requests in a program. Returns the final transports, and the lines of the log."""
    lines = run_program(
        folder, REQUEST_PROGRAM.format(break_grpcio=break_grpcio), environment={"GRPC_BATCHER_TRANSPORT": transport}
    )
    transports = [line for line in lines if line.startswith("TRANSPORTS")]
    return transports[0].removeprefix("TRANSPORTS "), [line for line in lines if line.startswith("LOG")]


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
def test_the_environment_chooses_the_transport_and_a_debug_line_says_so(
    tmp_path: Path, wanted: str, server: str, client: str
) -> None:
    transports, log = request_program(tmp_path, transport=wanted)
    assert transports == f"{server} {client}"
    assert len([line for line in log if "serving" in line and f"with the {server} transport" in line]) == 1
    assert len([line for line in log if "connecting" in line and f"with the {client} transport" in line]) == 1
    assert not [line for line in log if "WARNING" in line]


def test_a_grpcio_newer_than_any_tested_uses_the_direct_transport_and_a_debug_line_says_so(tmp_path: Path) -> None:
    newer = """
    import grpc
    grpc.__version__ = "9.1.0"
    """
    transports, log = request_program(tmp_path, break_grpcio=newer)
    assert transports == "direct direct"
    (line,) = [line for line in log if "newer than any" in line]
    assert line.startswith("LOG DEBUG grpcio 9.1.0 is newer than any that was tested")
    assert not [line for line in log if "WARNING" in line]


def test_an_unknown_transport_is_an_error_on_import(tmp_path: Path) -> None:
    program = """
        try:
            import grpc_batcher
        except ImportError as error:
            print(error)
    """
    assert run_program(tmp_path, program, environment={"GRPC_BATCHER_TRANSPORT": "fast"}) == [
        "GRPC_BATCHER_TRANSPORT is 'fast' in the environment; it must be 'direct', 'public', or one for each end such "
        "as 'public/direct'"
    ]


# Hides one of the names that grpcio_private.py lists, only while this library is imported: grpcio itself needs them.
HIDDEN = """
    import sys, types
    import grpc, grpc._channel, grpc._server
    from grpc._cython import cygrpc
    module = {module}
    name, _, attribute = {name!r}.partition(".")
    hidden = types.ModuleType(module.__name__)
    hidden.__dict__.update({{each: value for each, value in vars(module).items() if each != name}})
    whole = getattr(module, name)
    if attribute and module is cygrpc:  # attributes of the class are used
        rest = {{each: getattr(whole, each) for each in dir(whole) if each != attribute and each[:2] != "__"}}
        setattr(hidden, name, type(name, (), rest))
    elif attribute:  # attributes of its instances are used
        class Lacking(whole):
            def __getattribute__(self, name):
                if name == attribute:
                    raise AttributeError(f"there is no {{name}}")
                return super().__getattribute__(name)
        setattr(hidden, name, Lacking)
    package = sys.modules[module.__name__.rpartition(".")[0]]
    short_name = module.__name__.rpartition(".")[2]
    sys.modules[module.__name__] = hidden
    setattr(package, short_name, hidden)
    import grpc_batcher
    sys.modules[module.__name__] = module
    setattr(package, short_name, module)
"""
MISSING_ON_THE_SERVER = [
    ("cygrpc", "Call.start_server_batch"),
    ("grpc._server", "_Context"),
    ("grpc._server", "_Context._rpc_event"),
    ("grpc._server", "_Context._state"),
    ("grpc._server", "_RPCState"),
    ("grpc._server", "_RPCState.condition"),
    ("grpc._server", "_RPCState.due"),
    ("grpc._server", "_RPCState.initial_metadata_allowed"),
    ("grpc._server", "_get_initial_metadata_operation"),
    ("grpc._server", "_is_rpc_state_active"),
    ("grpc._server", "_possibly_finish_call"),
    ("grpc._server", "_stream_response_in_pool"),
]
MISSING_IN_THE_CLIENT = [
    ("cygrpc", "BatchOperationEvent.tag"),
    ("cygrpc", "Channel"),
    ("cygrpc", "Channel.segregated_call"),
    ("cygrpc", "IntegratedCall"),
    ("cygrpc", "IntegratedCall.cancel"),
    ("cygrpc", "IntegratedCall.operate"),
    ("cygrpc", "PropagationConstants"),
    ("cygrpc", "PropagationConstants.GRPC_PROPAGATE_DEFAULTS"),
    ("cygrpc", "SegregatedCall"),
    ("cygrpc", "SegregatedCall.cancel"),
    ("cygrpc", "SegregatedCall.next_event"),
    ("cygrpc", "SegregatedCall.operate"),
    ("cygrpc", "SendInitialMetadataOperation"),
    ("cygrpc", "ReceiveInitialMetadataOperation"),
    ("cygrpc", "ReceiveStatusOnClientOperation"),
    ("cygrpc", "ReceiveStatusOnClientOperation.code"),
    ("cygrpc", "ReceiveStatusOnClientOperation.details"),
    ("cygrpc", "ReceiveStatusOnClientOperation.trailing_metadata"),
    ("cygrpc", "StatusCode"),
    ("cygrpc", "StatusCode.cancelled"),
    ("grpc._channel", "Channel"),
    ("grpc._channel", "_channel_managed_call_management"),
]
MISSING_ON_BOTH = [
    ("cygrpc", "SendMessageOperation"),
    ("cygrpc", "ReceiveMessageOperation"),
    ("cygrpc", "ReceiveMessageOperation.message"),
    ("cygrpc", "BatchOperationEvent"),
    ("cygrpc", "BatchOperationEvent.batch_operations"),
]


@pytest.mark.parametrize(
    ("module", "name", "expected"),
    [
        *((*missing, "public direct") for missing in MISSING_ON_THE_SERVER),
        *((*missing, "direct public") for missing in MISSING_IN_THE_CLIENT),
        *((*missing, "public public") for missing in MISSING_ON_BOTH),
    ],
)
def test_an_end_whose_private_name_is_missing_uses_the_public_transport_and_warns_once(
    tmp_path: Path, module: str, name: str, expected: str
) -> None:
    transports, log = request_program(tmp_path, break_grpcio=HIDDEN.format(module=module, name=name))
    assert transports == expected
    warnings = [line for line in log if "WARNING" in line]
    assert len(warnings) == expected.count("public")
    for warning in warnings:
        assert "use the public transport" in warning
        assert name.rpartition(".")[2] in warning


def test_without_non_blocking_handlers_the_server_uses_the_public_transport(tmp_path: Path) -> None:
    other_code = """
    import grpc._server
    whole = grpc._server._stream_response_in_pool
    grpc._server._stream_response_in_pool = lambda *arguments: None
    import grpc_batcher
    grpc._server._stream_response_in_pool = whole
    """
    transports, log = request_program(tmp_path, break_grpcio=other_code)
    assert transports == "public direct"
    (warning,) = [line for line in log if "WARNING" in line]
    assert "experimental_non_blocking" in warning


def test_if_grpcios_classes_take_other_arguments_the_server_uses_the_public_transport(tmp_path: Path) -> None:
    other_parameters = """
    import grpc._server
    whole = grpc._server._Context
    class Changed:
        def __init__(self, *, event): raise AssertionError
    grpc._server._Context = Changed
    import grpc_batcher
    grpc._server._Context = whole
    """
    transports, log = request_program(tmp_path, break_grpcio=other_parameters)
    assert transports == "public direct"
    assert len([line for line in log if "WARNING" in line]) == 1


@pytest.mark.parametrize(
    ("expected", "other_code"),
    [
        # Outstanding operations are tracked differently,
        (
            "public direct",
            """
    import grpc._server
    whole = grpc._server._possibly_finish_call
    grpc._server._possibly_finish_call = lambda state, token: (None, ())
    import grpc_batcher
    grpc._server._possibly_finish_call = whole
        """,
        ),
        # or with another argument, which only shows on the polling thread.
        (
            "public direct",
            """
    from grpc_batcher._transport import grpcio_private
    def changed(state, token, *, why): raise AssertionError
    grpcio_private._possibly_finish_call = changed
        """,
        ),
        # The client's operations take other parameters.
        (
            "direct public",
            """
    from grpc_batcher._transport import direct_client
    direct_client.send_and_receive = lambda: None
        """,
        ),
        # The inner channel of a channel has another name.
        (
            "direct public",
            """
    import inspect, textwrap
    import grpc._channel
    text = textwrap.dedent(inspect.getsource(grpc._channel.Channel)).replace("self._channel", "self._renamed")
    exec(text, vars(grpc._channel))
        """,
        ),
    ],
    ids=["tracking", "polling thread", "operation", "channel"],
)
def test_if_grpcio_behaves_differently_that_end_changes_to_the_public_transport(
    tmp_path: Path, expected: str, other_code: str
) -> None:
    transports, log = request_program(tmp_path, break_grpcio=other_code)
    assert transports == expected
    assert len([line for line in log if "use the public transport" in line]) == 1


def test_if_calls_take_other_arguments_the_client_uses_the_public_transport(tmp_path: Path) -> None:
    other_parameters = """
    from grpc._cython import cygrpc
    whole = cygrpc.Channel
    class Changed:
        def __init__(self, *arguments): self._whole = whole(*arguments)
        def segregated_call(self, only): raise AssertionError
        def __getattr__(self, name): return getattr(self._whole, name)
    cygrpc.Channel = Changed
    """
    transports, log = request_program(tmp_path, break_grpcio=other_parameters)
    assert transports == "direct public"
    assert len([line for line in log if "WARNING" in line]) == 1


def test_if_a_servers_call_behaves_differently_the_next_stream_uses_the_public_transport(tmp_path: Path) -> None:
    """Callers of earlier streams get UNAVAILABLE, as from a server that restarts."""
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
    transports, log = request_program(tmp_path, break_grpcio=no_batches)
    assert transports == "public direct"
    assert len([line for line in log if "WARNING" in line]) == 1


@pytest.fixture
def broken_streams(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[..., Any]], None]:
    """Return a function that replaces a method of the direct transport's server streams."""
    if choice.server_transport() != "direct":
        pytest.skip("only for the direct transport of the server")

    def replace(name: str, function: Callable[..., Any]) -> None:
        whole = getattr(direct_server.DirectServerStream, name)
        monkeypatch.setattr(
            direct_server.DirectServerStream,
            name,
            lambda stream, *arguments: function(partial(whole, stream), *arguments),
        )

    return replace


def test_an_error_in_the_polling_thread_ends_only_that_stream(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An exception would end gRPC's polling thread, and with it the server."""
    if choice.server_transport() != "direct":
        pytest.skip("only for the direct transport of the server")
    accept = Session.accept

    def accept_except_unlucky(session: Session, message: bytes) -> Any:
        if b"unlucky" in message:
            raise ZeroDivisionError("unexpected")
        return accept(session, message)

    monkeypatch.setattr(Session, "accept", accept_except_unlucky)
    with serving() as batcher, connect(batcher) as client, connect(batcher) as other:
        other.send_request(b"before")
        error = error_of(client.send_request, b"unlucky")
        assert error.code() is grpc.StatusCode.INTERNAL
        assert "ZeroDivisionError: unexpected" in error.details()
        eventually(lambda: "a stream failed" in caplog.text)
        assert other.send_request(b"after") == ({"result": b"after"}, 0)
        assert client.send_request(b"again") == ({"result": b"again"}, 0)
        eventually(lambda: batcher.metrics().open_streams == 2)
        assert batcher.transport == "direct"


@pytest.mark.parametrize("first", [True, False], ids=["the first reply", "a later reply"])
def test_a_reply_that_grpc_refuses_to_send_ends_only_that_stream(
    broken_streams: Callable[[str, Callable[..., Any]], None], caplog: pytest.LogCaptureFixture, first: bool
) -> None:
    def start(whole: Callable[..., None], operations: tuple[Any, ...]) -> None:
        if len(operations) > 1 and refused:
            operations = (*operations, refused.pop())  # gRPC refuses two of a kind
        whole(operations)

    broken_streams("_start", start)
    with serving() as batcher, connect(batcher) as client, connect(batcher) as other:
        refused: list[Any] = []
        other.send_request(b"before")
        if not first:
            client.send_request(b"before")
        refused.append(grpcio_private.receive()[0])
        error = error_of(client.send_request, b"refused")
        assert error.code() is grpc.StatusCode.INTERNAL
        assert "gRPC refused" in error.details()
        eventually(lambda: "a stream failed" in caplog.text)
        assert other.send_request(b"after") == ({"result": b"after"}, 0)
        assert client.send_request(b"again") == ({"result": b"again"}, 0)
        eventually(lambda: batcher.metrics().open_streams == 2)


class WrappingInterceptor(grpc.ServerInterceptor):  # type: ignore[misc]
    """Puts its own function between grpcio and the handler, as interceptors that log or trace do."""

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


def test_a_handler_wrapped_by_an_interceptor_behaves_the_same() -> None:
    interceptor = WrappingInterceptor()
    with serving(interceptors=(interceptor,)) as batcher, connect(batcher) as client:
        assert [client.send_request(b"a"), client.send_request(b"b")] == [({"result": b"a"}, 0), ({"result": b"b"}, 0)]
        reply = old_style_request(address_of(batcher), MODELS["repr"].write_request({"data": b"old"}))
        assert reply.code is grpc.StatusCode.OK
        assert len(reply.messages) == 1
        assert old_style_request(address_of(batcher), b"\xff").code is grpc.StatusCode.INVALID_ARGUMENT
        assert interceptor.streams == 3
        assert interceptor.messages == 2 * 2 + 2 + 1  # requests and replies; the last request had no reply


@pytest.mark.parametrize("kind", ["a function", "a function of anything", "a generator"])
def test_an_interceptor_may_wrap_the_handler_with_functools(kind: str) -> None:
    """functools.wraps copies the __dict__, which must not contain what marks the direct transport's handler."""

    class Wraps(grpc.ServerInterceptor):  # type: ignore[misc]
        def intercept_service(self, continuation: Callable[..., Any], details: grpc.HandlerCallDetails) -> Any:
            inner = continuation(details).stream_stream

            @wraps(inner)
            def function(messages: Iterator[bytes], context: grpc.ServicerContext) -> Any:
                return inner(messages, context)

            @wraps(inner)
            def function_of_anything(*arguments: Any, **options: Any) -> Any:
                return inner(*arguments, **options)

            @wraps(inner)
            def generator(*arguments: Any) -> Any:
                yield from inner(*arguments)

            wrapped = {"a function": function, "a function of anything": function_of_anything, "a generator": generator}
            return grpc.stream_stream_rpc_method_handler(wrapped[kind])

    with serving(interceptors=(Wraps(),)) as batcher, connect(batcher) as client:
        assert client.send_request(b"x") == ({"result": b"x"}, 0)
        assert client.send_request(b"y") == ({"result": b"y"}, 0)


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
            assert client.transport == choice.client_transport(None)
            client.send_request(b"x")
        with MukoeBatcherClient(address_of(batcher), metadata=(("token", "t2"),), interceptors=(Token(),)) as client:
            assert client.transport == "public"
            assert client.send_request(b"x") == ({"result": b"x"}, 0)
    assert [metadata["token"] for metadata in seen] == ["t1", "t2"]


def objects_in_use() -> int:
    """Return how many objects are left after a garbage collection."""
    gc.collect()
    return len(gc.get_objects())


@pytest.mark.timeout(300)
def test_a_thousand_rounds_of_opening_using_and_closing_leave_nothing_behind() -> None:
    """Streams end with OK, by cancellation, with an error and by a time limit; clients are closed."""
    message = MODELS["repr"].write_request({"data": b"x"})

    def round_of_streams(channel: grpc.Channel) -> None:
        with connect(batcher) as client:
            for each in range(3):
                client.send_request(b"%d" % each)
            with suppress(RequestError):  # the answer may be in time
                client.send_request(b"late", timeout_s=1e-4)
            assert error_of(client.send_request, b"not for repr", 1).code() is grpc.StatusCode.INVALID_ARGUMENT
        # On one channel, because grpcio 1.49 occasionally leaves the socket of a channel open.
        cancelled = channel.stream_stream(METHOD)(iter((message, message)))
        next(cancelled)
        cancelled.cancel()

    with serving(echo) as batcher, grpc.insecure_channel(address_of(batcher)) as channel:
        for _ in range(100):
            round_of_streams(channel)
        eventually(lambda: batcher.metrics().open_streams == 0)
        threads, files, objects = threading.active_count(), open_files(), objects_in_use()
        for _ in range(1000):
            round_of_streams(channel)
        eventually(lambda: batcher.metrics().open_streams == 0)
        # Idle threads end a little later, and so do connections; in grpcio 1.49 only when it next has to wait.
        eventually(lambda: threading.active_count() <= threads)
        assert open_files() - files < 100  # one per round would be 1,000
        assert objects_in_use() - objects < 500  # one per round would be 1,000


IDLE_SERVER_PROGRAM = """
    import sys, tracemalloc
    from grpc_batcher import create_batcher

    tracemalloc.start()
    with create_batcher(
        "repr", 1, 0.0, 0, batch_process_fn=lambda requests: [({"result": data[:9]}, 0) for data in requests]
    ) as batcher:
        print(batcher.port, flush=True)
        for _ in sys.stdin:
            print(tracemalloc.get_traced_memory()[0], flush=True)
"""


def test_an_idle_stream_does_not_keep_its_last_request(tmp_path: Path) -> None:
    def held_bytes() -> int:
        program.type_line("how much")
        return int(program.read_line())

    size = 4 * 2**20
    with start_program(tmp_path, IDLE_SERVER_PROGRAM) as program:
        address = f"127.0.0.1:{program.read_line()}"
        with MukoeBatcherClient(address) as client, ThreadPoolExecutor(8) as threads:
            list(threads.map(client.send_request, [bytes(size)] * 32))
            eventually(lambda: held_bytes() < size)


@pytest.mark.timeout(180)
def test_servers_that_stop_at_any_moment_leave_nothing_behind(caplog: pytest.LogCaptureFixture) -> None:
    """With an idle stream, requests waiting and in the callback, and a callback that ends only afterwards."""

    def round_of_server() -> None:
        with Held() as held, serving(held, batch_size=2) as batcher, connect(batcher) as client:
            idle = in_background(client.send_request, b"first")
            held.release()
            idle.result()
            requests = [in_background(client.send_request, b"%d" % each) for each in range(5)]
            eventually(lambda: len(held.batches) == 2 and batcher.metrics().waiting >= 3)
            batcher.shutdown(grace_s=0)
            assert {error_of(request.result).code() for request in requests} == {grpc.StatusCode.UNAVAILABLE}

    caplog.set_level(logging.ERROR, logger="grpc_batcher")  # pytest keeps the warning of each shutdown
    for _ in range(5):
        round_of_server()
    threads, files, objects = threading.active_count(), open_files(), objects_in_use()
    for _ in range(100):
        round_of_server()
    # The last servers' threads end a little later, and their objects with them.
    eventually(lambda: threading.active_count() <= threads)
    eventually(lambda: objects_in_use() - objects < 100)  # one per round would be 100
    assert open_files() - files < 50
