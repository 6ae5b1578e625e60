"""How a request ends, over a real socket: the rows of the table of outcomes, and what the other requests get.

In each test the next batch is served as if nothing had happened.
"""

from __future__ import annotations

import logging
import pickle
import random
import socket
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from typing import Any

from grpc_batcher import MukoeBatcher, MukoeBatcherClient, RequestError
from grpc_batcher._models import MODELS

import grpc
import numpy as np
import pytest
from serving import (
    Held,
    address_of,
    answer,
    connect,
    echo,
    error_of,
    eventually,
    in_background,
    in_callback,
    old_style_call,
    old_style_request,
    serving,
    waiting,
)

INTERNAL = grpc.StatusCode.INTERNAL
INVALID_ARGUMENT = grpc.StatusCode.INVALID_ARGUMENT
RESOURCE_EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
DEADLINE_EXCEEDED = grpc.StatusCode.DEADLINE_EXCEEDED
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE

# The messages of a "repr" request for b"hi", and of a "dyna" request for b"hi" and 3.
REPR_HI = bytes.fromhex("0a040a026869")
DYNA_HI = bytes.fromhex("12060a0268691003")


def outcomes_of_batch(batch_process_fn: Callable[[list[Any]], Any], *datas: bytes) -> list[Any]:
    """Send requests that make up one batch, in this order. Returns each one's answer or RequestError.

    The callback also gets a request before the batch and one after it, which must be answered.
    """
    with Held(batch_process_fn) as held, serving(held, batch_size=len(datas)) as batcher, connect(batcher) as client:
        plug = in_callback(held, client, b"before")
        requests = [waiting(batcher, client.send_request, data) for data in datas]
        held.release(3)
        errors = [request.exception() for request in requests]
        assert held.batches[1] == list(datas)
        assert plug.result() == answer(b"before")
        assert client.send_request(b"after") == answer(b"after")
        codes = [error.code().name if isinstance(error, RequestError) else "OK" for error in errors]
        counted = batcher.metrics().requests
        assert {code: counted[code] for code in counted} == {
            code: codes.count(code) + 2 * (code == "OK") for code in {*codes, "OK"}
        }
        return [error or request.result() for error, request in zip(errors, requests, strict=True)]


def whole_batch(spoil: Callable[[list[bytes]], Any]) -> Callable[[list[bytes]], Any]:
    """Return a callback that echoes, except for a batch that contains b"bad"."""
    return lambda requests: spoil(requests) if b"bad" in requests else echo(requests)


def one_result(spoiled: Any) -> Callable[[list[bytes]], Any]:
    """Return a callback that echoes, but returns something else for b"bad"."""
    return lambda requests: [spoiled if data == b"bad" else answer(data) for data in requests]


def raising(error: BaseException) -> Callable[[list[bytes]], Any]:
    def spoil(requests: list[bytes]) -> Any:
        raise error

    return whole_batch(spoil)


def assert_error(error: Any, code: grpc.StatusCode, *parts: str) -> None:
    assert isinstance(error, RequestError)
    assert isinstance(error, grpc.RpcError)
    assert error.code() is code, error
    for part in parts:
        assert part in error.details()


# ---- answered ----


def test_every_request_of_a_batch_gets_its_own_answer() -> None:
    datas = [b"a", b"b", b"", b"d"]
    assert outcomes_of_batch(echo, *datas) == [answer(data) for data in datas]


@pytest.mark.parametrize(
    ("result", "received"),
    [
        pytest.param(({}, 0), ({}, 0), id="nothing"),
        pytest.param(({"a": b"1", "b": b"", "": b"3"}, 7), ({"a": b"1", "b": b"", "": b"3"}, 7), id="several"),
        pytest.param(({"\u00e4\U0001f642\0": b"\0\xff"}, 0), ({"\u00e4\U0001f642\0": b"\0\xff"}, 0), id="unicode"),
        pytest.param(
            ({1: b"1", 2.5: b"2", None: b"3", (4,): b"4"}, 0),
            ({"1": b"1", "2.5": b"2", "None": b"3", "(4,)": b"4"}, 0),
            id="keys become text",
        ),
        pytest.param(({"a": b"1"}, 2**31 - 1), ({"a": b"1"}, 2**31 - 1), id="largest step"),
        pytest.param(({"a": b"1"}, -(2**31)), ({"a": b"1"}, -(2**31)), id="smallest step"),
        pytest.param(({"a": b"1"}, np.int64(5)), ({"a": b"1"}, 5), id="numpy step"),
        pytest.param(({"a": bytes(3_000_000)}, 0), ({"a": bytes(3_000_000)}, 0), id="large"),
    ],
)
def test_an_answer_arrives_as_the_callback_returned_it(result: Any, received: Any) -> None:
    assert outcomes_of_batch(one_result(result), b"x", b"bad", b"y") == [answer(b"x"), received, answer(b"y")]


