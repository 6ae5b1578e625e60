"""Everything that users of the C++ wheel have keeps working: scripts, clients, servers, and the bytes between them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grpc_batcher import MukoeBatcherClient
from grpc_batcher._proto.mukoe_batcher_pb2 import (
    Dynamics,
    KeyValue,
    ModelResponse,
    MukoeRequest,
    MukoeResponse,
    Representations,
)

import grpc
import numpy as np
import pytest
from serving import (
    Held,
    address_of,
    answer,
    connect,
    error_of,
    eventually,
    finish_program,
    in_background,
    in_callback,
    old_style_call,
    old_style_request,
    plain_server,
    run_program,
    serving,
    start_program,
)

# ---- a user's script ----

USER_SCRIPT = """
    import threading
    import time

    import grpc_batcher
    import msgpack
    import numpy as np

    BATCH_SIZE = 8

    def pack(array):
        return msgpack.packb({"dtype": array.dtype.str, "shape": array.shape, "data": array.tobytes()})

    def unpack(packed):
        fields = msgpack.unpackb(packed)
        return np.frombuffer(fields["data"], fields["dtype"]).reshape(fields["shape"])

    def batch_process_fn(requests):
        observations = [unpack(request) for request in requests]
        batch = np.zeros((BATCH_SIZE, 96, 96, 3, 4))
        batch[: len(observations)] = observations
        embeddings = batch.mean(axis=(1, 2, 3))
        return [({"embedding": pack(embeddings[row])}, 7) for row in range(len(requests))]

    server = grpc_batcher.create_batcher(
        "repr",
        batch_size=BATCH_SIZE,
        batch_timeout_s=0.005,
        port=0,
        num_threads=4,
        batch_process_fn=batch_process_fn,
        track_metrics=False,
    )
    server.start()
    while not server.is_server_ready():
        time.sleep(0.1)

    def act(actor):
        for step in range(3):
            observation = np.full((96, 96, 3, 4), 10.0 * actor + step)
            assert observation.nbytes == 884736
            client = grpc_batcher.MukoeBatcherClient(f"localhost:{server.port}")
            result, version = client.send_request(pack(observation))
            embedding = unpack(result["embedding"])
            answers.append((actor, step, embedding.tolist(), version))

    answers = []
    actors = [threading.Thread(target=act, args=(actor,)) for actor in range(10)]
    for actor in actors:
        actor.start()
    for actor in actors:
        actor.join()
    for answer in sorted(answers):
        print(*answer)
    server.print_batcher_summary()
"""


def test_a_users_script_gets_its_30_answers_and_exits_with_0(tmp_path: Path) -> None:
    pytest.importorskip("msgpack")
    output = run_program(tmp_path, USER_SCRIPT)
    assert output[:30] == [f"{actor} {step} {[10.0 * actor + step] * 4} 7" for actor in range(10) for step in range(3)]
    assert "30 OK" in "".join(output[30:])


def test_an_actor_that_starts_before_its_server_is_answered_afterwards(tmp_path: Path) -> None:
    with serving() as finder:
        port = finder.port
    actor = """
        import sys
        import time

        from grpc_batcher import MukoeBatcherClient

        client = MukoeBatcherClient(sys.argv[1])
        tries = 0
        while True:
            tries += 1
            try:
                print(client.send_request(b"hi"))
                break
            except Exception as error:
                if tries == 3:
                    print(f"tried: {error.code().name}", flush=True)
                time.sleep(0.01)
    """
    with start_program(tmp_path, actor, f"127.0.0.1:{port}") as program:
        assert program.read_line() == "tried: UNAVAILABLE"
        with serving(port=port):
            status, output, errors = finish_program(program)
    assert (status, output) == (0, f"{answer(b'hi')}\n"), errors


# ---- programs that never call shutdown ----

EXIT_PROGRAM = """
    import sys
    import threading
    import time

    from grpc_batcher import MukoeBatcherClient, create_batcher

    entered = threading.Event()

    def answer(batch):
        if batch[0] == b"block":
            entered.set()
            threading.Event().wait()
        if batch[0] == b"spin":
            entered.set()
            while True:
                pass
        return [({"result": data}, 0) for data in batch]

    def send(data):
        try:
            client.send_request(data)
        except Exception:
            pass

    def send_in_background(data):
        threading.Thread(target=send, args=(data,), daemon=True).start()

    batcher = create_batcher("repr", batch_size=2, batch_timeout_s=WINDOW, port=0, batch_process_fn=answer)
    batcher.start()
    while not batcher.is_server_ready():
        time.sleep(0.01)
    client = MukoeBatcherClient(f"localhost:{batcher.port}")
    ENDING
    print("over")
