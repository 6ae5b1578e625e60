"""The waiting room with real threads and the real clock. Core only: the model supports one thread."""

from __future__ import annotations

import gc
import queue
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from grpc_batcher import _core
from grpc_batcher._core import CLOSED, EXPIRED, FINISHED, LEFT, TAKEN, ManualClock, Ticket, WaitingRoom

import pytest

MS_NS = 1_000_000
SECOND_NS = 1_000_000_000
HOUR_NS = 3_600 * SECOND_NS

OpenRoom = Callable[..., WaitingRoom]
Batches = list[tuple[str, list[Ticket]]]


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(64) as executor:
        yield executor


@pytest.fixture
def open_room(threads: ThreadPoolExecutor) -> Iterator[OpenRoom]:
    """Opens rooms and abandons them in the end, before `threads` joins the threads that may be blocked in them."""
    rooms: list[WaitingRoom] = []

    def open_room(batch_size: int = 4, window_ns: int = MS_NS, capacity: int = 1024, **options: Any) -> WaitingRoom:
        rooms.append(WaitingRoom(batch_size, window_ns, capacity, **options))
        return rooms[-1]

    yield open_room
    for room in rooms:
        room.abandon()


def wait_until(holds: Callable[[], object]) -> None:
    """Wait for a state, for as long as the test may take."""
    while not holds():
        time.sleep(0.001)


def take(room: WaitingRoom) -> list[Ticket]:
    """Take a batch and return its tickets."""
    taken = room.take_batch()
    assert taken is not None
    return taken[1]


def answer_to(request: Any) -> tuple[str, Any]:
    return "answer to", request


def answer(room: WaitingRoom, tickets: list[Ticket]) -> None:
    room.finish(tickets, [answer_to(ticket.request) for ticket in tickets])


def serve(room: WaitingRoom) -> Batches:
    """Be the taker until the room is closed and empty. Returns what was taken."""
    batches: Batches = []
    while (taken := room.take_batch()) is not None:
        answer(room, taken[1])
        batches.append(taken)
    return batches


def tickets_of(batches: Batches) -> list[Ticket]:
    return [ticket for _reason, tickets in batches for ticket in tickets]


def rows_of(tickets: list[Ticket]) -> int:
    return sum(ticket.rows for ticket in tickets)


def call(room: WaitingRoom, name: int, count: int) -> list[Ticket]:
    """Be a caller: push one request after another on one stream. Each counts a few bytes, and some several rows."""
    stream = room.open_stream()
    tickets = []
    for number in range(count):
        rows = 1 + (name + number) % room.batch_size if name % 2 else 1
        tickets.append(stream.push((name, number), None, number % 7, rows))
        assert tickets[-1].wait() == FINISHED
    stream.close()
    return tickets


def call_until_closed(room: WaitingRoom, name: int) -> list[Ticket]:
    """Be a caller until the room refuses a request, or ends one without an answer."""
    stream = room.open_stream()
    tickets: list[Ticket] = []
    try:
        while not tickets or tickets[-1].wait() == FINISHED:
            tickets.append(stream.push((name, len(tickets))))
    except _core.RoomClosedError:
        pass
    return tickets


def answered_streams(room: WaitingRoom) -> list[Any]:
    """Open `batch_size` streams and answer one request of each. The room must be empty and have no taker."""
    streams = [room.open_stream() for _ in range(room.batch_size)]
    for stream in streams:
        stream.push("first")
    answer(room, take(room))
    return streams


def take_in_sleep(threads: ThreadPoolExecutor, room: WaitingRoom) -> Future[Any]:
    """Take a batch on another thread. Returns once that thread sleeps."""
    taken = threads.submit(room.take_batch)
    wait_until(lambda: room.takers == 1)
    return taken


def requests_of(taken: Any) -> tuple[str, list[Any]]:
    reason, tickets = taken
    return reason, [ticket.request for ticket in tickets]


# ---- many callers, one taker ----