def test_a_result_may_be_changed_once_the_callback_has_returned() -> None:
    shared = {"result": b""}

    def reuse_a_dictionary(requests: list[bytes]) -> Any:
        shared["result"] = requests[0]
        return [(shared, 0)]

    with serving(reuse_a_dictionary, batch_size=1) as batcher, connect(batcher) as client:
        requests = [in_background(client.send_request, b"%d" % number) for number in range(20)]
        assert [request.result() for request in requests] == [answer(b"%d" % number) for number in range(20)]


def test_a_callback_may_return_a_tuple_of_results() -> None:
    assert outcomes_of_batch(lambda requests: tuple(echo(requests)), b"a", b"b") == [answer(b"a"), answer(b"b")]


# ---- the callback raised ----


class OwnError(Exception):
    pass


class OwnBaseError(BaseException):
    pass


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("the network broke"), "ValueError: the network broke"),
        (OwnError(1, "two"), "OwnError: (1, 'two')"),
        (KeyError("missing"), "KeyError: 'missing'"),
        (RuntimeError(), "RuntimeError"),
        (StopIteration("early"), "StopIteration: early"),
        (MemoryError("out of memory"), "MemoryError: out of memory"),
        (SystemExit(3), "SystemExit: 3"),
        (KeyboardInterrupt("by a callback"), "KeyboardInterrupt: by a callback"),
        (GeneratorExit(), "GeneratorExit"),
        (OwnBaseError("own"), "OwnBaseError: own"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_callback_that_raises_fails_the_whole_batch_with_the_errors_type_and_text(
    error: BaseException, text: str
) -> None:
    outcomes = outcomes_of_batch(raising(error), b"a", b"bad", b"c")
    for outcome in outcomes:
        assert_error(outcome, INTERNAL, text)


def test_what_a_callback_raises_is_logged_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, logger="grpc_batcher"):
        outcomes_of_batch(raising(OwnError("find me")), b"bad")
    [record] = [record for record in caplog.records if record.name == "grpc_batcher"]
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], OwnError)


@pytest.mark.parametrize(
    "text",
    [
        "x" * 1_000_000,
        "\u00e4" * 100_000,
        "\u20ac" * 100_000,
        "\U0001f642" * 100_000,
        "%" * 100_000,
        "\n" * 100_000,
        "\0" * 100_000,
    ],
    ids=["ascii", "two bytes", "three bytes", "four bytes", "percent", "newlines", "nulls"],
)
def test_a_very_long_error_text_is_shortened(text: str) -> None:
    [outcome] = outcomes_of_batch(raising(ValueError(f"begin {text}")), b"bad")
    assert_error(outcome, INTERNAL, f"ValueError: begin {text[:50]}")
    assert len(outcome.details()) < len(text)


@pytest.mark.parametrize("text", ["\u00e4\u20ac\U0001f642", "two\nlines", "a\0null", "100 %", "%41"], ids=repr)
def test_every_character_of_an_error_text_arrives(text: str) -> None:
    [outcome] = outcomes_of_batch(raising(ValueError(text)), b"bad")
    assert_error(outcome, INTERNAL, f"ValueError: {text}")


def test_an_error_text_that_utf8_cannot_express_still_arrives(caplog: pytest.LogCaptureFixture) -> None:
    # pytest-xdist cannot pass such a log line from one process to another.
    caplog.set_level(logging.CRITICAL + 1, logger="grpc_batcher")
    [outcome] = outcomes_of_batch(raising(OSError("no such file: caf\udce9")), b"bad")
    assert_error(outcome, INTERNAL, "OSError: no such file: caf")


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


def test_an_error_whose_text_raises_arrives_with_its_type() -> None:
    [outcome] = outcomes_of_batch(raising(Unprintable()), b"bad")
    assert_error(outcome, INTERNAL, "Unprintable")