"""


def exit_program(ending: str, window: str = "0") -> str:
    return EXIT_PROGRAM.replace("WINDOW", window).replace("ENDING", ending.replace("\n", "\n    "))


@pytest.mark.parametrize(
    "ending",
    [
        pytest.param("", id="nothing was sent"),
        pytest.param('client.send_request(b"hi")', id="the client is open"),
        pytest.param('client.send_request(b"hi")\nclient.close()', id="the client is closed"),
        pytest.param('client.send_request(b"hi")\ndel client', id="the client is dropped"),
        pytest.param('with client:\n    client.send_request(b"hi")\nbatcher.shutdown()', id="the batcher is shut down"),
        pytest.param('client.send_request(b"hi")\nbatcher.print_batcher_summary()', id="the summary is printed"),
        pytest.param(
            'send_in_background(b"block")\nentered.wait()', id="a request is in a callback that never returns"
        ),
        pytest.param('send_in_background(b"spin")\nentered.wait()', id="a request is in a callback that computes"),
        pytest.param(
            'send_in_background(b"block")\nentered.wait()\n'
            'send_in_background(b"hi")\n'
            "while batcher.metrics().waiting < 1:\n    time.sleep(0.001)",
            id="a request waits behind a callback that never returns",
        ),
    ],
)
def test_a_program_that_ends_without_shutdown_exits_with_0(ending: str, tmp_path: Path) -> None:
    output = run_program(tmp_path, exit_program(ending))
    assert output[-1] == "over"


def test_a_program_that_ends_while_requests_wait_for_their_window_exits_with_0(tmp_path: Path) -> None:
    ending = 'send_in_background(b"hi")\nwhile batcher.metrics().waiting < 1:\n    time.sleep(0.001)'
    assert run_program(tmp_path, exit_program(ending, window="1000")) == ["over"]


def test_a_program_that_ends_after_its_answers_writes_no_traceback_to_stderr(tmp_path: Path) -> None:
    with start_program(tmp_path, exit_program('client.send_request(b"hi")')) as program:
        status, output, errors = finish_program(program)
    assert (status, output) == (0, "over\n")
    assert "Traceback" not in errors
    assert "grpc_batcher" not in errors


@pytest.mark.parametrize(
    ("ending", "expected"), [("sys.exit(3)", 3), ("raise ValueError('of the program')", 1)], ids=["exit", "exception"]
)
def test_a_program_keeps_its_own_exit_status(ending: str, expected: int, tmp_path: Path) -> None:
    with start_program(tmp_path, exit_program(ending)) as program:
        status, output, errors = finish_program(program)
    assert (status, output) == (expected, ""), errors


SERVER_PROGRAM = """
    import sys

    from grpc_batcher import create_batcher

    batcher = create_batcher(
        "repr", batch_size=4, batch_timeout_s=float(sys.argv[1]), port=0,
        batch_process_fn=lambda batch: [({"result": data}, 0) for data in batch],
    )
    batcher.start()
    print(batcher.port, flush=True)
    sys.stdin.readline()
    while batcher.metrics().waiting < int(sys.argv[2]):
        pass
