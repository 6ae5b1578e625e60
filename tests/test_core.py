"""The waiting room with a manual clock and one thread. Each test runs on the core and on its plain Python model."""

from __future__ import annotations

import ast
import inspect
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpc_batcher import _core
from grpc_batcher._core import CLOSED, EXPIRED, FINISHED, LEFT, TAKEN, WAITING, ManualClock

import pytest
import room_model

START_NS = 1_000_000_000_000
SECOND_NS = 1_000_000_000
WINDOW_NS = 5_000_000
LONG_WINDOW_NS = 3_600 * SECOND_NS

OpenRoom = Callable[..., Any]


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(START_NS)


@pytest.fixture(params=(_core.WaitingRoom, room_model.WaitingRoom), ids=("core", "model"))
def open_room(request: pytest.FixtureRequest, clock: ManualClock) -> OpenRoom:
    def open_room(batch_size: int = 4, window_ns: int = WINDOW_NS, capacity: int = 64, **options: Any) -> Any:
        return request.param(batch_size, window_ns, capacity, clock=clock, **options)

    return open_room


def push_new(room: Any, *requests: Any) -> list[Any]:
    """Push each request as the first of a new stream."""
    return [room.open_stream().push(request) for request in requests]


def push_rows(room: Any, *rows: int, **options: Any) -> list[Any]:
    """Push a request for each number of rows, as the first of a new stream. The number is also the request itself."""
    return [room.open_stream().push(number, rows=number, **options) for number in rows]


def answer(room: Any, tickets: list[Any]) -> None:
    room.finish(tickets, [f"answer to {ticket.request}" for ticket in tickets])


def answered_streams(room: Any, clock: ManualClock, count: int) -> list[Any]:
    """Open streams and answer one request of each, all at the current time. The room must be empty."""
    streams = [room.open_stream() for _ in range(count)]
    for stream in streams:
        stream.push("first")
    clock.now_ns += room.window_ns
    while (taken := room.poll_batch()) is not None:
        answer(room, taken[1])
    return streams


def requests_of(taken: Any) -> tuple[str, list[Any]]:
    reason, tickets = taken
    return reason, [ticket.request for ticket in tickets]


def states_of(tickets: list[Any]) -> list[int]:
    return [ticket.state for ticket in tickets]


# ---- creating a room ----


def test_a_room_says_how_it_was_made(open_room: OpenRoom) -> None:
    room = open_room(batch_size=3, window_ns=7, capacity=11, capacity_bytes=13, leave_early=False)
    assert (room.batch_size, room.window_ns, room.capacity) == (3, 7, 11)
    assert (room.capacity_bytes, room.leave_early) == (13, False)


def test_a_room_has_no_limit_of_bytes_and_leaves_early_unless_told_otherwise(open_room: OpenRoom) -> None:
    room = open_room()
    assert (room.capacity_bytes, room.leave_early) == (None, True)