# ---- one result is wrong ----


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("not this one"), "ValueError: not this one"),
        (OwnError("own"), "OwnError: own"),
        (Unprintable(), "Unprintable"),
        (SystemExit(3), "SystemExit: 3"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_exception_in_place_of_a_result_fails_only_that_request(error: BaseException, text: str) -> None:
    first, outcome, last = outcomes_of_batch(one_result(error), b"a", b"bad", b"c")
    assert_error(outcome, INTERNAL, text)
    assert (first, last) == (answer(b"a"), answer(b"c"))


class WithoutRepr:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


class WithoutText:
    def __str__(self) -> str:
        raise RuntimeError("no text")


class BrokenMapping(Mapping[str, bytes]):
    def __getitem__(self, key: str) -> bytes:
        raise RuntimeError("broken mapping")

    def __iter__(self) -> Iterator[str]:
        raise RuntimeError("broken mapping")

    def __len__(self) -> int:
        return 1


@pytest.mark.parametrize(
    ("result", "text"),
    [
        pytest.param(None, "a NoneType", id="None"),
        pytest.param("text", "a str", id="str"),
        pytest.param("ab", "", id="str of two"),
        pytest.param(b"data", "a bytes", id="bytes"),
        pytest.param(3, "a int", id="int"),
        pytest.param({"a": b"1"}, "a dict", id="only a dictionary"),
        pytest.param({"a": b"1", "b": b"2"}, "a dict", id="only a dictionary of two"),
        pytest.param((), "a tuple", id="empty tuple"),
        pytest.param(({},), "a tuple", id="tuple of one"),
        pytest.param(({}, 0, 0), "a tuple", id="tuple of three"),
        pytest.param((0, {}), "a int", id="wrong order"),
        pytest.param((None, 0), "a NoneType", id="None for the dictionary"),
        pytest.param(([("a", b"1")], 0), "a list", id="list for the dictionary"),
        pytest.param((b"data", 0), "a bytes", id="bytes for the dictionary"),
        pytest.param(({"a": "1"}, 0), "a str: '1'", id="str for a value"),
        pytest.param(({"a": bytearray(b"1")}, 0), "a bytearray", id="bytearray for a value"),
        pytest.param(({"a": np.zeros(2)}, 0), "a ndarray", id="numpy for a value"),
        pytest.param(({"a": None}, 0), "a NoneType", id="None for a value"),
        pytest.param(({"good": b"1", "wrong": 2}, 0), "'wrong'", id="one wrong value"),
        pytest.param(({"a": WithoutRepr()}, 0), "", id="value without repr"),
        pytest.param(WithoutRepr(), "", id="result without repr"),
        pytest.param(({WithoutText(): b"1"}, 0), "", id="key without text"),
        pytest.param(({WithoutRepr(): 2}, 0), "", id="key without repr"),
        pytest.param((BrokenMapping(), 0), "broken mapping", id="broken mapping"),
        pytest.param(({1: b"1", "1": b"2"}, 0), "equal as text", id="keys that are equal as text"),
        pytest.param(({"\udce9": b"1"}, 0), "UTF-8", id="key that UTF-8 cannot express"),
        pytest.param(({}, "3"), "a str: '3'", id="str for the step"),
        pytest.param(({}, 1.0), "a float: 1.0", id="float for the step"),
        pytest.param(({}, 2**31), "2147483648", id="step too large"),
        pytest.param(({}, -(2**31) - 1), "-2147483649", id="step too small"),
        pytest.param(({}, 10**5000), "", id="step of 5,000 digits"),
    ],
)
def test_a_result_of_the_wrong_shape_or_type_fails_only_that_request(result: Any, text: str) -> None:
    first, outcome, last = outcomes_of_batch(one_result(result), b"a", b"bad", b"c")
    assert_error(outcome, INTERNAL, text)
    assert (first, last) == (answer(b"a"), answer(b"c"))


# ---- the results are wrong as a whole ----


@pytest.mark.parametrize(
    ("spoil", "count"),
    [
        (lambda requests: [], "0"),
        (lambda requests: echo(requests)[:-1], "2"),
        (lambda requests: [*echo(requests), answer(b"one more")], "4"),
        (lambda requests: echo(requests) * 100, "300"),
    ],
    ids=["none", "too few", "too many", "far too many"],
)
def test_the_wrong_number_of_results_fails_the_whole_batch_with_both_numbers(spoil: Any, count: str) -> None:
    outcomes = outcomes_of_batch(whole_batch(spoil), b"a", b"bad", b"c")
    for outcome in outcomes:
        assert_error(outcome, INTERNAL, f"returned {count} for 3")


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        (lambda requests: None, "NoneType"),
        (lambda requests: (result for result in echo(requests)), "generator"),
        (lambda requests: "abc", "str"),
        (lambda requests: b"abc", "bytes"),
        (lambda requests: 3, "int"),
        (lambda requests: dict(enumerate(echo(requests))), "dict"),
        (lambda requests: set(requests), "set"),
        (lambda requests: ValueError("returned, not raised"), "ValueError"),
        (lambda requests: WithoutRepr(), "WithoutRepr"),
    ],
    ids=["None", "generator", "str", "bytes", "int", "dict", "set", "exception", "without repr"],
)
def test_a_return_value_that_is_not_a_list_fails_the_whole_batch_with_its_type(spoil: Any, kind: str) -> None:
    outcomes = outcomes_of_batch(whole_batch(spoil), b"a", b"bad", b"c")
    for outcome in outcomes:
        assert_error(outcome, INTERNAL, kind)