@pytest.mark.parametrize(
    ("callers", "batch_size", "window_ns"),
    [(1, 4, MS_NS), (8, 3, MS_NS), (8, 16, 5 * MS_NS), (8, 16, 0), (32, 16, 5 * MS_NS)],
)
def test_nothing_is_lost_doubled_or_reordered(
    threads: ThreadPoolExecutor, open_room: OpenRoom, callers: int, batch_size: int, window_ns: int
) -> None:
    count = 3200 // callers
    room = open_room(batch_size, window_ns)
    server = threads.submit(serve, room)
    results = [threads.submit(call, room, name, count) for name in range(callers)]
    pushed = [ticket for result in results for ticket in result.result()]
    room.close()
    batches = server.result()
    served = tickets_of(batches)

    assert sorted(ticket.request for ticket in served) == [(name, n) for name in range(callers) for n in range(count)]
    assert {id(ticket) for ticket in served} == {id(ticket) for ticket in pushed}
    assert all(ticket.outcome == answer_to(ticket.request) for ticket in pushed)
    for name in range(callers):
        assert [ticket.request[1] for ticket in served if ticket.request[0] == name] == list(range(count))
    pushed_ns = [ticket.pushed_ns for ticket in served]
    assert pushed_ns == sorted(pushed_ns)
    assert all(1 <= rows_of(tickets) <= batch_size for _reason, tickets in batches)
    reasons = Counter(reason for reason, _tickets in batches)
    assert room.batches() == ({reason: reasons[reason] for reason in _core.REASONS}, len(served), rows_of(served))
    assert (room.pushed, room.popped, room.open_streams) == (len(served), len(served), 0)
    assert (room.waiting, room.waiting_rows, room.waiting_bytes) == (0, 0, 0)


@pytest.mark.parametrize("limit", [{"capacity": 2}, {"capacity_bytes": 20}])
def test_nothing_is_lost_when_callers_find_the_room_full(
    threads: ThreadPoolExecutor, open_room: OpenRoom, limit: dict[str, int]
) -> None:
    refused: list[Any] = []

    def insist(name: int) -> None:
        stream = room.open_stream()
        for number in range(100):
            while True:
                try:
                    ticket = stream.push((name, number), None, 10, rows=1 + name % 2)
                    break
                except _core.QueueFullError:
                    refused.append((name, number))
                    time.sleep(0)
            assert ticket.wait() == FINISHED
            assert ticket.outcome == answer_to((name, number))

    room = open_room(batch_size=2, **limit)
    results = [threads.submit(insist, name) for name in range(16)]
    wait_until(lambda: refused)
    server = threads.submit(serve, room)
    for result in results:
        result.result()
    room.close()
    assert Counter(ticket.request for ticket in tickets_of(server.result())) == Counter(
        (name, number) for name in range(16) for number in range(100)
    )
    assert (room.waiting, room.waiting_rows, room.waiting_bytes) == (0, 0, 0)


def test_accepted_requests_are_answered_when_the_room_closes_under_load(
    threads: ThreadPoolExecutor, open_room: OpenRoom
) -> None:
    for enough in (0, 1, 100, 500):
        room = open_room(batch_size=5)
        server = threads.submit(serve, room)
        results = [threads.submit(call_until_closed, room, name) for name in range(12)]
        wait_until(lambda room=room, enough=enough: room.pushed >= enough)
        room.close()
        pushed = [ticket for result in results for ticket in result.result()]
        served = tickets_of(server.result())
        assert Counter(ticket.request for ticket in served) == Counter(ticket.request for ticket in pushed)
        assert all(ticket.state == FINISHED for ticket in pushed)
        assert all(ticket.outcome == answer_to(ticket.request) for ticket in pushed)
        assert room.pushed == len(pushed)


# ---- abandon ----


def test_abandoning_a_room_ends_requests_that_wait_and_those_in_the_callback(
    threads: ThreadPoolExecutor, open_room: OpenRoom
) -> None:
    room = open_room(batch_size=4)
    results = [threads.submit(call_until_closed, room, name) for name in range(9)]
    for _ in range(50):
        answer(room, take(room))
    held = take(room)
    wait_until(lambda: room.waiting + len(held) == 9)
    assert room.abandon() == 9
    last = [result.result()[-1] for result in results]
    assert [ticket.state for ticket in last] == [CLOSED] * 9
    answer(room, held)
    assert [ticket.state for ticket in last] == [CLOSED] * 9
    assert (room.take_batch(), room.waiting, room.open_streams) == (None, 0, 0)


def test_each_request_is_answered_or_closed_when_the_room_is_abandoned_under_load(
    threads: ThreadPoolExecutor, open_room: OpenRoom
) -> None:
    for enough in (0, 1, 5, 20, 50, 100, 200, 300):
        room = open_room(batch_size=3)
        server = threads.submit(serve, room)
        results = [threads.submit(call_until_closed, room, name) for name in range(8)]
        wait_until(lambda room=room, enough=enough: room.pushed >= enough)
        abandoned = room.abandon()
        pushed = [ticket for result in results for ticket in result.result()]
        states = Counter(ticket.state for ticket in pushed)
        assert states == Counter({FINISHED: len(pushed) - abandoned, CLOSED: abandoned})
        served = Counter(ticket.request for ticket in tickets_of(server.result()))
        assert served == Counter(ticket.request for ticket in pushed if ticket.taken_ns != 0)
        assert all(ticket.outcome == answer_to(ticket.request) for ticket in pushed if ticket.state == FINISHED)


# ---- callers that leave ----