"""


def test_a_server_program_can_end_while_callers_keep_their_streams_open(tmp_path: Path) -> None:
    with (
        start_program(tmp_path, SERVER_PROGRAM, "0", "0") as program,
        MukoeBatcherClient(f"127.0.0.1:{program.read_line()}") as client,
    ):
        assert client.send_request(b"x") == answer(b"x")
        status, output, errors = finish_program(program, "end\n")
        assert (status, output) == (0, ""), errors
        assert error_of(client.send_request, b"x").code() is grpc.StatusCode.UNAVAILABLE


def test_a_server_program_that_ends_answers_the_requests_that_wait(tmp_path: Path) -> None:
    with (
        start_program(tmp_path, SERVER_PROGRAM, "1000", "2") as program,
        MukoeBatcherClient(f"127.0.0.1:{program.read_line()}") as client,
    ):
        requests = [in_background(client.send_request, data) for data in (b"one", b"two")]
        status, output, errors = finish_program(program, "end\n")
        assert (status, output) == (0, ""), errors
        assert [request.result() for request in requests] == [answer(b"one"), answer(b"two")]


def test_ctrl_c_ends_a_server_program(tmp_path: Path) -> None:
    text = SERVER_PROGRAM.replace(
        "import sys\n", "import signal, sys\n    signal.signal(signal.SIGINT, signal.default_int_handler)\n", 1
    )
    with (
        start_program(tmp_path, text, "0", "0") as program,
        MukoeBatcherClient(f"127.0.0.1:{program.read_line()}") as client,
    ):
        assert client.send_request(b"x") == answer(b"x")
        program.send_signal(signal.SIGINT)
        status, _, errors = finish_program(program)
    assert status == -signal.SIGINT, errors
    assert "KeyboardInterrupt" in errors


# ---- old clients ----

REPR_HI = MukoeRequest(representations=Representations(data=b"hi")).SerializeToString()


def test_an_old_style_request_is_answered_and_its_stream_ends_with_ok() -> None:
    for model, request, expected in (
        ("repr", REPR_HI, answer(b"hi")),
        ("dyna", MukoeRequest(dynamics=Dynamics(data=b"hi", action=-3)).SerializeToString(), answer(b"hi", -3)),
    ):
        with serving(model=model) as batcher:
            reply = old_style_request(address_of(batcher), request)
            assert reply.code is grpc.StatusCode.OK
            [message] = reply.messages
            result = MukoeResponse.FromString(message).result
            assert ({pair.key: pair.values for pair in result.dictionary}, result.step) == expected
            eventually(lambda batcher=batcher: batcher.metrics().open_streams == 0)


def test_old_style_requests_from_many_threads_each_get_their_own_answers() -> None:
    def call(caller: int) -> None:
        for number in range(10):
            data = b"%d of %d" % (number, caller)
            request = MukoeRequest(representations=Representations(data=data)).SerializeToString()
            reply = old_style_request(address_of(batcher), request)
            assert reply.code is grpc.StatusCode.OK
            [message] = reply.messages
            assert MukoeResponse.FromString(message).result.dictionary[0].values == data

    with serving(batch_timeout_s=0.001) as batcher:
        for caller in [in_background(call, caller) for caller in range(8)]:
            caller.result()
        assert batcher.metrics().requests == {"OK": 80}


def test_64_old_style_streams_fill_a_batch_of_64_despite_num_threads_16() -> None:
    with Held() as held, serving(held, batch_size=64, batch_timeout_s=1000.0, num_threads=16) as batcher:
        held.release()
        replies = [in_background(old_style_request, address_of(batcher), REPR_HI) for _ in range(64)]
        for reply in replies:
            assert reply.result().code is grpc.StatusCode.OK
        assert [len(batch) for batch in held.batches] == [64]


def test_300_streams_of_one_connection_are_served_at_once() -> None:
    # HTTP/2 peers often allow no more than 100 on one connection.
    with Held() as held, serving(held, batch_size=300, num_threads=1) as batcher, connect(batcher) as client:
        plug = in_callback(held, client, b"in front")
        requests = [in_background(client.send_request, b"%d" % number) for number in range(300)]
        eventually(lambda: batcher.metrics().waiting == 300)
        held.release(2)
        plug.result()
        assert [request.result() for request in requests] == [answer(b"%d" % number) for number in range(300)]
        assert len(held.batches[1]) == 300


def test_an_old_style_stream_with_several_messages_gets_their_answers_in_order() -> None:
    requests = [
        MukoeRequest(representations=Representations(data=b"%d" % number)).SerializeToString() for number in range(5)
    ]
    with serving() as batcher, grpc.insecure_channel(address_of(batcher)) as channel:
        call = channel.stream_stream("/mukoe_batcher.MukoeService/ProcessRequest")(iter(requests))
        answers = [MukoeResponse.FromString(message).result.dictionary[0].values for message in call]
        assert answers == [b"%d" % number for number in range(5)]
        assert call.code() is grpc.StatusCode.OK


def test_a_stream_without_messages_ends_with_ok() -> None:
    with serving() as batcher, grpc.insecure_channel(address_of(batcher)) as channel:
        call = channel.stream_stream("/mukoe_batcher.MukoeService/ProcessRequest")(iter(()))
        assert list(call) == []
        assert call.code() is grpc.StatusCode.OK
        eventually(lambda: batcher.metrics().open_streams == 0)
        assert batcher.metrics().requests == {}


def test_an_old_style_caller_that_cancels_leaves_nothing_behind() -> None:
    with Held() as held, serving(held) as batcher, connect(batcher) as client:
        plug = in_callback(held, client, b"in front")
        with old_style_call(address_of(batcher), REPR_HI) as call:
            eventually(lambda: batcher.metrics().waiting == 1)
            call.cancel()
            eventually(lambda: batcher.metrics().waiting == 0)
        eventually(lambda: batcher.metrics().open_streams == 1)
        held.release()
        plug.result()


# ---- old servers ----


def serve_as_the_old_wheel_does(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    """Read a message, answer it, and read the next, until the stream ends."""
    for message in messages:
        request = MukoeRequest.FromString(message)
        kind = request.WhichOneof("request_type")
        body = getattr(request, kind)
        step = body.action if kind == "dynamics" else 0
        pairs = [KeyValue(key="result", values=body.data)]
        yield MukoeResponse(result=ModelResponse(dictionary=pairs, step=step)).SerializeToString()


def test_a_client_is_answered_by_an_old_style_server() -> None:
    with plain_server(serve_as_the_old_wheel_does) as address, MukoeBatcherClient(address) as client:
        for number in range(20):
            data = b"%d" % number
            assert client.send_request(data) == answer(data)
            assert client.send_request(data, -number) == answer(data, -number)


def test_many_threads_of_a_client_are_answered_by_an_old_style_server() -> None:
    def call(caller: int) -> None:
        begin.wait()
        for number in range(20):
            data = b"%d of %d" % (number, caller)
            assert client.send_request(data, number) == answer(data, number)

    begin = threading.Barrier(8)
    with plain_server(serve_as_the_old_wheel_does) as address, MukoeBatcherClient(address) as client:
        for caller in [in_background(call, caller) for caller in range(8)]:
            caller.result()


def test_a_client_reuses_its_stream_to_an_old_style_server() -> None:
    streams = []

    def count_streams(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        streams.append(context)
        yield from serve_as_the_old_wheel_does(messages, context)

    with plain_server(count_streams) as address, MukoeBatcherClient(address) as client:
        for _ in range(20):
            client.send_request(b"x")
        assert len(streams) == 1


# ---- the bytes on the wire ----


@pytest.mark.parametrize(
    ("arguments", "wire"),
    [
        ((b"hi",), "0a 04 0a 02 68 69"),
        (("hi",), "0a 04 0a 02 68 69"),
        ((b"",), "0a 00"),
        ((bytes(200),), "0a cb 01 0a c8 01" + "00" * 200),
        ((b"hi", 3), "12 06 0a 02 68 69 10 03"),
        ((b"hi", 0), "12 04 0a 02 68 69"),
        ((b"", 0), "12 00"),
        ((b"", 300), "12 03 10 ac 02"),
        ((b"hi", -1), "12 0f 0a 02 68 69 10 ff ff ff ff ff ff ff ff ff 01"),
        ((b"hi", 2**31 - 1), "12 0a 0a 02 68 69 10 ff ff ff ff 07"),
        ((b"hi", -(2**31)), "12 0f 0a 02 68 69 10 80 80 80 80 f8 ff ff ff ff 01"),
        ((np.arange(4, dtype=np.uint8).reshape(2, 2).T, 1), "12 08 0a 04 00 02 01 03 10 01"),
    ],
    ids=repr,
)
def test_a_client_sends_the_contracts_bytes(arguments: tuple[Any, ...], wire: str) -> None:
    received = []

    def record(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        for message in messages:
            received.append(message)
            yield bytes.fromhex("0a00")

    with plain_server(record) as address, MukoeBatcherClient(address) as client:
        assert client.send_request(*arguments) == ({}, 0)
    assert received == [bytes.fromhex(wire)]
    assert received == [MukoeRequest.FromString(received[0]).SerializeToString()]


@pytest.mark.parametrize(
    ("result", "wire"),
    [
        (({"result": b"hi"}, 0), "0a 0e 0a 0c 0a 06 72 65 73 75 6c 74 12 02 68 69"),
        (({}, 0), "0a 00"),
        (({}, 7), "0a 02 10 07"),
        (({}, -1), "0a 0b 10 ff ff ff ff ff ff ff ff ff 01"),
        (({"a": b""}, 0), "0a 05 0a 03 0a 01 61"),
        (({"": b"x"}, 0), "0a 05 0a 03 12 01 78"),
        (({"b": b"1", "a": b"2"}, 1), "0a 12 0a 06 0a 01 62 12 01 31 0a 06 0a 01 61 12 01 32 10 01"),
        (({"\u00e4": bytes(200)}, 0), "0a d2 01 0a cf 01 0a 02 c3 a4 12 c8 01" + "00" * 200),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else repr(value)[:40],
)
def test_a_server_sends_the_contracts_bytes(result: Any, wire: str) -> None:
    with serving(lambda requests: [result] * len(requests)) as batcher, connect(batcher) as client:
        [message] = old_style_request(address_of(batcher), REPR_HI).messages
        assert message == bytes.fromhex(wire)
        assert message == MukoeResponse.FromString(message).SerializeToString()
        assert client.send_request(b"hi") == result


def test_an_answer_in_an_unusual_but_valid_form_is_read() -> None:
    # Fields out of order, unknown fields, and a result in two parts.
    odd = [
        "0a 02 10 07 0a 08 0a 06 12 01 31 0a 01 61",
        "7a 01 21 0a 0d 10 07 0a 06 0a 01 61 12 01 31 7a 01 21",
        "0a 0a 0a 06 0a 01 61 12 01 31 10 05 0a 02 10 07",
    ]
    replies = iter(odd)

    def serve(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        for _ in messages:
            yield bytes.fromhex(next(replies))

    with plain_server(serve) as address, MukoeBatcherClient(address) as client:
        for _ in odd:
            assert client.send_request(b"x") == ({"a": b"1"}, 7)


def test_an_answer_without_a_result_is_empty() -> None:
    def serve(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        for _ in messages:
            yield b""

    with plain_server(serve) as address, MukoeBatcherClient(address) as client:
        assert client.send_request(b"x") == ({}, 0)
