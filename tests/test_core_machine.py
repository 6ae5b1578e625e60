"""The core and its plain Python model, driven side by side through the same random steps and compared after each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from grpc_batcher import _core
from grpc_batcher._core import FINISHED, TAKEN, ManualClock

import pytest
import room_model
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

START_NS = 1_000_000_000_000
SECOND_NS = room_model.SECOND_NS

# From now. Mostly none, or hardly anything would be answered.
DEADLINES_NS = st.sampled_from([None, None, None, None, None, -1, 0, 1, 5, 6, SECOND_NS])
# Mostly small against the limits below, or hardly anything would be accepted.
SIZES_BYTES = st.sampled_from([0, 1, 1, 2, 3, 7, 8, -1])

# A step that is listed twice is taken more often.
STEPS = (
    *("push_on_idle_streams", "push_on_a_new_stream") * 2,
    *("take", "answer_all") * 2,
    *("let_time_pass", "let_time_pass_until_something_could_happen"),
    *("close_stream_that_waits", "close_stream", "push_on_any_stream"),
    *("answer_some", "wait_where_it_does_not_block", "nudge_and_take", "end"),
)


class Pair(NamedTuple):
    """A room, a stream or a ticket of the core, and its counterpart of the model."""

    core: Any
    model: Any


def outcome_of(call: Callable[[], Any]) -> Any:
    """What a call returned, or the error it raised, as text."""
    try:
        return call()
    except (ValueError, RuntimeError, _core.QueueFullError, _core.RoomClosedError) as error:
        return f"{type(error).__name__}: {error}"


def both(call: Callable[[Any], Any], pair: Pair) -> Any:
    """Make a call on both, and check that they return or raise the same."""
    core, model = outcome_of(lambda: call(pair.core)), outcome_of(lambda: call(pair.model))
    assert core == model
    return core


class CoreBesideModel(RuleBasedStateMachine):
    @initialize(
        batch_size=st.sampled_from([4, 2, 6, 3, 1]),
        window_ns=st.sampled_from([5, 3 * SECOND_NS, SECOND_NS // 2, 0]),
        capacity=st.sampled_from([8, 5, 3, 13, 4, 1, 2]),
        capacity_bytes=st.sampled_from([None, 7, 12, 3]),
        leave_early=st.sampled_from([True, True, False]),
        callers=st.sampled_from([3, 1, 2, 5, 0]),
        all_single=st.sampled_from([False, False, True]),
    )
    def open_room(
        self,
        batch_size: int,
        window_ns: int,
        capacity: int,
        capacity_bytes: int | None,
        leave_early: bool,
        callers: int,
        all_single: bool,
    ) -> None:
        """Make a room, with some streams that were answered just now."""
        self.clock = ManualClock(START_NS)
        self.room = Pair(
            *(
                room(
                    batch_size,
                    window_ns,
                    capacity,
                    capacity_bytes=capacity_bytes,
                    leave_early=leave_early,
                    clock=self.clock,
                )
                for room in (_core.WaitingRoom, room_model.WaitingRoom)
            )
        )
        # Mostly one, or hardly anything would be accepted.
        several = [*range(1, batch_size + 1), 0, batch_size + 1]
        self.rows = st.just(1) if all_single else st.sampled_from([1] * batch_size + several)
        self.streams: list[Pair] = []
        self.tickets: list[Pair] = []  # every ticket that `push` returned
        self.taken: list[Pair] = []  # every ticket that was ever taken, oldest first
        self.requests = 0
        self.outcomes = 0
        self.popped_before = 0
        for number in range(callers):
            self.open_stream(number, pooled=number % 2 == 0)
            self.push(self.streams[-1], None, 0, 1)
            self.clock.now_ns += window_ns
            self.take()
            self.answer_all()

    # One rule for all steps: hypothesis leaves some rules out of each run, and without those of the callers, or that of
    # the taker, the others do nothing.
    @rule(step=st.sampled_from(STEPS), data=st.data())
    def do(self, step: str, data: st.DataObject) -> None:
        getattr(self, step)(data)

    # ---- callers ----

    def open_stream(self, owner: object, *, pooled: bool) -> None:
        self.streams.append(Pair(*(room.open_stream(owner, pooled=pooled) for room in self.room)))

    def push(self, stream: Pair, deadline_in_ns: int | None, size_bytes: int, rows: int) -> None:
        self.requests += 1
        deadline_ns = None if deadline_in_ns is None else self.clock.now_ns + deadline_in_ns
        core, model = (
            outcome_of(lambda one=one: one.push(self.requests, deadline_ns, size_bytes, rows)) for one in stream
        )
        if isinstance(core, str) or isinstance(model, str):
            assert core == model
        else:
            self.tickets.append(Pair(core, model))

    def push_on_any_stream(self, data: st.DataObject) -> None:
        """Including streams that are closed or already have a request."""
        if self.streams:
            self.push_drawn(data.draw(st.sampled_from(self.streams)), data)

    def push_drawn(self, stream: Pair, data: st.DataObject) -> None:
        self.push(stream, data.draw(DEADLINES_NS), data.draw(SIZES_BYTES), data.draw(self.rows))

    def push_on_a_new_stream(self, data: st.DataObject) -> None:
        self.open_stream(data.draw(st.integers()), pooled=data.draw(st.booleans()))
        self.push_drawn(self.streams[-1], data)

    def push_on_idle_streams(self, data: st.DataObject) -> None:
        model = self.room.model
        idle = [one for one in self.streams if one.model.is_open and not model.unfinished_of(one.model)]
        for stream in data.draw(st.permutations(idle))[data.draw(st.integers(0, 1)) :]:
            self.push_drawn(stream, data)

    def close_stream(self, data: st.DataObject) -> None:
        if self.streams:
            both(lambda stream: stream.close(), data.draw(st.sampled_from(self.streams)))

    def close_stream_that_waits(self, data: st.DataObject) -> None:
        """A request that leaves before its turn leaves a gap in the ring."""
        queue = self.room.model.queue()
        waiting = [stream for stream in self.streams if any(ticket.stream is stream.model for ticket in queue)]
        if waiting:
            both(lambda stream: stream.close(), data.draw(st.sampled_from(waiting)))

    def wait_where_it_does_not_block(self, data: st.DataObject) -> None:
        ready = [ticket for ticket in self.tickets if ticket.model.has_ended() or ticket.model.is_past_deadline()]
        if ready:
            both(lambda ticket: ticket.wait(), data.draw(st.sampled_from(ready)))

    # ---- the taker ----

    def take(self, data: st.DataObject | None = None) -> None:
        self.compare_batches(self.room.core.poll_batch(), self.room.model.poll_batch())

    def nudge_and_take(self, data: st.DataObject) -> None:
        """After a nudge, or several, `take_batch` does not block. A nudge that found a batch is still there later."""
        for _ in range(data.draw(st.integers(0 if self.room.model.nudged else 1, 2))):
            both(lambda room: room.nudge(), self.room)
        self.compare_batches(self.room.core.take_batch(), self.room.model.take_batch())

    def compare_batches(self, core: Any, model: Any) -> None:
        assert (core is None) == (model is None)
        if core is not None:
            batch = [Pair(*tickets) for tickets in zip(core[1], model[1], strict=True)]
            assert core[0] == model[0]
            assert [ticket.core.request for ticket in batch] == [ticket.model.request for ticket in batch]
            self.taken += batch

    def finish(self, tickets: list[Pair], outcomes: list[str]) -> None:
        core = outcome_of(lambda: self.room.core.finish([ticket.core for ticket in tickets], outcomes))
        model = outcome_of(lambda: self.room.model.finish([ticket.model for ticket in tickets], outcomes))
        assert core == model

    def new_outcome(self) -> str:
        self.outcomes += 1
        return f"outcome {self.outcomes}"

    def answer_some(self, data: st.DataObject) -> None:
        """Any tickets that were ever taken, including those that have ended since."""
        if self.taken:
            tickets = data.draw(st.lists(st.sampled_from(self.taken), min_size=1, max_size=4, unique_by=id))
            missing_outcomes = data.draw(st.sampled_from([0, 0, 0, 0, 0, 1]))
            self.finish(tickets, [self.new_outcome() for _ in tickets][missing_outcomes:])

    def answer_all(self, data: st.DataObject | None = None) -> None:
        tickets = [ticket for ticket in self.taken if ticket.model.state == TAKEN]
        self.finish(tickets, [self.new_outcome() for _ in tickets])

    # ---- the clock ----

    def let_time_pass(self, data: st.DataObject) -> None:
        self.clock.now_ns += data.draw(st.sampled_from([1, 2, 5, SECOND_NS // 2]))

    def let_time_pass_until_something_could_happen(self, data: st.DataObject) -> None:
        """To the nanosecond at which a window, a deadline or a stream's second ends, or to the one before it."""
        before_ns = data.draw(st.sampled_from([0, 1]))
        model = self.room.model
        moments = [ticket.pushed_ns + model.window_ns for ticket in model.queue()]
        moments += [ticket.deadline_ns for ticket in model.accepted if ticket.deadline_ns is not None]
        moments += [stream.answered_ns + SECOND_NS for stream in model.streams if stream.answered_ns is not None]
        ahead = sorted({moment - before_ns for moment in moments if moment - before_ns > self.clock.now_ns})
        if ahead:
            self.clock.now_ns = data.draw(st.sampled_from(ahead[:3]))

    # ---- the end ----

    def end(self, data: st.DataObject) -> None:
        if self.requests > 20:  # let something happen first
            how = data.draw(st.sampled_from(["close", "abandon"]))
            both(lambda room: getattr(room, how)(), self.room)

    # ---- what must hold after each step ----

    @invariant()
    def the_room_looks_the_same(self) -> None:
        for look in (
            lambda room: (room.batch_size, room.window_ns, room.capacity, room.capacity_bytes, room.leave_early),
            lambda room: (room.closed, room.waiting, room.waiting_rows, room.waiting_bytes),
            lambda room: (room.pushed, room.open_streams),
            lambda room: room.batches(),
            lambda room: room.is_due(),
        ):
            both(look, self.room)

    @invariant()
    def the_tickets_look_the_same(self) -> None:
        for ticket in self.tickets:
            both(lambda ticket: (ticket.state, ticket.request, ticket.owner, ticket.rows), ticket)
            both(lambda ticket: (ticket.pushed_ns, ticket.taken_ns), ticket)
            if ticket.model.state == FINISHED:
                both(lambda ticket: ticket.outcome, ticket)

    @invariant()
    def positions_are_used_up_once(self) -> None:
        """The model has no ring, so of `popped` only this can be said: what waits lies between it and `pushed`."""
        room = self.room.core
        assert self.popped_before <= room.popped <= room.pushed - room.waiting
        assert room.waiting > 0 or room.popped == room.pushed
        self.popped_before = room.popped

    def teardown(self) -> None:
        """A room that holds requests is never freed."""
        if hasattr(self, "room"):
            self.room.core.abandon()


# It only computes, and takes many times as long while other tests have the processors.
@pytest.mark.timeout(300)
class TestTheCoreBehavesAsTheModel(CoreBesideModel.TestCase):  # type: ignore[name-defined,misc]
    settings = settings(max_examples=300, stateful_step_count=60)