def test_a_waiting_thread_returns_when_its_stream_closes(threads: ThreadPoolExecutor, open_room: OpenRoom) -> None:
    room = open_room(window_ns=HOUR_NS)
    stream = room.open_stream()
    waiter = threads.submit(stream.push("a").wait)
    stream.close()
    assert waiter.result() == LEFT
    assert room.waiting == 0


def test_a_thread_whose_request_is_taken_returns_when_its_stream_closes(
    threads: ThreadPoolExecutor, open_room: OpenRoom
) -> None:
    room = open_room(batch_size=2, window_ns=HOUR_NS)
    leaver, stayer = room.open_stream(), room.open_stream()
    tickets = [leaver.push("leaves"), stayer.push("stays")]
    waiters = [threads.submit(ticket.wait) for ticket in tickets]
    assert requests_of(room.take_batch()) == ("full", ["leaves", "stays"])
    leaver.close()
    assert waiters[0].result() == LEFT
    answer(room, tickets)
    assert waiters[1].result() == FINISHED
    assert [ticket.state for ticket in tickets] == [LEFT, FINISHED]


def test_each_request_is_answered_or_left_when_streams_close_at_random_moments(
    threads: ThreadPoolExecutor, open_room: OpenRoom
) -> None:
    to_close: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def close_them() -> None:
        while (stream := to_close.get()) is not None:
            stream.close()

    def call_and_perhaps_leave(name: int) -> list[Ticket]:
        chance = random.Random(name)
        tickets = []
        stream = room.open_stream()
        for number in range(150):
            ticket = stream.push((name, number), None, number, rows=1 + number % 3)
            tickets.append(ticket)
            if chance.random() < 0.5:
                to_close.put(stream)
                stream = room.open_stream()
            assert ticket.wait() in (FINISHED, LEFT)
        stream.close()
        return tickets

    room = open_room(batch_size=3)
    server = threads.submit(serve, room)
    closers = [threads.submit(close_them) for _ in range(2)]
    results = [threads.submit(call_and_perhaps_leave, name) for name in range(10)]
    try:
        pushed = [ticket for result in results for ticket in result.result()]
    finally:
        for _ in closers:
            to_close.put(None)
    for closer in closers:
        closer.result()
    room.close()
    served = tickets_of(server.result())
    assert Counter(ticket.request for ticket in served) == Counter(
        ticket.request for ticket in pushed if ticket.taken_ns != 0
    )
    assert len(pushed) == len({ticket.request for ticket in pushed}) == 1500
    for ticket in pushed:
        assert ticket.state in (FINISHED, LEFT)
        assert ticket.state == LEFT or ticket.outcome == answer_to(ticket.request)
    pushed_ns = [ticket.pushed_ns for ticket in served]
    assert pushed_ns == sorted(pushed_ns)
    assert (room.waiting, room.waiting_rows, room.waiting_bytes, room.open_streams) == (0, 0, 0, 0)


# ---- deadlines ----


def test_a_waiting_thread_returns_at_its_deadline(threads: ThreadPoolExecutor, open_room: OpenRoom) -> None:
    room = open_room(window_ns=HOUR_NS)
    deadline_ns = time.monotonic_ns() + 30 * MS_NS
    ticket = room.open_stream().push("a", deadline_ns)
    assert threads.submit(ticket.wait).result() == EXPIRED
    assert time.monotonic_ns() >= deadline_ns
    assert (room.waiting, room.poll_batch()) == (0, None)


def test_a_thread_whose_request_is_taken_returns_at_its_deadline(
    threads: ThreadPoolExecutor, open_room: OpenRoom
) -> None:
    room = open_room(batch_size=2, window_ns=HOUR_NS)
    patient = room.open_stream().push("patient")
    deadline_ns = time.monotonic_ns() + SECOND_NS // 2
    hasty = room.open_stream().push("hasty", deadline_ns)
    assert requests_of(room.poll_batch()) == ("full", ["patient", "hasty"])
    waiters = [threads.submit(ticket.wait) for ticket in (patient, hasty)]
    assert waiters[1].result() == EXPIRED
    assert time.monotonic_ns() >= deadline_ns
    assert patient.state == TAKEN
    answer(room, [patient, hasty])
    assert waiters[0].result() == FINISHED
    assert (hasty.state, patient.outcome) == (EXPIRED, answer_to("patient"))


def test_the_main_thread_returns_at_its_deadline(open_room: OpenRoom) -> None:
    room = open_room(window_ns=HOUR_NS)
    # Longer than one sleep of the main thread.
    deadline_ns = time.monotonic_ns() + 450 * MS_NS
    assert room.open_stream().push("a", deadline_ns).wait() == EXPIRED
    assert time.monotonic_ns() >= deadline_ns