# ---- requests that are refused ----


def assert_refused_and_others_unharmed(
    refused: Callable[[MukoeBatcher], Any], check: Callable[[Any], None], **options: Any
) -> None:
    """Have something refused while a callback runs and two requests wait; those three must then be answered."""
    with Held() as held, serving(held, **options) as batcher, connect(batcher) as client:
        requests = [in_callback(held, client, b"in the callback")]
        requests += [waiting(batcher, client.send_request, data) for data in (b"waits", b"waits, too")]
        check(refused(batcher))
        assert batcher.metrics().waiting == 2
        held.release(3)
        assert [request.result() for request in requests] == [
            answer(b"in the callback"),
            answer(b"waits"),
            answer(b"waits, too"),
        ]
        assert client.send_request(b"after") == answer(b"after")
        assert held.batches == [[b"in the callback"], [b"waits", b"waits, too"], [b"after"]]


@pytest.mark.parametrize(
    ("message", "parts"),
    [
        pytest.param(DYNA_HI, ["dynamics", "'repr'", "representations"], id="wrong kind"),
        pytest.param(b"", ["no request_type"], id="empty"),
        pytest.param(b"\x1a\x04\x0a\x02hi", ["arrays", "'repr'", "representations"], id="arrays"),
        pytest.param(b"\x72\x04\x0a\x02hi", ["holds no request_type"], id="a later kind"),
        pytest.param(REPR_HI[:-1], ["5 bytes"], id="truncated"),
        pytest.param(REPR_HI[:1], ["1 bytes"], id="cut after a byte"),
        pytest.param(b"\xff" * 100, ["100 bytes"], id="no protobuf"),
        *(
            pytest.param(random.Random(seed).randbytes(10 * seed), [], id=f"random bytes {seed}")
            for seed in range(1, 6)
        ),
    ],
)
def test_a_message_that_is_not_a_request_of_this_kind_is_refused(message: bytes, parts: list[str]) -> None:
    def check(reply: Any) -> None:
        assert reply.code is INVALID_ARGUMENT
        assert reply.messages == []
        for part in parts:
            assert part in reply.details

    assert_refused_and_others_unharmed(lambda batcher: old_style_request(address_of(batcher), message), check)


def test_a_client_that_sends_the_wrong_kind_gets_invalid_argument() -> None:
    for model, wrong, right in (("repr", (b"x", 3), (b"x",)), ("dyna", (b"x",), (b"x", 3))):
        with serving(model=model) as batcher, connect(batcher) as client:
            assert_error(error_of(client.send_request, *wrong), INVALID_ARGUMENT, repr(model))
            assert client.send_request(*right) == answer(*right)
            assert batcher.metrics().requests == {"INVALID_ARGUMENT": 1, "OK": 1}


def test_a_request_with_unknown_fields_is_answered() -> None:
    # Field 15 of the inner message, and field 15 of the outer one.
    message = bytes.fromhex("0a070a0268697a0121") + bytes.fromhex("7a0121")
    with serving() as batcher:
        reply = old_style_request(address_of(batcher), message)
        assert reply.code is grpc.StatusCode.OK
        assert b"hi" in reply.messages[0]