def test_a_new_room_is_open_and_empty(open_room: OpenRoom) -> None:
    room = open_room()
    assert (room.closed, room.pushed, room.open_streams) == (False, 0, 0)
    assert (room.waiting, room.waiting_rows, room.waiting_bytes) == (0, 0, 0)
    assert room.batches() == ({"full": 0, "everyone_in": 0, "timeout": 0, "drain": 0}, 0, 0)
    assert room.poll_batch() is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"batch_size": -3}, "batch_size is -3; it must be at least 1"),
        ({"capacity": 0}, "capacity is 0; it must be from 1 to 1073741824"),
        ({"capacity": -1}, "capacity is -1; it must be from 1 to 1073741824"),
        ({"capacity": 2**30 + 1}, "capacity is 1073741825; it must be from 1 to 1073741824"),
        ({"capacity_bytes": 0}, "capacity_bytes is 0; it must be None or from 1 to 4611686018427387904"),
        (
            {"capacity_bytes": 2**62 + 1},
            "capacity_bytes is 4611686018427387905; it must be None or from 1 to 4611686018427387904",
        ),
        ({"window_ns": -1}, "window_ns is -1; it must be from 0 to 2305843009213693951"),
        ({"window_ns": 2**61}, "window_ns is 2305843009213693952; it must be from 0 to 2305843009213693951"),
    ],
)
def test_an_impossible_size_or_window_is_refused(open_room: OpenRoom, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        open_room(**arguments)


# ---- full ----


def test_batch_size_requests_leave_as_full(open_room: OpenRoom) -> None:
    room = open_room(batch_size=3)
    push_new(room, "a", "b")
    assert room.poll_batch() is None
    push_new(room, "c")
    assert requests_of(room.poll_batch()) == ("full", ["a", "b", "c"])


def test_a_full_batch_leaves_the_younger_requests_behind(open_room: OpenRoom) -> None:
    room = open_room(batch_size=2)
    push_new(room, "a", "b", "c", "d", "e")
    assert requests_of(room.poll_batch()) == ("full", ["a", "b"])
    assert requests_of(room.poll_batch()) == ("full", ["c", "d"])
    assert room.poll_batch() is None
    assert room.waiting == 1


def test_full_counts_before_every_other_reason(open_room: OpenRoom, clock: ManualClock) -> None:
    room = open_room(batch_size=2)
    for stream in answered_streams(room, clock, 2):
        stream.push("again")
    clock.now_ns += WINDOW_NS
    room.close()
    assert requests_of(room.poll_batch()) == ("full", ["again", "again"])


# ---- everyone in ----


def test_a_lone_stream_that_was_answered_before_does_not_wait(open_room: OpenRoom, clock: ManualClock) -> None:
    room = open_room()
    (stream,) = answered_streams(room, clock, 1)
    stream.push("second")
    assert requests_of(room.poll_batch()) == ("everyone_in", ["second"])


def test_everyone_is_in_once_the_last_answered_stream_has_pushed(open_room: OpenRoom, clock: ManualClock) -> None:
    room = open_room()
    first, second, third = answered_streams(room, clock, 3)
    second.push("b")
    assert room.poll_batch() is None
    third.push("c")
    assert room.poll_batch() is None
    first.push("a")
    assert requests_of(room.poll_batch()) == ("everyone_in", ["b", "c", "a"])


def test_a_stream_that_was_never_answered_waits_for_the_window(open_room: OpenRoom, clock: ManualClock) -> None:
    room = open_room()
    push_new(room, "a")
    clock.now_ns += WINDOW_NS - 1
    assert room.poll_batch() is None
    clock.now_ns += 1
    assert requests_of(room.poll_batch()) == ("timeout", ["a"])


def test_one_first_timer_makes_the_answered_streams_wait(open_room: OpenRoom, clock: ManualClock) -> None:
    room = open_room()
    (stream,) = answered_streams(room, clock, 1)
    stream.push("again")
    push_new(room, "first")
    clock.now_ns += WINDOW_NS - 1
    assert room.poll_batch() is None
    clock.now_ns += 1
    assert requests_of(room.poll_batch()) == ("timeout", ["again", "first"])


def test_an_open_stream_that_never_pushed_is_not_waited_for(open_room: OpenRoom, clock: ManualClock) -> None:
    room = open_room()
    (stream,) = answered_streams(room, clock, 1)
    room.open_stream()
    stream.push("again")
    assert requests_of(room.poll_batch()) == ("everyone_in", ["again"])


def test_a_first_timer_in_the_callback_is_not_waited_for(open_room: OpenRoom, clock: ManualClock) -> None:
    room = open_room(batch_size=2)
    (stream,) = answered_streams(room, clock, 1)
    push_new(room, "first", "first")
    assert room.poll_batch() is not None
    stream.push("again")
    assert requests_of(room.poll_batch()) == ("everyone_in", ["again"])


def test_an_answered_stream_that_closed_is_not_waited_for(open_room: OpenRoom, clock: ManualClock) -> None:
    room = open_room()
    staying, leaving = answered_streams(room, clock, 2)
    staying.push("again")
    assert room.poll_batch() is None
    leaving.close()
    assert requests_of(room.poll_batch()) == ("everyone_in", ["again"])


def test_a_stream_is_waited_for_until_one_second_after_its_answer(open_room: OpenRoom, clock: ManualClock) -> None:
    room = open_room(window_ns=LONG_WINDOW_NS)
    busy, _idle = answered_streams(room, clock, 2)
    busy.push("again")
    clock.now_ns += SECOND_NS - 1
    assert room.poll_batch() is None
    clock.now_ns += 1
    assert requests_of(room.poll_batch()) == ("everyone_in", ["again"])


def test_each_answer_makes_a_stream_recent_again(open_room: OpenRoom, clock: ManualClock) -> None:
    room = open_room(window_ns=LONG_WINDOW_NS)
    busy, idle = answered_streams(room, clock, 2)
    clock.now_ns += SECOND_NS // 2
    busy.push("b")
    idle.push("i")
    answer(room, room.poll_batch()[1])
    clock.now_ns += SECOND_NS // 2
    busy.push("b")
    assert room.poll_batch() is None
    clock.now_ns += SECOND_NS // 2 - 1
    assert room.poll_batch() is None
    clock.now_ns += 1
    assert requests_of(room.poll_batch()) == ("everyone_in", ["b"])


def test_streams_stop_being_recent_one_by_one(open_room: OpenRoom, clock: ManualClock) -> None:
    room = open_room(window_ns=LONG_WINDOW_NS)
    streams = answered_streams(room, clock, 4)
    for stream in streams:
        stream.push("again")
    _reason, (first, second, third, fourth) = room.poll_batch()
    answer(room, [third])
    clock.now_ns += 10
    answer(room, [first])
    clock.now_ns += 10
    answer(room, [second])
    fourth_stream = streams[3]
    clock.now_ns += 10
    answer(room, [fourth])
    fourth_stream.push("mine")
    clock.now_ns += SECOND_NS - 11
    assert room.poll_batch() is None, "the second is expected for another nanosecond"
    clock.now_ns += 1
    assert requests_of(room.poll_batch()) == ("everyone_in", ["mine"])


def test_a_waiting_stream_may_have_been_answered_long_ago(open_room: OpenRoom, clock: ManualClock) -> None:
    room = open_room()
    (stream,) = answered_streams(room, clock, 1)
    clock.now_ns += 60 * SECOND_NS
    stream.push("back")
    assert requests_of(room.poll_batch()) == ("everyone_in", ["back"])


def test_an_answered_stream_whose_next_request_is_taken_is_waited_for(open_room: OpenRoom, clock: ManualClock) -> None:
    room = open_room(batch_size=2)
    first, second, third = answered_streams(room, clock, 3)
    first.push("a")
    second.push("b")
    in_callback = room.poll_batch()
    assert requests_of(in_callback) == ("full", ["a", "b"])
    third.push("c")
    assert room.poll_batch() is None
    first.close()
    assert room.poll_batch() is None
    second.close()
    assert requests_of(room.poll_batch()) == ("everyone_in", ["c"])


def test_a_stream_whose_request_expired_was_not_answered(open_room: OpenRoom, clock: ManualClock) -> None:
    room = open_room()
    stream = room.open_stream()
    expired = stream.push("late", clock.now_ns + WINDOW_NS + 1)
    clock.now_ns += WINDOW_NS
    _reason, tickets = room.poll_batch()
    clock.now_ns += 1
    assert expired.wait() == EXPIRED
    answer(room, tickets)
    stream.push("next")
    assert room.poll_batch() is None


def test_everyone_is_in_once_the_only_first_timer_leaves(open_room: OpenRoom, clock: ManualClock) -> None:
    room = open_room()
    (stream,) = answered_streams(room, clock, 1)
    stream.push("again")
    newcomer = room.open_stream()
    newcomer.push("first")
    assert room.poll_batch() is None
    newcomer.close()
    assert requests_of(room.poll_batch()) == ("everyone_in", ["again"])


def test_everyone_is_in_once_the_only_first_timer_expires(open_room: OpenRoom, clock: ManualClock) -> None:
    room = open_room()
    (stream,) = answered_streams(room, clock, 1)
    stream.push("again")
    newcomer = room.open_stream().push("first", clock.now_ns + 1)
    clock.now_ns += 1
    assert newcomer.wait() == EXPIRED
    assert requests_of(room.poll_batch()) == ("everyone_in", ["again"])


def test_a_pooled_stream_counts_until_a_batch_has_waited_a_whole_window_for_it(
    open_room: OpenRoom, clock: ManualClock
) -> None:
    room = open_room()
    streams = [room.open_stream(pooled=True) for _ in range(3)]
    for stream in streams:
        stream.push("first")
    clock.now_ns += WINDOW_NS
    answer(room, room.poll_batch()[1])
    streams[0].push("waits for the others")
    assert room.poll_batch() is None
    clock.now_ns += WINDOW_NS
    taken = room.poll_batch()
    assert requests_of(taken) == ("timeout", ["waits for the others"])
    answer(room, taken[1])
    streams[0].push("expects nobody")
    taken = room.poll_batch()
    assert requests_of(taken) == ("everyone_in", ["expects nobody"])
    answer(room, taken[1])
    streams[1].push("back")
    assert room.poll_batch() is None
    streams[0].push("expected")
    taken = room.poll_batch()
    assert requests_of(taken) == ("everyone_in", ["back", "expected"])
    answer(room, taken[1])
    streams[0].push("waits for who came back")
    assert room.poll_batch() is None


def test_a_pooled_stream_that_was_answered_during_the_window_still_counts(
    open_room: OpenRoom, clock: ManualClock
) -> None:
    room = open_room()
    streams = [room.open_stream(pooled=True) for _ in range(2)]
    streams[0].push("first")
    clock.now_ns += WINDOW_NS
    _, taken = room.poll_batch()
    streams[1].push("second")
    clock.now_ns += 1
    answer(room, taken)
    clock.now_ns += WINDOW_NS - 1
    taken = room.poll_batch()
    assert requests_of(taken) == ("timeout", ["second"])
    answer(room, taken[1])
    streams[1].push("third")
    assert room.poll_batch() is None


def test_everyone_in_counts_before_timeout_and_drain(open_room: OpenRoom, clock: ManualClock) -> None:
    room = open_room()
    (stream,) = answered_streams(room, clock, 1)
    stream.push("again")
    clock.now_ns += WINDOW_NS
    room.close()
    assert requests_of(room.poll_batch()) == ("everyone_in", ["again"])


def test_nobody_leaves_early_if_the_room_is_told_so(open_room: OpenRoom, clock: ManualClock) -> None:
    room = open_room(leave_early=False)
    for stream in answered_streams(room, clock, 2):
        stream.push("again")
    clock.now_ns += WINDOW_NS - 1
    assert not room.is_due()
    assert room.poll_batch() is None
    clock.now_ns += 1
    assert requests_of(room.poll_batch()) == ("timeout", ["again", "again"])


def test_a_full_batch_and_a_closed_room_do_not_wait_for_the_window_either(
    open_room: OpenRoom, clock: ManualClock
) -> None:
    room = open_room(batch_size=2, leave_early=False)
    streams = answered_streams(room, clock, 3)
    for stream in streams:
        stream.push("again")
    assert requests_of(room.poll_batch()) == ("full", ["again", "again"])
    assert room.poll_batch() is None
    room.close()
    assert requests_of(room.poll_batch()) == ("drain", ["again"])
    assert room.batches()[0]["everyone_in"] == 0


# ---- timeout ----


def test_the_window_starts_when_the_oldest_request_is_pushed(open_room: OpenRoom, clock: ManualClock) -> None:
    room = open_room()
    push_new(room, "a")
    clock.now_ns += WINDOW_NS - 1
    push_new(room, "b")
    assert room.poll_batch() is None
    clock.now_ns += 1
    assert requests_of(room.poll_batch()) == ("timeout", ["a", "b"])


def test_the_window_of_the_next_oldest_applies_once_the_oldest_leaves(open_room: OpenRoom, clock: ManualClock) -> None:
    room = open_room()
    oldest = room.open_stream()
    oldest.push("a")
    clock.now_ns += 3
    push_new(room, "b")
    oldest.close()
    clock.now_ns += WINDOW_NS - 1
    assert room.poll_batch() is None
    clock.now_ns += 1
    assert requests_of(room.poll_batch()) == ("timeout", ["b"])


def test_a_window_of_zero_delays_nothing(open_room: OpenRoom) -> None:
    room = open_room(window_ns=0)
    push_new(room, "a")
    assert requests_of(room.poll_batch()) == ("timeout", ["a"])


def test_the_window_keeps_running_while_a_batch_is_in_the_callback(open_room: OpenRoom, clock: ManualClock) -> None:
    room = open_room(batch_size=2)
    push_new(room, "a", "b", "c")
    _reason, tickets = room.poll_batch()
    clock.now_ns += WINDOW_NS
    answer(room, tickets)
    assert requests_of(room.poll_batch()) == ("timeout", ["c"])


def test_the_longest_window_is_kept_to_the_nanosecond(open_room: OpenRoom, clock: ManualClock) -> None:
    room = open_room(window_ns=room_model.MAX_WINDOW_NS)
    push_new(room, "a")
    clock.now_ns += room_model.MAX_WINDOW_NS - 1
    assert room.poll_batch() is None
    clock.now_ns += 1
    assert requests_of(room.poll_batch()) == ("timeout", ["a"])


def test_timeout_counts_before_drain(open_room: OpenRoom, clock: ManualClock) -> None:
    room = open_room()
    push_new(room, "a")
    clock.now_ns += WINDOW_NS
    room.close()
    assert requests_of(room.poll_batch()) == ("timeout", ["a"])


# ---- drain, and closing the room ----


def test_waiting_requests_leave_a_closed_room_at_once(open_room: OpenRoom) -> None:
    room = open_room(batch_size=3)
    push_new(room, "a", "b", "c", "d")
    room.close()
    assert requests_of(room.poll_batch()) == ("full", ["a", "b", "c"])
    assert requests_of(room.poll_batch()) == ("drain", ["d"])
    assert room.poll_batch() is None


def test_a_closed_room_refuses_requests(open_room: OpenRoom) -> None:
    room = open_room()
    stream = room.open_stream()
    room.close()
    assert room.closed
    with pytest.raises(_core.RoomClosedError, match=r"^the room is closed$"):
        stream.push("late")
    assert (room.waiting, room.pushed) == (0, 0)


def test_a_closed_room_still_accepts_answers(open_room: OpenRoom) -> None:
    room = open_room(batch_size=1)
    (ticket,) = push_new(room, "a")
    _reason, tickets = room.poll_batch()
    room.close()
    answer(room, tickets)
    assert (ticket.state, ticket.outcome) == (FINISHED, "answer to a")


def test_a_room_may_be_closed_again(open_room: OpenRoom) -> None:
    room = open_room()
    room.close()
    room.close()
    assert room.closed


# ---- the order of requests ----


def test_requests_leave_in_the_order_they_came(open_room: OpenRoom, clock: ManualClock) -> None:
    room = open_room(batch_size=3)
    push_new(room, *range(8))
    clock.now_ns += WINDOW_NS
    left = [requests_of(room.poll_batch())[1] for _ in range(3)]
    assert left == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_the_others_keep_their_order_when_some_leave(open_room: OpenRoom, clock: ManualClock) -> None:
    room = open_room(batch_size=8)
    streams = [room.open_stream() for _ in range(7)]
    for number, stream in enumerate(streams):
        stream.push(number)
    for number in (0, 3, 4, 6):
        streams[number].close()
    push_new(room, 7)
    assert room.waiting == 4
    clock.now_ns += WINDOW_NS
    assert requests_of(room.poll_batch()) == ("timeout", [1, 2, 5, 7])


# ---- rows ----


def test_a_request_has_one_row_unless_told_otherwise(open_room: OpenRoom) -> None:
    room = open_room(batch_size=3)
    single = room.open_stream().push("a")
    several = room.open_stream().push("b", None, 0, 2)
    assert (single.rows, several.rows) == (1, 2)
    assert (room.waiting, room.waiting_rows) == (2, 3)
    assert room.poll_batch() is not None
    assert (single.rows, several.rows) == (1, 2)
    assert (room.waiting, room.waiting_rows) == (0, 0)


def test_a_ticket_of_a_closed_stream_says_its_rows_though_they_count_nowhere(open_room: OpenRoom) -> None:
    room = open_room(batch_size=3)
    stream = room.open_stream()
    stream.close()
    ticket = stream.push("a", rows=2)
    assert (ticket.state, ticket.rows, room.waiting_rows) == (LEFT, 2, 0)


@pytest.mark.parametrize("rows", [-(2**63), -1, 0, 4, 2**63 - 1])
def test_a_request_has_from_one_row_to_a_full_batch(open_room: OpenRoom, rows: int) -> None:
    room = open_room(batch_size=3)
    stream = room.open_stream()
    with pytest.raises(ValueError, match=f"^rows is {rows}; it must be from 1 to 3$"):
        stream.push("a", rows=rows)
    assert (room.waiting, room.waiting_rows, room.pushed) == (0, 0, 0)
    assert stream.push("b", rows=3).state == WAITING


def test_batch_size_rows_leave_as_full(open_room: OpenRoom) -> None:
    room = open_room(batch_size=6)
    push_rows(room, 3, 1)
    assert not room.is_due()
    assert room.poll_batch() is None
    push_rows(room, 2)
    assert room.is_due()
    assert requests_of(room.poll_batch()) == ("full", [3, 1, 2])


def test_one_request_can_fill_a_batch(open_room: OpenRoom) -> None:
    room = open_room(batch_size=4)
    push_rows(room, 4)
    assert requests_of(room.poll_batch()) == ("full", [4])


def test_a_batch_leaves_as_full_if_the_next_request_does_not_fit(open_room: OpenRoom, clock: ManualClock) -> None:
    room = open_room(batch_size=4)
    push_rows(room, 1, 2)
    assert room.poll_batch() is None
    push_rows(room, 3)
    assert requests_of(room.poll_batch()) == ("full", [1, 2])
    assert room.poll_batch() is None
    assert (room.waiting, room.waiting_rows) == (1, 3)
    clock.now_ns += WINDOW_NS
    assert requests_of(room.poll_batch()) == ("timeout", [3])


def test_nothing_overtakes_a_request_that_does_not_fit(open_room: OpenRoom) -> None:
    room = open_room(batch_size=4)
    push_rows(room, 3, 2, 1, 1)
    assert requests_of(room.poll_batch()) == ("full", [3])
    assert requests_of(room.poll_batch()) == ("full", [2, 1, 1])


def test_one_push_can_make_two_batches_due(open_room: OpenRoom) -> None:
    room = open_room(batch_size=4)
    push_rows(room, 1, 4)
    assert requests_of(room.poll_batch()) == ("full", [1])
    assert requests_of(room.poll_batch()) == ("full", [4])
    assert room.poll_batch() is None


def test_the_next_request_is_not_taken_into_a_batch_that_is_exactly_full(open_room: OpenRoom) -> None:
    room = open_room(batch_size=4)
    push_rows(room, 2, 2, 1)
    assert requests_of(room.poll_batch()) == ("full", [2, 2])
    assert (room.waiting, room.waiting_rows) == (1, 1)


def test_a_batch_that_is_not_full_takes_all_requests(open_room: OpenRoom, clock: ManualClock) -> None:
    room = open_room(batch_size=8)
    push_rows(room, 3, 1, 3)
    clock.now_ns += WINDOW_NS
    assert requests_of(room.poll_batch()) == ("timeout", [3, 1, 3])
    push_rows(room, 5, 2)
    room.close()
    assert requests_of(room.poll_batch()) == ("drain", [5, 2])


def test_a_closed_room_is_drained_without_splitting_a_request(open_room: OpenRoom) -> None:
    room = open_room(batch_size=4)
    push_rows(room, 3, 3, 2)
    room.close()
    assert requests_of(room.poll_batch()) == ("full", [3])
    assert requests_of(room.poll_batch()) == ("full", [3])
    assert requests_of(room.poll_batch()) == ("drain", [2])


def test_everyone_is_in_by_requests_and_not_by_rows(open_room: OpenRoom, clock: ManualClock) -> None:
    room = open_room(batch_size=8)
    first, second = answered_streams(room, clock, 2)
    first.push("a", rows=5)
    assert room.poll_batch() is None
    second.push("b", rows=2)
    assert requests_of(room.poll_batch()) == ("everyone_in", ["a", "b"])


def test_everyone_is_in_again_once_a_full_batch_has_left_the_others(open_room: OpenRoom, clock: ManualClock) -> None:
    room = open_room(batch_size=4)
    first, second = answered_streams(room, clock, 2)
    first.push("a", rows=3)
    second.push("b", rows=2)
    assert requests_of(room.poll_batch()) == ("full", ["a"])
    assert room.poll_batch() is None, "the first was answered just now and has no request waiting"
    first.close()
    assert requests_of(room.poll_batch()) == ("everyone_in", ["b"])


def test_the_window_of_a_request_that_did_not_fit_began_with_its_push(open_room: OpenRoom, clock: ManualClock) -> None:
    room = open_room(batch_size=4)
    push_rows(room, 2)
    clock.now_ns += 3
    push_rows(room, 3)
    clock.now_ns += 5
    assert requests_of(room.poll_batch()) == ("full", [2])
    clock.now_ns += WINDOW_NS - 6
    assert room.poll_batch() is None
    clock.now_ns += 1
    assert requests_of(room.poll_batch()) == ("timeout", [3])


def test_expired_requests_give_their_rows_to_those_behind(open_room: OpenRoom, clock: ManualClock) -> None:
    room = open_room(batch_size=4)
    late = push_rows(room, 4, 2, deadline_ns=START_NS + 1)
    push_rows(room, 3)
    late += push_rows(room, 2, deadline_ns=START_NS + 1)  # would not have fitted
    push_rows(room, 1)
    clock.now_ns += 1
    assert requests_of(room.poll_batch()) == ("full", [3, 1])
    assert states_of(late) == [EXPIRED] * 3
    assert (room.waiting, room.waiting_rows) == (0, 0)


def test_a_batch_is_not_full_if_the_request_that_did_not_fit_has_expired(
    open_room: OpenRoom, clock: ManualClock
) -> None:
    room = open_room(batch_size=4)
    push_rows(room, 2)
    (late,) = push_rows(room, 3, deadline_ns=START_NS + 1)
    push_rows(room, 1)
    clock.now_ns += 1
    assert room.poll_batch() is None
    assert (late.state, room.waiting, room.waiting_rows) == (EXPIRED, 2, 3)
    push_rows(room, 1)
    assert requests_of(room.poll_batch()) == ("full", [2, 1, 1])


def test_expired_requests_behind_one_that_does_not_fit_stay_until_their_turn(
    open_room: OpenRoom, clock: ManualClock
) -> None:
    room = open_room(batch_size=4)
    push_rows(room, 3, 2)
    (behind,) = push_rows(room, 1, deadline_ns=START_NS + 1)
    clock.now_ns += 1
    assert requests_of(room.poll_batch()) == ("full", [3])
    assert (behind.state, room.waiting_rows) == (WAITING, 3)
    clock.now_ns += WINDOW_NS
    assert requests_of(room.poll_batch()) == ("timeout", [2])
    assert (behind.state, room.waiting_rows) == (EXPIRED, 0)


def test_requests_that_expire_before_one_that_does_not_fit_leave_no_gaps_behind(clock: ManualClock) -> None:
    room = _core.WaitingRoom(4, LONG_WINDOW_NS, 64, clock=clock)
    push_rows(room, 2)
    push_rows(room, 1, 1, deadline_ns=START_NS + 1)
    push_rows(room, 3, 1)
    clock.now_ns += 1
    assert requests_of(room.poll_batch()) == ("full", [2])
    assert (room.pushed - room.popped, room.waiting) == (2, 2)


def test_capacity_counts_rows(open_room: OpenRoom) -> None:
    room = open_room(batch_size=8, capacity=10)
    push_rows(room, 6)
    stream = room.open_stream()
    message = "^the queue is full: 6 rows are waiting, and this request's 5 would exceed the limit of 10$"
    with pytest.raises(_core.QueueFullError, match=message) as refused:
        stream.push("too many", rows=5)
    assert refused.type is _core.QueueFullError
    assert (room.waiting, room.waiting_rows, room.pushed) == (1, 6, 1)
    assert stream.push("as many as there is room for", rows=4).state == WAITING
    assert (room.waiting, room.waiting_rows) == (2, 10)
    with pytest.raises(_core.QueueFullError, match=r"^the queue is full: 10 rows are waiting, the most allowed$"):
        push_new(room, "one too many")
    assert room.poll_batch() is not None
    assert room.waiting_rows == 4
    push_rows(room, 6)


def test_a_request_of_several_rows_is_told_how_many_rows_of_single_ones_wait(open_room: OpenRoom) -> None:
    room = open_room(batch_size=100, capacity=3)
    push_new(room, "a", "b")
    message = "^the queue is full: 2 rows are waiting, and this request's 2 would exceed the limit of 3$"
    with pytest.raises(_core.QueueFullError, match=message):
        push_rows(room, 2)


def test_a_request_of_more_rows_than_the_capacity_is_refused_by_an_empty_room(open_room: OpenRoom) -> None:
    room = open_room(batch_size=100, capacity=3)
    message = "^the queue is full: 0 rows are waiting, and this request's 4 would exceed the limit of 3$"
    with pytest.raises(_core.QueueFullError, match=message):
        push_rows(room, 4)
    push_rows(room, 3)


def test_batches_counts_requests_and_rows(open_room: OpenRoom, clock: ManualClock) -> None:
    room = open_room(batch_size=4)
    push_rows(room, 3, 2, 1)
    assert room.poll_batch() is not None
    assert room.batches() == ({"full": 1, "everyone_in": 0, "timeout": 0, "drain": 0}, 1, 3)
    clock.now_ns += WINDOW_NS
    assert room.poll_batch() is not None
    assert room.batches() == ({"full": 1, "everyone_in": 0, "timeout": 1, "drain": 0}, 3, 6)


# ---- asking without taking ----


def test_a_room_says_whether_a_batch_is_due_and_keeps_it(open_room: OpenRoom, clock: ManualClock) -> None:
    room = open_room()
    assert not room.is_due()
    push_new(room, "a")
    clock.now_ns += WINDOW_NS - 1
    assert not room.is_due()
    clock.now_ns += 1
    assert room.is_due()
    assert room.is_due()
    assert room.batches()[1] == 0
    assert requests_of(room.poll_batch()) == ("timeout", ["a"])
    assert not room.is_due()


# ---- capacity ----


@pytest.mark.parametrize("capacity", [1, 2, 3, 4, 5, 8, 13])
def test_no_more_than_capacity_requests_may_wait(open_room: OpenRoom, capacity: int) -> None:
    room = open_room(batch_size=100, capacity=capacity)
    push_new(room, *range(capacity))
    message = f"^the queue is full: {capacity} requests are waiting, the most allowed$"
    with pytest.raises(_core.QueueFullError, match=message):
        room.open_stream().push("one too many")
    assert (room.waiting, room.pushed) == (capacity, capacity)


def test_a_refused_request_does_not_keep_its_stream_busy(open_room: OpenRoom) -> None:
    room = open_room(batch_size=1, capacity=1)
    push_new(room, "a")
    stream = room.open_stream()
    with pytest.raises(_core.QueueFullError):
        stream.push("b")
    assert room.poll_batch() is not None
    assert stream.push("b").state == WAITING


def test_taking_a_batch_frees_places(open_room: OpenRoom) -> None:
    room = open_room(batch_size=2, capacity=3)
    push_new(room, "a", "b", "c")
    assert room.poll_batch() is not None
    push_new(room, "d", "e")
    with pytest.raises(_core.QueueFullError):
        push_new(room, "f")


@pytest.mark.parametrize("capacity", [2, 3, 4, 5, 8])
def test_requests_that_leave_free_their_places_even_behind_an_old_one(
    open_room: OpenRoom, clock: ManualClock, capacity: int
) -> None:
    room = open_room(batch_size=100, capacity=capacity)
    push_new(room, "oldest")
    for lap in range(5 * capacity):
        streams = [room.open_stream() for _ in range(capacity - 1)]
        for stream in streams:
            stream.push(lap)
        with pytest.raises(_core.QueueFullError):
            push_new(room, "one too many")
        for stream in streams:
            stream.close()
    push_new(room, "youngest")
    clock.now_ns += WINDOW_NS
    assert requests_of(room.poll_batch()) == ("timeout", ["oldest", "youngest"])


def test_the_order_holds_while_requests_leave_from_the_middle(open_room: OpenRoom, clock: ManualClock) -> None:
    room = open_room(batch_size=100, capacity=4)
    waiting = {number: room.open_stream() for number in range(4)}
    for number, stream in waiting.items():
        stream.push(number)
    for number in range(4, 60):
        # Now one from the middle leaves, now the oldest, now the youngest.
        leaver = sorted(waiting)[(1, 2, 0, 3, 1)[number % 5]]
        waiting.pop(leaver).close()
        waiting[number] = room.open_stream()
        waiting[number].push(number)
        assert room.waiting == 4
    clock.now_ns += WINDOW_NS
    assert requests_of(room.poll_batch()) == ("timeout", sorted(waiting))
    assert room.pushed == 60


def test_a_ticket_that_was_moved_over_gaps_can_still_leave(open_room: OpenRoom, clock: ManualClock) -> None:
    room = open_room(batch_size=100, capacity=4)
    streams = [room.open_stream() for _ in range(4)]
    tickets = [stream.push(number) for number, stream in enumerate(streams)]
    streams[1].close()
    streams[2].close()
    late = push_new(room, 4)[0]
    streams[0].close()
    assert states_of(tickets) == [LEFT, LEFT, LEFT, WAITING]
    clock.now_ns += WINDOW_NS
    assert requests_of(room.poll_batch()) == ("timeout", [3, 4])
    assert states_of([tickets[3], late]) == [TAKEN, TAKEN]


@pytest.mark.parametrize("capacity", [7, 8, 9, 64, 100])
def test_replacing_requests_of_a_full_queue_seldom_moves_the_others(clock: ManualClock, capacity: int) -> None:
    room = _core.WaitingRoom(100, LONG_WINDOW_NS, capacity, clock=clock)
    streams = [room.open_stream() for _ in range(capacity)]
    for number, stream in enumerate(streams):
        stream.push(number)
    # The oldest request stays, so `popped` grows only when the requests are moved over the gaps behind it.
    moved = 0
    for lap in range(20):
        for place in range(1, capacity):
            before = room.popped
            streams[place].close()
            streams[place] = room.open_stream()
            streams[place].push((lap, place))
            moved += room.popped != before
    assert room.waiting == capacity
    # 20 laps replace each of the other requests 20 times: they were moved at most once per lap.
    assert moved <= 20


# ---- the bytes that wait ----


def test_the_bytes_of_waiting_requests_are_added_up(open_room: OpenRoom) -> None:
    room = open_room(batch_size=3)
    for size_bytes in (5, 0, 7):
        room.open_stream().push("a", None, size_bytes)
    room.open_stream().push("b", size_bytes=11)
    assert room.waiting_bytes == 23
    assert room.poll_batch() is not None
    assert room.waiting_bytes == 11


def test_requests_may_wait_up_to_the_limit_of_bytes(open_room: OpenRoom) -> None:
    room = open_room(capacity_bytes=1000)
    room.open_stream().push("a", None, 900)
    message = "^the queue is full: 900 bytes are waiting, and this request's 101 would exceed the limit of 1000$"
    with pytest.raises(_core.QueueBytesFullError, match=message):
        room.open_stream().push("b", None, 101)
    with pytest.raises(_core.QueueBytesFullError):
        room.open_stream().push("b", None, 2**63 - 1)
    assert (room.waiting, room.waiting_bytes, room.pushed) == (1, 900, 1)
    room.open_stream().push("c", None, 100)
    assert (room.waiting, room.waiting_bytes) == (2, 1000)
    room.open_stream().push("without bytes")
    assert room.waiting == 3


def test_a_request_larger_than_the_limit_of_bytes_is_refused_by_an_empty_room(open_room: OpenRoom) -> None:
    room = open_room(capacity_bytes=1000)
    message = "^the queue is full: 0 bytes are waiting, and this request's 1001 would exceed the limit of 1000$"
    with pytest.raises(_core.QueueBytesFullError, match=message):
        room.open_stream().push("a", None, 1001)
    assert (room.waiting, room.waiting_bytes) == (0, 0)


def test_a_request_refused_for_its_bytes_does_not_keep_its_stream_busy(open_room: OpenRoom) -> None:
    room = open_room(capacity_bytes=10)
    stream = room.open_stream()
    with pytest.raises(_core.QueueFullError):
        stream.push("a", None, 11)
    assert stream.push("b", None, 10).state == WAITING


def test_a_full_queue_says_first_that_it_has_too_many_requests(open_room: OpenRoom) -> None:
    room = open_room(capacity=1, capacity_bytes=10)
    room.open_stream().push("a", None, 10)
    with pytest.raises(_core.QueueFullError, match="1 requests are waiting") as refused:
        room.open_stream().push("b", None, 10)
    assert refused.type is _core.QueueFullError


def test_a_negative_size_is_refused(open_room: OpenRoom) -> None:
    room = open_room()
    stream = room.open_stream()
    with pytest.raises(ValueError, match=r"^size_bytes is -1; it must be at least 0$"):
        stream.push("a", None, -1)
    assert stream.push("b").state == WAITING
    assert room.waiting_bytes == 0


def take_both(room: Any, streams: list[Any], tickets: list[Any], clock: ManualClock) -> None:
    clock.now_ns += WINDOW_NS
    assert requests_of(room.poll_batch()) == ("timeout", [0, 1])


def let_both_leave(room: Any, streams: list[Any], tickets: list[Any], clock: ManualClock) -> None:
    for stream in streams:
        stream.close()


def let_both_expire(room: Any, streams: list[Any], tickets: list[Any], clock: ManualClock) -> None:
    clock.now_ns += 2 * WINDOW_NS
    assert [ticket.wait() for ticket in tickets] == [EXPIRED, EXPIRED]


def drop_both_expired(room: Any, streams: list[Any], tickets: list[Any], clock: ManualClock) -> None:
    clock.now_ns += 2 * WINDOW_NS
    assert room.poll_batch() is None


@pytest.mark.parametrize("end", [take_both, let_both_leave, let_both_expire, drop_both_expired])
def test_a_request_frees_its_bytes_and_rows_however_it_stops_waiting(
    open_room: OpenRoom, clock: ManualClock, end: Callable[..., None]
) -> None:
    room = open_room(batch_size=8, capacity=6, capacity_bytes=10)
    streams = [room.open_stream() for _ in range(2)]
    tickets = [stream.push(number, clock.now_ns + 2 * WINDOW_NS, 5, 3) for number, stream in enumerate(streams)]
    assert (room.waiting_rows, room.waiting_bytes) == (6, 10)
    end(room, streams, tickets, clock)
    assert (room.waiting_rows, room.waiting_bytes) == (0, 0)
    assert room.open_stream().push("next", None, 10, 6).state == WAITING


def test_an_abandoned_room_has_no_bytes_or_rows_waiting(open_room: OpenRoom) -> None:
    room = open_room(capacity_bytes=10)
    room.open_stream().push("a", None, 10, 3)
    room.abandon()
    assert (room.waiting_rows, room.waiting_bytes) == (0, 0)


# ---- a stream has one request at a time ----

BUSY = "^this stream's last request has not ended; a stream has one request at a time$"


def test_a_stream_whose_request_waits_may_not_push_another(open_room: OpenRoom) -> None:
    room = open_room()
    stream = room.open_stream()
    stream.push("a")
    with pytest.raises(RuntimeError, match=BUSY):
        stream.push("b")
    assert (room.waiting, room.pushed) == (1, 1)


def test_a_stream_whose_request_is_taken_may_not_push_another(open_room: OpenRoom) -> None:
    room = open_room(batch_size=1)
    stream = room.open_stream()
    stream.push("a")
    _reason, tickets = room.poll_batch()
    with pytest.raises(RuntimeError, match=BUSY):
        stream.push("b")
    answer(room, tickets)
    assert stream.push("b").state == WAITING


# ---- outcomes ----


def test_each_ticket_gets_its_own_outcome(open_room: OpenRoom) -> None:
    room = open_room(batch_size=3)
    pushed = push_new(room, "a", "b", "c")
    _reason, tickets = room.poll_batch()
    assert tickets == pushed
    assert [ticket.outcome for ticket in pushed] == [None, None, None]
    outcomes = [object(), None, ValueError("no")]
    room.finish(tickets, outcomes)
    assert states_of(pushed) == [FINISHED] * 3
    assert all(ticket.outcome is outcome for ticket, outcome in zip(pushed, outcomes, strict=True))
    assert [ticket.wait() for ticket in pushed] == [FINISHED] * 3


def test_a_ticket_keeps_the_request_itself(open_room: OpenRoom) -> None:
    request = object()
    room = open_room(batch_size=1)
    (ticket,) = push_new(room, request)
    assert ticket.request is request
    assert room.poll_batch()[1][0].request is request


def test_a_ticket_knows_the_owner_of_its_stream(open_room: OpenRoom) -> None:
    owner = object()
    room = open_room()
    assert room.open_stream(owner).push("a").owner is owner
    assert room.open_stream().push("b").owner is None


def test_a_ticket_says_when_it_was_pushed_and_taken(open_room: OpenRoom, clock: ManualClock) -> None:
    room = open_room()
    clock.now_ns += 17
    (ticket,) = push_new(room, "a")
    assert (ticket.pushed_ns, ticket.taken_ns) == (START_NS + 17, 0)
    clock.now_ns += WINDOW_NS
    assert room.poll_batch() is not None
    assert (ticket.pushed_ns, ticket.taken_ns) == (START_NS + 17, START_NS + 17 + WINDOW_NS)


def test_a_batch_may_be_finished_in_parts_and_in_any_order(open_room: OpenRoom) -> None:
    room = open_room(batch_size=3)
    tickets = push_new(room, "a", "b", "c")
    assert room.poll_batch() is not None
    answer(room, [tickets[2], tickets[0]])
    assert states_of(tickets) == [FINISHED, TAKEN, FINISHED]
    answer(room, [])
    answer(room, [tickets[1]])
    assert [ticket.outcome for ticket in tickets] == ["answer to a", "answer to b", "answer to c"]


def test_tickets_of_several_batches_may_be_finished_together(open_room: OpenRoom) -> None:
    room = open_room(batch_size=2)
    tickets = push_new(room, "a", "b", "c", "d")
    assert room.poll_batch() is not None
    assert room.poll_batch() is not None
    answer(room, tickets)
    assert states_of(tickets) == [FINISHED] * 4


def test_a_finished_ticket_keeps_its_first_outcome(open_room: OpenRoom) -> None:
    room = open_room(batch_size=1)
    (ticket,) = push_new(room, "a")
    assert room.poll_batch() is not None
    room.finish([ticket], ["first"])
    room.finish([ticket], ["second"])
    assert (ticket.state, ticket.outcome) == (FINISHED, "first")


def test_finishing_a_finished_ticket_again_does_not_touch_its_streams_next_request(
    open_room: OpenRoom, clock: ManualClock
) -> None:
    room = open_room(batch_size=1)
    stream = room.open_stream()
    first = stream.push("a")
    assert room.poll_batch() is not None
    answer(room, [first])
    clock.now_ns += SECOND_NS
    second = stream.push("b")
    answer(room, [first])
    assert second.state == WAITING
    assert requests_of(room.poll_batch()) == ("full", ["b"])
    answer(room, [first])
    assert second.state == TAKEN


def test_a_ticket_that_is_listed_twice_is_finished_once(open_room: OpenRoom) -> None:
    room = open_room(batch_size=1)
    stream = room.open_stream()
    ticket = stream.push("a")
    assert room.poll_batch() is not None
    room.finish([ticket, ticket], ["x", "y"])
    assert ticket.state == FINISHED
    assert ticket.outcome in ("x", "y")
    stream.push("b")
    assert requests_of(room.poll_batch()) == ("full", ["b"])


def test_a_ticket_that_still_waits_cannot_be_finished(open_room: OpenRoom) -> None:
    room = open_room(batch_size=2)
    (ticket,) = push_new(room, "a")
    answer(room, [ticket])
    assert ticket.state == WAITING
    push_new(room, "b")
    assert requests_of(room.poll_batch()) == ("full", ["a", "b"])


def test_a_wrong_number_of_outcomes_finishes_nothing(open_room: OpenRoom) -> None:
    room = open_room(batch_size=2)
    tickets = push_new(room, "a", "b")
    assert room.poll_batch() is not None
    for outcomes in ([], ["x"], ["x", "y", "z"]):
        message = f"^{len(outcomes)} outcomes for 2 tickets; there must be one for each ticket$"
        with pytest.raises(ValueError, match=message):
            room.finish(tickets, outcomes)
    assert states_of(tickets) == [TAKEN, TAKEN]
    answer(room, tickets)
    assert states_of(tickets) == [FINISHED, FINISHED]


def test_a_ticket_of_another_room_finishes_nothing(open_room: OpenRoom) -> None:
    room, other = open_room(batch_size=1), open_room(batch_size=1)
    tickets = [*push_new(room, "a"), *push_new(other, "b")]
    assert room.poll_batch() is not None
    assert other.poll_batch() is not None
    with pytest.raises(ValueError, match=r"^one of the tickets belongs to another room$"):
        room.finish(tickets, ["x", "y"])
    assert states_of(tickets) == [TAKEN, TAKEN]


# ---- deadlines ----


def test_a_request_may_be_taken_until_its_deadline(open_room: OpenRoom, clock: ManualClock) -> None:
    room = open_room()
    ticket = room.open_stream().push("a", START_NS + WINDOW_NS + 1)
    clock.now_ns += WINDOW_NS
    assert requests_of(room.poll_batch()) == ("timeout", ["a"])
    assert ticket.state == TAKEN


def test_a_request_is_not_taken_at_its_deadline(open_room: OpenRoom, clock: ManualClock) -> None:
    room = open_room()
    ticket = room.open_stream().push("a", START_NS + WINDOW_NS)
    clock.now_ns += WINDOW_NS
    assert room.poll_batch() is None
    assert ticket.state == EXPIRED
    assert (room.waiting, room.pushed) == (0, 1)
    assert room.batches()[1] == 0


def test_a_request_whose_deadline_passed_before_the_push_is_never_taken(open_room: OpenRoom) -> None:
    room = open_room(window_ns=0)
    tickets = [room.open_stream().push("a", START_NS), room.open_stream().push("b", -1)]
    assert room.poll_batch() is None
    assert states_of(tickets) == [EXPIRED, EXPIRED]


def test_expired_requests_give_their_places_in_a_batch_to_those_behind(open_room: OpenRoom, clock: ManualClock) -> None:
    room = open_room(batch_size=3)
    for number in range(7):
        room.open_stream().push(number, START_NS + 1 if number in (0, 2, 3) else None)
    clock.now_ns += 1
    assert requests_of(room.poll_batch()) == ("full", [1, 4, 5])
    assert room.waiting == 1


def test_a_batch_is_not_full_if_some_of_its_requests_have_expired(open_room: OpenRoom, clock: ManualClock) -> None:
    room = open_room(batch_size=3)
    push_new(room, "a")
    room.open_stream().push("late", START_NS + 1)
    push_new(room, "b")
    clock.now_ns += 1
    assert room.poll_batch() is None
    assert (room.waiting, room.batches()[1]) == (2, 0)
    clock.now_ns = START_NS + WINDOW_NS
    assert requests_of(room.poll_batch()) == ("timeout", ["a", "b"])


def test_the_reason_is_that_of_the_requests_that_have_not_expired(open_room: OpenRoom, clock: ManualClock) -> None:
    room = open_room(batch_size=3)
    push_new(room, "a")
    room.open_stream().push("late", START_NS + 1)
    push_new(room, "b")
    clock.now_ns += WINDOW_NS
    assert requests_of(room.poll_batch()) == ("timeout", ["a", "b"])
    assert room.batches() == ({"full": 0, "everyone_in": 0, "timeout": 1, "drain": 0}, 2, 2)


def test_an_expired_request_does_not_end_the_window_of_a_younger_one(open_room: OpenRoom, clock: ManualClock) -> None:
    room = open_room()
    late = room.open_stream().push("late", START_NS + WINDOW_NS)
    clock.now_ns += 3
    push_new(room, "young")
    clock.now_ns = START_NS + WINDOW_NS
    assert room.poll_batch() is None
    assert late.state == EXPIRED
    clock.now_ns += 2
    assert room.poll_batch() is None
    clock.now_ns += 1
    assert requests_of(room.poll_batch()) == ("timeout", ["young"])


def test_everyone_is_not_in_if_the_request_of_one_has_expired(open_room: OpenRoom, clock: ManualClock) -> None:
    room = open_room()
    first, second = answered_streams(room, clock, 2)
    pushed_ns = clock.now_ns
    first.push("a")
    second.push("late", pushed_ns + 1)
    clock.now_ns += 1
    assert room.poll_batch() is None
    second.push("again")
    assert requests_of(room.poll_batch()) == ("everyone_in", ["a", "again"])


def test_everyone_is_in_if_the_request_that_filled_the_batch_has_expired(
    open_room: OpenRoom, clock: ManualClock
) -> None:
    room = open_room(batch_size=2)
    (stream,) = answered_streams(room, clock, 1)
    stream.push("again")
    room.open_stream().push("late", clock.now_ns + 1)
    clock.now_ns += 1
    assert requests_of(room.poll_batch()) == ("everyone_in", ["again"])


def test_expired_requests_behind_a_full_batch_stay_until_their_turn(open_room: OpenRoom, clock: ManualClock) -> None:
    room = open_room(batch_size=2)
    push_new(room, "a", "b")
    behind = room.open_stream().push("late", START_NS + 1)
    clock.now_ns += 1
    assert requests_of(room.poll_batch()) == ("full", ["a", "b"])
    assert (behind.state, room.waiting) == (WAITING, 1)
    clock.now_ns += WINDOW_NS
    assert room.poll_batch() is None
    assert (behind.state, room.waiting) == (EXPIRED, 0)


def test_requests_that_expire_in_the_middle_leave_no_gaps_behind(clock: ManualClock) -> None:
    room = _core.WaitingRoom(5, LONG_WINDOW_NS, 64, clock=clock)
    push_new(room, "oldest")
    for _ in range(3):
        room.open_stream().push("late", clock.now_ns + 1)
    push_new(room, "youngest")
    clock.now_ns += 1
    assert room.poll_batch() is None
    assert (room.pushed - room.popped, room.waiting) == (2, 2)


def test_a_waiting_request_ends_at_its_deadline(open_room: OpenRoom, clock: ManualClock) -> None:
    room = open_room(batch_size=2)
    stream = room.open_stream()
    ticket = stream.push("a", START_NS + 1)
    clock.now_ns += 1
    assert ticket.wait() == EXPIRED
    assert (ticket.state, room.waiting) == (EXPIRED, 0)
    assert stream.push("b").state == WAITING
    push_new(room, "c")
    assert requests_of(room.poll_batch()) == ("full", ["b", "c"])


def test_a_taken_request_ends_at_its_deadline_and_its_outcome_is_dropped(
    open_room: OpenRoom, clock: ManualClock
) -> None:
    room = open_room(batch_size=2)
    late = room.open_stream().push("late", START_NS + 1)
    (patient,) = push_new(room, "patient")
    _reason, tickets = room.poll_batch()
    clock.now_ns += 1
    assert late.wait() == EXPIRED
    answer(room, tickets)
    assert states_of([late, patient]) == [EXPIRED, FINISHED]
    assert patient.outcome == "answer to patient"


def test_a_stream_may_push_again_while_its_expired_request_is_in_the_callback(
    open_room: OpenRoom, clock: ManualClock
) -> None:
    room = open_room(batch_size=1)
    stream = room.open_stream()
    late = stream.push("late", START_NS + 1)
    _reason, tickets = room.poll_batch()
    clock.now_ns += 1
    assert late.wait() == EXPIRED
    next_one = stream.push("next")
    answer(room, tickets)
    assert states_of([late, next_one]) == [EXPIRED, WAITING]
    assert requests_of(room.poll_batch()) == ("full", ["next"])
    answer(room, [next_one])
    assert next_one.outcome == "answer to next"


def test_an_answer_at_the_deadline_counts_if_nobody_gave_up_first(open_room: OpenRoom, clock: ManualClock) -> None:
    room = open_room(batch_size=1)
    ticket = room.open_stream().push("a", START_NS + 1)
    _reason, tickets = room.poll_batch()
    clock.now_ns += 1
    answer(room, tickets)
    assert ticket.wait() == FINISHED


# ---- callers that leave ----


def test_a_waiting_request_leaves_with_its_stream(open_room: OpenRoom) -> None:
    room = open_room(batch_size=2)
    stream = room.open_stream()
    ticket = stream.push("gone")
    stream.close()
    assert (ticket.wait(), ticket.state, room.waiting) == (LEFT, LEFT, 0)
    push_new(room, "a", "b")
    assert requests_of(room.poll_batch()) == ("full", ["a", "b"])
    assert ticket.taken_ns == 0


def test_a_taken_request_leaves_with_its_stream_and_its_outcome_is_dropped(open_room: OpenRoom) -> None:
    room = open_room(batch_size=2)
    stream = room.open_stream()
    gone = stream.push("gone")
    (stays,) = push_new(room, "stays")
    _reason, tickets = room.poll_batch()
    stream.close()
    assert gone.wait() == LEFT
    answer(room, tickets)
    assert states_of([gone, stays]) == [LEFT, FINISHED]


def test_a_finished_request_stays_finished_when_its_stream_closes(open_room: OpenRoom) -> None:
    room = open_room(batch_size=1)
    stream = room.open_stream()
    ticket = stream.push("a")
    answer(room, room.poll_batch()[1])
    stream.close()
    assert (ticket.state, ticket.outcome) == (FINISHED, "answer to a")


def test_a_request_pushed_on_a_closed_stream_has_left(open_room: OpenRoom) -> None:
    room = open_room(window_ns=0)
    stream = room.open_stream()
    stream.close()
    ticket = stream.push("a")
    assert (ticket.wait(), ticket.request) == (LEFT, "a")
    assert (room.waiting, room.pushed, room.poll_batch()) == (0, 0, None)


def test_a_stream_may_be_closed_again(open_room: OpenRoom) -> None:
    room = open_room()
    stream = room.open_stream()
    ticket = stream.push("a")
    stream.close()
    stream.close()
    assert (ticket.state, room.open_streams) == (LEFT, 0)


def test_open_streams_counts_the_streams_that_are_not_closed(open_room: OpenRoom) -> None:
    room = open_room()
    streams = [room.open_stream() for _ in range(3)]
    assert room.open_streams == 3
    streams[1].close()
    assert room.open_streams == 2


# ---- abandon ----


def test_requests_that_have_not_ended_are_closed_when_the_room_is_abandoned(open_room: OpenRoom) -> None:
    room = open_room(batch_size=2)
    tickets = push_new(room, "finished", "left", "taken", "taken, too", "waiting")
    answer(room, room.poll_batch()[1])
    _reason, taken = room.poll_batch()
    assert room.abandon() == 3
    assert states_of(tickets) == [FINISHED, FINISHED, CLOSED, CLOSED, CLOSED]
    assert [ticket.wait() for ticket in tickets[2:]] == [CLOSED] * 3
    assert (room.closed, room.waiting, room.open_streams) == (True, 0, 0)
    answer(room, taken)
    assert states_of(taken) == [CLOSED, CLOSED]
    assert room.poll_batch() is None


def test_a_room_may_be_abandoned_again(open_room: OpenRoom) -> None:
    room = open_room()
    push_new(room, "a")
    assert room.abandon() == 1
    assert room.abandon() == 0


def test_an_abandoned_room_refuses_requests_as_a_closed_one_does(open_room: OpenRoom) -> None:
    room = open_room()
    stream = room.open_stream()
    room.abandon()
    with pytest.raises(_core.RoomClosedError, match=r"^the room is closed$"):
        stream.push("late")


# ---- the counters ----


def test_batches_are_counted_by_reason(open_room: OpenRoom, clock: ManualClock) -> None:
    room = open_room(batch_size=2)
    streams = [room.open_stream() for _ in range(5)]
    for stream in streams:
        stream.push("first")
    clock.now_ns += WINDOW_NS
    while (taken := room.poll_batch()) is not None:
        answer(room, taken[1])
    assert room.batches() == ({"full": 2, "everyone_in": 0, "timeout": 1, "drain": 0}, 5, 5)
    for stream in streams[1:]:
        stream.close()
    streams[0].push("second")
    assert room.poll_batch() is not None
    assert room.batches() == ({"full": 2, "everyone_in": 1, "timeout": 1, "drain": 0}, 6, 6)
    push_new(room, "third")
    room.close()
    assert room.poll_batch() is not None
    assert room.batches() == ({"full": 2, "everyone_in": 1, "timeout": 1, "drain": 1}, 7, 7)


def test_changing_the_returned_counters_changes_nothing(open_room: OpenRoom) -> None:
    room = open_room()
    room.batches()[0]["full"] = 5
    assert room.batches()[0]["full"] == 0


# ---- misuse raises an error and never crashes ----

_MISUSE_HEAD = """
clock = _core.ManualClock(1)
def room(batch_size=1, window_ns=5, capacity=4, clock=clock, **options):
    return _core.WaitingRoom(batch_size, window_ns, capacity, clock=clock, **options)
def taken(in_room):
    in_room.open_stream().push("a")
    return in_room.poll_batch()[1]
try:
    {code}
except Exception as error:
    print(type(error).__name__)
else:
    print("nothing was raised")
"""


@pytest.mark.parametrize(
    ("code", "errors"),
    [
        # Tickets, streams and rooms that nothing created properly.
        ("_core.Ticket().state", "TypeError"),
        ("_core.Ticket().wait()", "TypeError"),
        ("_core.Ticket().owner", "TypeError"),
        ("_core.Ticket.__new__(_core.Ticket).wait()", "TypeError"),
        ("_core.Stream.__new__(_core.Stream).close()", "TypeError"),
        ("_core.Stream().push('a')", "TypeError"),
        ("_core.Stream().close()", "TypeError"),
        ("_core.WaitingRoom.__new__(_core.WaitingRoom).open_stream()", "AttributeError TypeError"),
        ("_core.WaitingRoom.__new__(_core.WaitingRoom).abandon()", "TypeError"),
        ("_core.WaitingRoom.__new__(_core.WaitingRoom).open_streams", "TypeError"),
        ("room().__init__(1, 5, 4)", "RuntimeError"),
        ("type('Mine', (_core.Ticket,), {})", "TypeError"),
        ("__import__('copy').copy(taken(room())[0])", "TypeError"),
        ("__import__('pickle').dumps(taken(room())[0])", "TypeError"),
        # Anything but tickets of this room.
        ("room().finish([None], ['x'])", "TypeError ValueError"),
        ("room().finish([_core.Ticket()], ['x'])", "TypeError ValueError"),
        ("room().finish(['a'], ['x'])", "TypeError"),
        ("room().finish(taken(room()), ['x'])", "ValueError"),
        ("room().finish(None, None)", "TypeError"),
        ("r = room(); r.finish(taken(r), [])", "ValueError"),
        # Numbers that a room cannot have.
        ("room(batch_size=2**63)", "OverflowError ValueError"),
        ("room(batch_size='many')", "TypeError"),
        ("room(window_ns=2**63)", "OverflowError ValueError"),
        ("room(window_ns=float('nan'))", "ValueError"),
        ("r = room(capacity=2**61, batch_size=2**61); [r.open_stream().push(i) for i in range(100_000)]", "ValueError"),
        ("room(capacity=2**62 + 1)", "ValueError"),
        ("room(capacity=2**64)", "ValueError"),
        ("room(capacity_bytes=2**63)", "OverflowError ValueError"),
        ("room(capacity_bytes='many')", "TypeError"),
        ("room(clock=12)", "TypeError"),
        ("_core.WaitingRoom(1, 5, 4, clock)", "TypeError"),
        ("room().open_stream().push('a', 2**63)", "OverflowError ValueError"),
        ("room().open_stream().push('a', 'soon')", "TypeError"),
        ("room().open_stream().push('a', None, 2**63)", "OverflowError ValueError"),
        ("room().open_stream().push('a', None, 'large')", "TypeError"),
        ("room().open_stream().push('a', rows=2**63)", "OverflowError ValueError"),
        ("room().open_stream().push('a', rows='many')", "TypeError"),
        ("room().open_stream().push('a', rows=None)", "TypeError"),
        ("room(batch_size=2**63 - 1).open_stream().push('a', rows=2**63 - 1)", "QueueFullError"),
    ],
)  # fmt: skip
def test_misuse_raises_and_does_not_crash(core_command: Callable[[str], list[str]], code: str, errors: str) -> None:
    script = _MISUSE_HEAD.format(code=code)
    process = subprocess.run(core_command(script), capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() in errors.split()


def test_a_room_that_was_never_initialised_does_not_crash(
    core_command: Callable[[str], list[str]],
) -> None:
    script = """
room = _core.WaitingRoom.__new__(_core.WaitingRoom)
print(room.waiting, room.waiting_rows, room.waiting_bytes, room.pushed, room.popped, room.takers)
print(room.closed, room.poll_batch(), room.is_due())
room.finish([], [])
room.close()
print(room.take_batch())
"""
    process = subprocess.run(core_command(script), capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines() == ["0 0 0 0 0 0", "False None False", "None"]


def test_a_taken_batch_that_is_thrown_away_does_not_affect_others(core_command: Callable[[str], list[str]]) -> None:
    script = """
room = _core.WaitingRoom(1, 5, 4)
first, second = room.open_stream(), room.open_stream()
first.push("thrown away")
room.poll_batch()
ticket = second.push("another")
first.close()
print(ticket.state == _core.WAITING, room.waiting, room.poll_batch()[1][0] is ticket)
"""
    process = subprocess.run(core_command(script), capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == ["True", "1", "True"]


# ---- the stub ----


def test_the_stub_documents_every_class_and_method_as_the_core_does() -> None:
    stub = ast.parse(Path(_core.__file__).with_name("_core.pyi").read_text())
    for kind in [node for node in stub.body if isinstance(node, ast.ClassDef)]:
        members = [node for node in kind.body if isinstance(node, ast.FunctionDef) and node.name != "__init__"]
        documented = [(kind, getattr(_core, kind.name))]
        documented += [(node, getattr(getattr(_core, kind.name), node.name)) for node in members]
        for node, found in documented:
            text = ast.get_docstring(node)
            assert text, f"{kind.name}.{node.name}"
            # Attributes that the core reads straight from a field have no docstring there.
            assert inspect.getdoc(found) is None or inspect.getdoc(found).startswith(text), f"{kind.name}.{node.name}"