def test_each_request_is_answered_or_expired_when_deadlines_pass_under_load(
    threads: ThreadPoolExecutor, open_room: OpenRoom
) -> None:
    def call_with_deadlines(name: int) -> list[tuple[Ticket, int]]:
        chance = random.Random(name)
        tickets = []
        stream = room.open_stream()
        for number in range(150):
            deadline_ns = time.monotonic_ns() + chance.randrange(2 * MS_NS)
            ticket = stream.push((name, number), deadline_ns, number, rows=1 + number % 3)
            tickets.append((ticket, deadline_ns))
            if ticket.wait() == EXPIRED:
                assert time.monotonic_ns() >= deadline_ns
        return tickets

    room = open_room(batch_size=3)
    server = threads.submit(serve, room)
    results = [threads.submit(call_with_deadlines, name) for name in range(10)]
    pushed = [pair for result in results for pair in result.result()]
    room.close()
    served = tickets_of(server.result())
    assert Counter(ticket.request for ticket in served) == Counter(
        ticket.request for ticket, _deadline_ns in pushed if ticket.taken_ns != 0
    )
    for ticket, deadline_ns in pushed:
        assert ticket.state in (FINISHED, EXPIRED)
        assert ticket.taken_ns < deadline_ns
        assert ticket.state == EXPIRED or ticket.outcome == answer_to(ticket.request)
    assert (room.waiting, room.waiting_rows, room.waiting_bytes) == (0, 0, 0)


# ---- what wakes a taker ----


def test_a_taker_wakes_when_the_batch_is_full(threads: ThreadPoolExecutor, open_room: OpenRoom) -> None:
    room = open_room(batch_size=3, window_ns=HOUR_NS)
    taken = take_in_sleep(threads, room)
    for request in ("a", "b", "c"):
        room.open_stream().push(request)
    assert requests_of(taken.result()) == ("full", ["a", "b", "c"])


def test_a_taker_wakes_when_the_next_request_does_not_fit(threads: ThreadPoolExecutor, open_room: OpenRoom) -> None:
    room = open_room(batch_size=4, window_ns=HOUR_NS)
    taken = take_in_sleep(threads, room)
    room.open_stream().push("a", rows=3)
    room.open_stream().push("b", rows=2)
    assert requests_of(taken.result()) == ("full", ["a"])
    taken = take_in_sleep(threads, room)
    room.open_stream().push("c", rows=2)
    assert requests_of(taken.result()) == ("full", ["b", "c"])


def test_a_taker_wakes_when_everyone_is_in(threads: ThreadPoolExecutor, open_room: OpenRoom) -> None:
    room = open_room(batch_size=3, window_ns=HOUR_NS)
    stream, *others = answered_streams(room)
    for other in others:
        other.close()
    taken = take_in_sleep(threads, room)
    stream.push("a")
    assert requests_of(taken.result()) == ("everyone_in", ["a"])


def test_a_taker_wakes_when_the_only_first_timer_leaves(threads: ThreadPoolExecutor, open_room: OpenRoom) -> None:
    room = open_room(batch_size=3, window_ns=HOUR_NS)
    stream, *others = answered_streams(room)
    for other in others:
        other.close()
    newcomer = room.open_stream()
    stream.push("a")
    newcomer.push("newcomer")
    taken = take_in_sleep(threads, room)
    newcomer.close()
    assert requests_of(taken.result()) == ("everyone_in", ["a"])