def test_the_last_kind_that_is_set_in_a_request_counts() -> None:
    with serving() as batcher:
        assert old_style_request(address_of(batcher), REPR_HI + DYNA_HI).code is INVALID_ARGUMENT
        assert old_style_request(address_of(batcher), DYNA_HI + REPR_HI).code is grpc.StatusCode.OK


def test_another_method_of_the_server_is_unimplemented() -> None:
    with serving() as batcher, grpc.insecure_channel(address_of(batcher)) as channel:
        call = channel.stream_stream("/mukoe_batcher.MukoeService/Other")(iter((REPR_HI,)))
        with pytest.raises(grpc.RpcError):
            list(call)
        assert call.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_request_beyond_a_full_queue_is_refused_at_once() -> None:
    def send_one_more(batcher: MukoeBatcher) -> RequestError:
        with connect(batcher) as another:
            return error_of(another.send_request, b"one too many")

    assert_refused_and_others_unharmed(
        send_one_more,
        lambda error: assert_error(error, RESOURCE_EXHAUSTED, "2 requests are waiting", "max_queue_size"),
        batch_size=2,
        max_queue_size=2,
    )


def test_a_request_beyond_max_queue_bytes_is_refused_at_once() -> None:
    """The two that wait have 9 and 14 bytes. A message has 4 bytes more than its data here."""

    def send_one_more(batcher: MukoeBatcher) -> RequestError:
        assert batcher.metrics().waiting_bytes == 9 + 14
        with connect(batcher) as another:
            return error_of(another.send_request, bytes(8))

    def check(error: RequestError) -> None:
        assert_error(error, RESOURCE_EXHAUSTED, "23 bytes", "this request's 12", "limit of 34", "max_queue_bytes")

    assert_refused_and_others_unharmed(send_one_more, check, max_queue_bytes=34)


def test_requests_up_to_exactly_max_queue_bytes_may_wait() -> None:
    with Held() as held, serving(held, max_queue_bytes=24) as batcher, connect(batcher) as client:
        requests = [in_callback(held, client, bytes(8))]
        requests += [waiting(batcher, client.send_request, bytes(8)) for _ in range(2)]
        assert (batcher.metrics().waiting, batcher.metrics().waiting_bytes) == (2, 24)
        assert_error(error_of(client.send_request, b""), RESOURCE_EXHAUSTED, "max_queue_bytes")
        held.release(2)
        for request in requests:
            assert request.result() == answer(bytes(8))
        assert batcher.metrics().waiting_bytes == 0
        held.release()
        assert client.send_request(bytes(20)) == answer(bytes(20))
        assert batcher.metrics().requests == {"OK": 4, "RESOURCE_EXHAUSTED": 1}


def test_a_request_of_more_than_max_queue_bytes_is_refused_though_nothing_waits() -> None:
    with serving(max_queue_bytes=100) as batcher, connect(batcher) as client:
        assert_error(error_of(client.send_request, bytes(97)), RESOURCE_EXHAUSTED, "0 bytes", "101", "max_queue_bytes")
        assert client.send_request(bytes(96)) == answer(bytes(96))


def test_after_a_full_queue_a_client_is_served_once_there_is_room() -> None:
    with Held() as held, serving(held, batch_size=1, max_queue_size=1) as batcher, connect(batcher) as client:
        requests = [in_callback(held, client, b"in the callback"), waiting(batcher, client.send_request, b"waits")]
        for _ in range(3):
            assert_error(error_of(client.send_request, b"one too many"), RESOURCE_EXHAUSTED, "max_queue_size")
        held.release(3)
        assert [request.result() for request in requests] == [answer(b"in the callback"), answer(b"waits")]
        assert client.send_request(b"later") == answer(b"later")
        assert batcher.metrics().requests == {"OK": 3, "RESOURCE_EXHAUSTED": 3}


def test_a_stream_beyond_the_limit_is_refused_at_once() -> None:
    def open_one_more(batcher: MukoeBatcher) -> RequestError:
        with connect(batcher) as another:
            return error_of(another.send_request, b"one too many")

    assert_refused_and_others_unharmed(
        open_one_more, lambda error: assert_error(error, RESOURCE_EXHAUSTED, "3", "max_streams"), max_streams=3
    )