def test_a_taker_wakes_when_the_only_first_timer_expires(threads: ThreadPoolExecutor, open_room: OpenRoom) -> None:
    room = open_room(batch_size=3, window_ns=HOUR_NS)
    stream, *others = answered_streams(room)
    for other in others:
        other.close()
    stream.push("a")
    newcomer = room.open_stream().push("newcomer", time.monotonic_ns() + SECOND_NS // 5)
    taken = take_in_sleep(threads, room)
    assert threads.submit(newcomer.wait).result() == EXPIRED
    assert requests_of(taken.result()) == ("everyone_in", ["a"])


def test_a_taker_waits_one_second_for_a_stream_that_was_answered(
    threads: ThreadPoolExecutor, open_room: OpenRoom
) -> None:
    room = open_room(batch_size=2, window_ns=HOUR_NS)
    before_ns = time.monotonic_ns()
    busy, _idle = answered_streams(room)
    ticket = busy.push("a")
    assert requests_of(threads.submit(room.take_batch).result()) == ("everyone_in", ["a"])
    assert ticket.taken_ns - before_ns >= SECOND_NS


def test_a_taker_waits_for_the_window(threads: ThreadPoolExecutor, open_room: OpenRoom) -> None:
    room = open_room(window_ns=50 * MS_NS)
    taken = take_in_sleep(threads, room)
    ticket = room.open_stream().push("a")
    assert requests_of(taken.result()) == ("timeout", ["a"])
    assert ticket.taken_ns - ticket.pushed_ns >= 50 * MS_NS


def test_a_taker_waits_for_the_window_if_nobody_leaves_early(threads: ThreadPoolExecutor, open_room: OpenRoom) -> None:
    room = open_room(batch_size=2, window_ns=50 * MS_NS, leave_early=False)
    stream, other = answered_streams(room)
    other.close()
    taken = take_in_sleep(threads, room)
    ticket = stream.push("a")
    assert requests_of(taken.result()) == ("timeout", ["a"])
    assert ticket.taken_ns - ticket.pushed_ns >= 50 * MS_NS


def test_a_taker_sleeps_on_if_the_request_that_filled_the_batch_had_expired(
    threads: ThreadPoolExecutor, open_room: OpenRoom
) -> None:
    room = open_room(batch_size=2, window_ns=HOUR_NS)
    room.open_stream().push("a")
    taken = take_in_sleep(threads, room)
    late = room.open_stream().push("late", time.monotonic_ns())
    wait_until(lambda: taken.done() or (late.state == EXPIRED and room.takers == 1))
    assert not taken.done()
    room.open_stream().push("b")
    assert requests_of(taken.result()) == ("full", ["a", "b"])


def test_the_main_thread_waits_for_the_window(open_room: OpenRoom) -> None:
    # Longer than one sleep of the main thread.
    room = open_room(window_ns=450 * MS_NS)
    ticket = room.open_stream().push("a")
    assert requests_of(room.take_batch()) == ("timeout", ["a"])
    assert ticket.taken_ns - ticket.pushed_ns >= 450 * MS_NS


def test_a_taker_wakes_when_the_room_is_closed(threads: ThreadPoolExecutor, open_room: OpenRoom) -> None:
    room = open_room(window_ns=HOUR_NS)
    room.open_stream().push("a")
    taken = take_in_sleep(threads, room)
    room.close()
    assert requests_of(taken.result()) == ("drain", ["a"])
    assert room.take_batch() is None


@pytest.mark.parametrize("end", [WaitingRoom.close, WaitingRoom.abandon])
def test_the_taker_of_an_empty_room_wakes_when_the_room_ends(
    threads: ThreadPoolExecutor, open_room: OpenRoom, end: Callable[[WaitingRoom], None]
) -> None:
    room = open_room(window_ns=HOUR_NS)
    taken = take_in_sleep(threads, room)
    end(room)
    assert taken.result() is None


def test_a_taker_of_an_empty_room_wakes_when_it_is_nudged(threads: ThreadPoolExecutor, open_room: OpenRoom) -> None:
    room = open_room(window_ns=HOUR_NS)
    for _ in range(3):
        taken = take_in_sleep(threads, room)
        room.nudge()
        assert taken.result() == ("nudge", [])


def test_a_nudged_taker_leaves_what_waits_for_its_window(threads: ThreadPoolExecutor, open_room: OpenRoom) -> None:
    room = open_room(batch_size=2, window_ns=HOUR_NS)
    ticket = room.open_stream().push("first")
    taken = take_in_sleep(threads, room)
    room.nudge()
    assert taken.result() == ("nudge", [])
    assert room.waiting == 1
    room.open_stream().push("second")
    assert requests_of(room.take_batch()) == ("full", ["first", "second"])
    assert ticket.state == TAKEN


def test_nudges_before_take_batch_count_as_one_and_let_a_batch_that_is_due_go_first(
    threads: ThreadPoolExecutor, open_room: OpenRoom
) -> None:
    room = open_room(batch_size=1)
    room.nudge()
    room.nudge()
    room.open_stream().push("due")
    assert requests_of(room.take_batch()) == ("full", ["due"])
    assert room.take_batch() == ("nudge", [])
    taken = take_in_sleep(threads, room)
    room.close()
    assert taken.result() is None


def test_a_nudge_does_not_hide_that_the_room_is_closed_and_empty(open_room: OpenRoom) -> None:
    room = open_room()
    room.close()
    room.nudge()
    assert room.take_batch() is None


def test_nothing_is_lost_and_everyone_is_answered_while_the_taker_is_nudged_all_the_time(
    threads: ThreadPoolExecutor, open_room: OpenRoom
) -> None:
    room = open_room(batch_size=3, window_ns=MS_NS)
    over = threading.Event()

    def nudge() -> None:
        while not over.is_set():
            room.nudge()

    taker = threads.submit(serve, room)
    nudging = [threads.submit(nudge) for _ in range(2)]
    callers = [threads.submit(call, room, name, 100) for name in range(6)]
    for caller in callers:
        for ticket in caller.result():
            assert (ticket.state, ticket.outcome) == (FINISHED, answer_to(ticket.request))
    room.close()
    batches = taker.result()
    over.set()
    for each in nudging:
        each.result()
    assert sum(len(tickets) for _reason, tickets in batches) == 600
    assert "nudge" in {reason for reason, _tickets in batches}


def test_a_taker_wakes_when_the_room_is_abandoned(threads: ThreadPoolExecutor, open_room: OpenRoom) -> None:
    room = open_room(window_ns=HOUR_NS)
    room.open_stream().push("a")
    taken = take_in_sleep(threads, room)
    room.abandon()
    # `abandon` closes the room before it ends the request, so a quick taker may still get it.
    assert taken.result() is None or requests_of(taken.result()) == ("drain", ["a"])


# ---- what wakes a waiter ----


def test_all_threads_that_wait_for_one_ticket_return(threads: ThreadPoolExecutor, open_room: OpenRoom) -> None:
    room = open_room(batch_size=1)
    for end, state in (
        (lambda stream, ticket: answer(room, [ticket]), FINISHED),
        (lambda stream, ticket: stream.close(), LEFT),
        (lambda stream, ticket: room.abandon(), CLOSED),
    ):
        stream = room.open_stream()
        ticket = stream.push("a")
        waiters = [threads.submit(ticket.wait) for _ in range(8)]
        room.take_batch()
        end(stream, ticket)
        assert [waiter.result() for waiter in waiters] == [state] * 8


def switches(thread_id: int) -> int:
    """How often a thread has gone to sleep."""
    status = Path(f"/proc/self/task/{thread_id}/status").read_text()
    return int(status.split("\nvoluntary_ctxt_switches:")[1].split()[0])


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="only Linux counts how often a thread goes to sleep")
def test_finishing_a_batch_wakes_nobody_who_waits_for_another(threads: ThreadPoolExecutor, open_room: OpenRoom) -> None:
    thread_ids: list[int] = []

    def wait_for(ticket: Ticket) -> int:
        thread_ids.append(threading.get_native_id())
        return ticket.wait()

    rounds = 500
    room = open_room(batch_size=1)
    sleepers = [room.open_stream().push(name) for name in range(3)]
    waiters = [threads.submit(wait_for, ticket) for ticket in sleepers]
    held = [ticket for _ in sleepers for ticket in take(room)]
    wait_until(lambda: len(thread_ids) == 3)
    before = 0
    while before != (before := sum(map(switches, thread_ids))):
        time.sleep(0.001)  # until they sleep

    caller = threads.submit(call, room, 9, rounds)
    for _ in range(rounds):
        answer(room, take(room))
    caller.result()
    assert [ticket.state for ticket in sleepers] == [TAKEN] * 3
    # A thread that was not quite asleep adds a few. Waking in each round would add hundreds.
    assert sum(map(switches, thread_ids)) - before < rounds / 5
    answer(room, held)
    assert [waiter.result() for waiter in waiters] == [FINISHED] * 3