def test_a_stream_is_accepted_once_another_is_closed() -> None:
    with serving(max_streams=1) as batcher, connect(batcher) as second:
        with connect(batcher) as first:
            assert first.send_request(b"x") == answer(b"x")
            assert_error(error_of(second.send_request, b"y"), RESOURCE_EXHAUSTED, "max_streams")
            assert first.send_request(b"x") == answer(b"x")
        eventually(lambda: batcher.metrics().open_streams == 0)
        assert second.send_request(b"y") == answer(b"y")


def test_a_message_over_the_limit_is_refused_with_both_sizes() -> None:
    def send_too_much(batcher: MukoeBatcher) -> RequestError:
        with connect(batcher) as another:
            return error_of(another.send_request, bytes(5000))

    # 5,000 bytes of data, a tag and a length (3 bytes) around them, and once more around those.
    assert_refused_and_others_unharmed(
        send_too_much, lambda error: assert_error(error, RESOURCE_EXHAUSTED, "1000", "5006"), max_message_bytes=1000
    )


def test_a_message_of_exactly_the_limit_is_accepted() -> None:
    with serving(max_message_bytes=1000) as batcher, connect(batcher) as client:
        assert client.send_request(bytes(994)) == answer(bytes(994))
        assert_error(error_of(client.send_request, bytes(995)), RESOURCE_EXHAUSTED, "1000", "1001")
        assert client.send_request(bytes(994)) == answer(bytes(994))


def test_messages_of_20_mebibytes_pass_by_default() -> None:
    data = bytes(20 * 1024 * 1024)
    with serving() as batcher, connect(batcher) as client:
        assert client.send_request(data) == answer(data)


def test_an_answer_over_the_clients_limit_is_refused_with_both_sizes() -> None:
    def answer_by_number(requests: list[bytes]) -> Any:
        return [({"r": bytes(int(data))}, 0) for data in requests]

    with serving(answer_by_number) as batcher, connect(batcher, max_message_bytes=1000) as client:
        # The value, plus the key and the tags and lengths of four levels.
        assert client.send_request(b"%d" % 988) == ({"r": bytes(988)}, 0)
        assert_error(error_of(client.send_request, b"%d" % 5000), RESOURCE_EXHAUSTED, "1000", "5012")
        assert client.send_request(b"%d" % 988) == ({"r": bytes(988)}, 0)


# ---- callers that stop waiting ----


def by_time_limit(client: MukoeBatcherClient, address: str, timeout_s: float) -> grpc.StatusCode:
    error = error_of(client.send_request, b"late", timeout_s=timeout_s)
    assert_error(error, DEADLINE_EXCEEDED)
    return error.code()


def by_time_limit_on_a_new_stream(client: MukoeBatcherClient, address: str, timeout_s: float) -> grpc.StatusCode:
    with MukoeBatcherClient(address) as another:
        return by_time_limit(another, address, timeout_s)


def by_an_old_style_deadline(client: MukoeBatcherClient, address: str, timeout_s: float) -> grpc.StatusCode:
    reply = old_style_request(address, b"\x0a\x06\x0a\x04late", timeout_s)
    assert reply.messages == []
    return reply.code


# On a busy machine a short time limit may pass before the request is where the test wants it; then try a longer one.
TIME_LIMITS_S = (0.15, 1.5, 15)

by_every_deadline = pytest.mark.parametrize(
    "send", [by_time_limit, by_time_limit_on_a_new_stream, by_an_old_style_deadline], ids=lambda send: send.__name__
)


@by_every_deadline
def test_a_request_whose_deadline_passes_while_it_waits_never_reaches_the_callback(send: Any) -> None:
    def deadline_passed_while_waiting(timeout_s: float) -> bool:
        with Held() as held, serving(held) as batcher, connect(batcher) as client, connect(batcher) as others:
            held.release()
            assert client.send_request(b"a stream to use") == answer(b"a stream to use")
            in_front = in_callback(held, others, b"in front")
            before = waiting(batcher, others.send_request, b"before")
            late = in_background(send, client, address_of(batcher), timeout_s)
            eventually(lambda: batcher.metrics().waiting == 2 or late.done())
            waited = batcher.metrics().waiting == 2
            assert late.result() is DEADLINE_EXCEEDED
            eventually(lambda: batcher.metrics().waiting == 1)
            behind = waiting(batcher, others.send_request, b"behind")
            held.release(2)
            answers = [request.result() for request in (in_front, before, behind)]
            assert answers == [answer(b"in front"), answer(b"before"), answer(b"behind")]
            assert held.batches[1:] == [[b"in front"], [b"before", b"behind"]]
            held.release()
            assert client.send_request(b"after") == answer(b"after")
            return waited

    assert any(deadline_passed_while_waiting(timeout_s) for timeout_s in TIME_LIMITS_S)


@by_every_deadline
def test_a_deadline_that_passes_in_the_callback_does_not_affect_the_rest_of_the_batch(send: Any) -> None:
    def deadline_passed_in_the_callback(timeout_s: float) -> bool:
        with Held() as held, serving(held) as batcher, connect(batcher) as client, connect(batcher) as others:
            held.release()
            assert client.send_request(b"a stream to use") == answer(b"a stream to use")
            in_front = in_callback(held, others, b"in front")
            first = waiting(batcher, others.send_request, b"first")
            late = in_background(send, client, address_of(batcher), timeout_s)
            eventually(lambda: batcher.metrics().waiting == 2 or late.done())
            last = in_background(others.send_request, b"last")
            eventually(lambda: batcher.metrics().waiting == 3 or late.done())
            held.release()
            eventually(lambda: len(held.batches) == 3)
            assert late.result() is DEADLINE_EXCEEDED
            held.release(float("inf"))
            answers = [request.result() for request in (in_front, first, last)]
            assert answers == [answer(b"in front"), answer(b"first"), answer(b"last")]
            assert client.send_request(b"after") == answer(b"after")
            return held.batches[2] == [b"first", b"late", b"last"]

    assert any(deadline_passed_in_the_callback(timeout_s) for timeout_s in TIME_LIMITS_S)


def test_a_request_with_time_left_is_answered() -> None:
    with serving() as batcher, connect(batcher) as client:
        assert client.send_request(b"x", timeout_s=1000) == answer(b"x")
        assert old_style_request(address_of(batcher), REPR_HI, 1000).code is grpc.StatusCode.OK


def test_a_cancelled_request_never_reaches_the_callback() -> None:
    with Held() as held, serving(held) as batcher, connect(batcher) as client:
        in_front = in_callback(held, client, b"in front")
        before = waiting(batcher, client.send_request, b"before")
        with old_style_call(address_of(batcher), REPR_HI) as call:
            eventually(lambda: batcher.metrics().waiting == 2)
            behind = waiting(batcher, client.send_request, b"behind")
            call.cancel()
            eventually(lambda: batcher.metrics().waiting == 2)
        held.release(3)
        answers = [request.result() for request in (in_front, before, behind)]
        assert answers == [answer(b"in front"), answer(b"before"), answer(b"behind")]
        assert client.send_request(b"after") == answer(b"after")
        assert held.batches == [[b"in front"], [b"before", b"behind"], [b"after"]]


def test_a_request_cancelled_in_the_callback_does_not_affect_the_rest_of_the_batch() -> None:
    with Held() as held, serving(held) as batcher, connect(batcher) as client:
        in_front = in_callback(held, client, b"in front")
        first = waiting(batcher, client.send_request, b"first")
        with old_style_call(address_of(batcher), REPR_HI) as call:
            eventually(lambda: batcher.metrics().waiting == 2)
            last = waiting(batcher, client.send_request, b"last")
            held.release()
            eventually(lambda: len(held.batches) == 2)
            call.cancel()
            eventually(lambda: batcher.metrics().open_streams == 3)
        held.release(2)
        answers = [request.result() for request in (in_front, first, last)]
        assert answers == [answer(b"in front"), answer(b"first"), answer(b"last")]
        assert client.send_request(b"after") == answer(b"after")
        assert held.batches[1] == [b"first", b"hi", b"last"]


def test_closing_a_client_removes_its_waiting_requests() -> None:
    with Held() as held, serving(held) as batcher, connect(batcher) as client, connect(batcher) as leaver:
        in_front = in_callback(held, client, b"in front")
        left = [waiting(batcher, leaver.send_request, data) for data in (b"one", b"two")]
        behind = waiting(batcher, client.send_request, b"behind")
        leaver.close()
        for request in left:
            assert_error(request.exception(), grpc.StatusCode.CANCELLED)
        eventually(lambda: batcher.metrics().waiting == 1)
        held.release(2)
        assert [in_front.result(), behind.result()] == [answer(b"in front"), answer(b"behind")]
        assert held.batches == [[b"in front"], [b"behind"]]