# ---- the GIL, and signals ----

# With this switch interval, another thread gets the GIL within a second only if the running one blocks.
_GIL_HEAD = """
import sys, threading, time
sys.setswitchinterval(1)
room = _core.WaitingRoom(1, 5, 4)
"""


def test_a_thread_in_take_batch_releases_the_gil(core_command: Callable[[str], list[str]]) -> None:
    script = """
taken = []
taker = threading.Thread(target=lambda: taken.append(room.take_batch()))
taker.start()
while room.takers == 0:
    time.sleep(0.001)
room.open_stream().push("a")
taker.join()
print(taken[0][1][0].request)
"""
    process = subprocess.run(core_command(_GIL_HEAD + script), capture_output=True, text=True, check=False)
    assert (process.returncode, process.stdout) == (0, "a\n"), process.stderr


def test_a_thread_in_wait_releases_the_gil(core_command: Callable[[str], list[str]]) -> None:
    script = """
ticket = room.open_stream().push("a")
begun = []
def wait():
    begun.append(True)
    begun.append(ticket.wait())
waiter = threading.Thread(target=wait)
waiter.start()
while not begun:
    time.sleep(0.001)
room.finish(room.poll_batch()[1], ["b"])
waiter.join()
print(begun[1] == _core.FINISHED, ticket.outcome)
"""
    process = subprocess.run(core_command(_GIL_HEAD + script), capture_output=True, text=True, check=False)
    assert (process.returncode, process.stdout) == (0, "True b\n"), process.stderr