# ---- shutting down, or no server ----


def test_during_a_shutdown_new_requests_are_refused_and_those_taken_in_are_answered() -> None:
    with (
        Held() as held,
        serving(held) as batcher,
        connect(batcher) as client,
        connect(batcher) as with_a_stream,
        connect(batcher) as without,
    ):
        held.release()
        assert with_a_stream.send_request(b"first") == answer(b"first")
        taken_in = [in_callback(held, client, b"in the callback")]
        taken_in += [waiting(batcher, client.send_request, b"waits")]
        shutdown = in_background(batcher.shutdown, grace_s=60)
        eventually(lambda: not batcher.is_server_ready())
        for refused in (with_a_stream, without, with_a_stream):
            assert_error(error_of(refused.send_request, b"too late"), UNAVAILABLE, "shutting down")
        held.release(2)
        assert [request.result() for request in taken_in] == [answer(b"in the callback"), answer(b"waits")]
        shutdown.result()
        assert held.batches == [[b"first"], [b"in the callback"], [b"waits"]]


def test_requests_left_when_the_grace_period_ends_get_unavailable(caplog: pytest.LogCaptureFixture) -> None:
    with Held() as held, serving(held) as batcher, connect(batcher) as client:
        requests = [in_callback(held, client, b"in the callback")]
        requests += [waiting(batcher, client.send_request, b"waits")]
        with caplog.at_level(logging.WARNING, logger="grpc_batcher"):
            batcher.shutdown(grace_s=0)
        for request in requests:
            assert_error(request.exception(), UNAVAILABLE, "shutting down")
        [record] = caplog.records
        assert "2 requests" in record.getMessage()
        assert held.batches == [[b"in the callback"]]


def test_a_large_answer_is_sent_completely_during_a_shutdown() -> None:
    size = 16 * 2**20  # more than gRPC sends before the other end reads
    with serving(lambda requests: [({"result": bytes(size)}, 0)]) as batcher:
        with old_style_call(address_of(batcher), MODELS["repr"].write_request({"data": b"x"})) as call:
            eventually(lambda: batcher.metrics().requests.get("OK"))
            shutdown = in_background(batcher.shutdown, grace_s=50)
            with pytest.raises(futures.TimeoutError):
                shutdown.result(0.5)
            assert len(next(call)) > size
        shutdown.result()


def test_old_style_requests_get_unavailable_during_a_shutdown() -> None:
    with Held() as held, serving(held) as batcher, connect(batcher) as client:
        request = in_callback(held, client, b"in the callback")
        shutdown = in_background(batcher.shutdown, grace_s=60)
        eventually(lambda: not batcher.is_server_ready())
        reply = old_style_request(address_of(batcher), REPR_HI)
        assert (reply.messages, reply.code) == ([], UNAVAILABLE)
        held.release()
        assert request.result() == answer(b"in the callback")
        shutdown.result()


def test_requests_get_unavailable_if_there_is_no_server() -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))  # nobody listens on this port
        with MukoeBatcherClient(f"127.0.0.1:{deaf.getsockname()[1]}") as client:
            for _ in range(3):
                assert_error(error_of(client.send_request, b"x"), UNAVAILABLE)
            assert_error(error_of(client.send_request, b"x", timeout_s=1000), UNAVAILABLE)


def test_requests_get_unavailable_after_their_server_was_shut_down() -> None:
    with serving() as batcher, connect(batcher) as client:
        assert client.send_request(b"x") == answer(b"x")
        batcher.shutdown()
        for _ in range(3):
            assert_error(error_of(client.send_request, b"x"), UNAVAILABLE)


# ---- the errors themselves ----


def test_a_request_error_is_a_grpc_error_and_can_be_pickled() -> None:
    [error] = outcomes_of_batch(raising(ValueError("the network broke")), b"bad")
    assert isinstance(error, grpc.RpcError)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is RequestError
    assert (copy.code(), copy.details()) == (error.code(), error.details())
    assert str(copy) == str(error) == f"INTERNAL: {error.details()}"