@pytest.mark.parametrize("blocking_call", ["room.take_batch()", "ticket.wait()"])
def test_the_main_thread_handles_signals_while_it_blocks(
    core_command: Callable[[str], list[str]], blocking_call: str
) -> None:
    script = f"""
import os, signal, threading, time
room = _core.WaitingRoom(2, 3_600 * 10**9, 4)
ticket = room.open_stream().push("a")
handled = []
signal.signal(signal.SIGUSR1, lambda *_: handled.append("handled"))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have set it to be ignored

def say_when_it_blocks():
    # Only the main thread runs handlers. Once it has run several, it is blocked in the call.
    for number in range(1, 4):
        os.kill(os.getpid(), signal.SIGUSR1)
        while len(handled) < number:
            time.sleep(0.001)
    print("blocks", flush=True)

try:
    threading.Thread(target=say_when_it_blocks).start()
    {blocking_call}
except KeyboardInterrupt:
    print("interrupted")
room.open_stream().push("b")
reason, tickets = room.take_batch()
room.finish(tickets, ["x", "y"])
print(reason, len(tickets), ticket.wait() == _core.FINISHED, ticket.outcome)
"""
    with subprocess.Popen(core_command(script), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "blocks\n"
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate()
    assert (process.returncode, output.splitlines()) == (0, ["interrupted", "full 2 True x"]), errors


# ---- everything is freed ----


def small_room(clock: ManualClock) -> WaitingRoom:
    return WaitingRoom(1, 0, 1, capacity_bytes=1000, clock=clock)


class Thing:
    """A request or an outcome that a test can watch being freed."""


def living() -> Counter[str]:
    """How many tickets, streams and rooms exist."""
    gc.collect()
    kinds = (_core.Ticket, _core.Stream, _core.WaitingRoom)
    return Counter(type(thing).__name__ for thing in gc.get_objects() if isinstance(thing, kinds))


def finished(room: WaitingRoom, clock: ManualClock, request: Thing, outcome: Thing) -> None:
    stream = room.open_stream()
    ticket = stream.push(request)
    tickets = take(room)
    room.finish(tickets, [outcome])
    assert ticket.wait() == FINISHED


def finished_twice(room: WaitingRoom, clock: ManualClock, request: Thing, outcome: Thing) -> None:
    room.open_stream().push(request)
    tickets = take(room)
    room.finish(tickets, [outcome])
    room.finish(tickets, [Thing()])


def left_while_it_waited(room: WaitingRoom, clock: ManualClock, request: Thing, outcome: Thing) -> None:
    stream = room.open_stream()
    stream.push(request)
    stream.close()


def left_while_it_was_taken(room: WaitingRoom, clock: ManualClock, request: Thing, outcome: Thing) -> None:
    stream = room.open_stream()
    stream.push(request)
    tickets = take(room)
    stream.close()
    room.finish(tickets, [outcome])


def pushed_on_a_closed_stream(room: WaitingRoom, clock: ManualClock, request: Thing, outcome: Thing) -> None:
    stream = room.open_stream()
    stream.close()
    assert stream.push(request).state == LEFT


def expired_before_it_was_taken(room: WaitingRoom, clock: ManualClock, request: Thing, outcome: Thing) -> None:
    room.open_stream().push(request, clock.now_ns)
    assert room.poll_batch() is None


def expired_while_somebody_waited(room: WaitingRoom, clock: ManualClock, request: Thing, outcome: Thing) -> None:
    assert room.open_stream().push(request, clock.now_ns).wait() == EXPIRED


def expired_while_it_was_taken(room: WaitingRoom, clock: ManualClock, request: Thing, outcome: Thing) -> None:
    ticket = room.open_stream().push(request, clock.now_ns + 1)
    tickets = take(room)
    clock.now_ns += 1
    assert ticket.wait() == EXPIRED
    room.finish(tickets, [outcome])


def abandoned_while_it_waited(room: WaitingRoom, clock: ManualClock, request: Thing, outcome: Thing) -> None:
    room.open_stream().push(request)
    assert room.abandon() == 1


def abandoned_while_it_was_taken(room: WaitingRoom, clock: ManualClock, request: Thing, outcome: Thing) -> None:
    room.open_stream().push(request)
    tickets = take(room)
    assert room.abandon() == 1
    room.finish(tickets, [outcome])


def refused_by_a_closed_room(room: WaitingRoom, clock: ManualClock, request: Thing, outcome: Thing) -> None:
    stream = room.open_stream()
    room.close()
    with pytest.raises(_core.RoomClosedError):
        stream.push(request)


def refused_because_its_stream_is_busy(room: WaitingRoom, clock: ManualClock, request: Thing, outcome: Thing) -> None:
    stream = room.open_stream()
    stream.push(Thing())
    with pytest.raises(RuntimeError, match="one request at a time"):
        stream.push(request)
    stream.close()


def refused_by_a_full_room(room: WaitingRoom, clock: ManualClock, request: Thing, outcome: Thing) -> None:
    first = room.open_stream()
    first.push(Thing())
    with pytest.raises(_core.QueueFullError):
        room.open_stream().push(request)
    first.close()


def refused_for_its_bytes(room: WaitingRoom, clock: ManualClock, request: Thing, outcome: Thing) -> None:
    with pytest.raises(_core.QueueBytesFullError):
        room.open_stream().push(request, None, 1001)


def thrown_away_when_it_was_taken(room: WaitingRoom, clock: ManualClock, request: Thing, outcome: Thing) -> None:
    room.open_stream().push(request)
    take(room)


def finished_with_a_wrong_number_of_outcomes(
    room: WaitingRoom, clock: ManualClock, request: Thing, outcome: Thing
) -> None:
    room.open_stream().push(request)
    tickets = take(room)
    with pytest.raises(ValueError, match="2 outcomes for 1 tickets"):
        room.finish(tickets, [outcome, outcome])


ENDINGS = [
    finished,
    finished_twice,
    left_while_it_waited,
    left_while_it_was_taken,
    pushed_on_a_closed_stream,
    expired_before_it_was_taken,
    expired_while_somebody_waited,
    expired_while_it_was_taken,
    abandoned_while_it_waited,
    abandoned_while_it_was_taken,
    refused_by_a_closed_room,
    refused_because_its_stream_is_busy,
    refused_by_a_full_room,
    refused_for_its_bytes,
    thrown_away_when_it_was_taken,
    finished_with_a_wrong_number_of_outcomes,
]


@pytest.mark.parametrize("end", ENDINGS)
def test_a_request_and_its_outcome_are_freed_however_it_ended(end: Callable[..., None]) -> None:
    clock = ManualClock(1)
    room = small_room(clock)
    request, outcome = Thing(), Thing()
    watched = [weakref.ref(request), weakref.ref(outcome)]
    end(room, clock, request, outcome)
    del request, outcome
    gc.collect()  # for what pytest.raises keeps; the room needs no collection
    assert [ref() for ref in watched] == [None, None]


@pytest.mark.parametrize("end", ENDINGS)
def test_rooms_streams_and_tickets_are_freed_however_requests_ended(end: Callable[..., None]) -> None:
    before = living()
    for _ in range(10):
        clock = ManualClock(1)
        room = small_room(clock)
        end(room, clock, Thing(), Thing())
    del room
    assert living() == before


@pytest.mark.parametrize("end", ENDINGS)
def test_references_are_neither_kept_nor_dropped_twice_however_requests_ended(end: Callable[..., None]) -> None:
    request, outcome = Thing(), Thing()
    before = sys.getrefcount(request), sys.getrefcount(outcome)
    for _ in range(100):
        clock = ManualClock(1)
        end(small_room(clock), clock, request, outcome)
    gc.collect()
    assert (sys.getrefcount(request), sys.getrefcount(outcome)) == before


def test_the_room_keeps_no_reference_to_a_ticket_that_has_ended() -> None:
    room = WaitingRoom(1, 0, 4)
    stream = room.open_stream()
    ticket, plain = stream.push("a"), object()
    assert sys.getrefcount(ticket) == sys.getrefcount(plain) + 1, "the ring holds it"
    tickets = take(room)
    answer(room, tickets)
    del tickets
    assert sys.getrefcount(ticket) == sys.getrefcount(plain)


def test_a_closed_stream_is_freed_while_its_room_lives() -> None:
    room = WaitingRoom(1, 0, 4)
    before = living()
    for _ in range(10):
        stream = room.open_stream()
        stream.push("a")
        answer(room, take(room))
        stream.close()
    del stream
    assert living() == before


def test_everything_is_freed_after_callers_leave_expire_or_stay_under_load(threads: ThreadPoolExecutor) -> None:
    def call_and_end_somehow(room: WaitingRoom, name: int) -> None:
        chance = random.Random(name)
        stream = room.open_stream()
        for _ in range(150):
            ending = chance.choice(["expire", "leave", "stay", "stay"])
            deadline_ns = time.monotonic_ns() + chance.randrange(MS_NS) if ending == "expire" else None
            try:
                ticket = stream.push(request, deadline_ns)
            except _core.QueueFullError:
                continue
            if ending == "leave":
                stream.close()
                stream = room.open_stream()
            assert ticket.wait() in (FINISHED, EXPIRED, LEFT)

    def answer_with_the_same(room: WaitingRoom) -> None:
        while (taken := room.take_batch()) is not None:
            room.finish(taken[1], [outcome] * len(taken[1]))

    def load() -> None:
        room = WaitingRoom(3, MS_NS // 2, 6)
        try:
            server = threads.submit(answer_with_the_same, room)
            for caller in [threads.submit(call_and_end_somehow, room, name) for name in range(8)]:
                caller.result()
        finally:
            room.abandon()
        server.result()

    request, outcome = Thing(), Thing()
    load()  # creates what is created once, such as threads
    before = living(), sys.getrefcount(request), sys.getrefcount(outcome)
    load()
    # A thread of the pool may drop its work a little after it has set the result.
    wait_until(lambda: (living(), sys.getrefcount(request), sys.getrefcount(outcome)) == before)
