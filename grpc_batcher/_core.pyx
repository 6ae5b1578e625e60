# cython: autotestdict=False, auto_pickle=False
"""The waiting room: requests come in one by one and leave in batches.

This module knows nothing of gRPC, models or messages: a request is any object, and so is its outcome.

Lock rules, for whoever changes this file:

* One mutex a room guards every C field of the room, of its streams and of their tickets.
* Nobody takes the GIL, touches a Python object or raises while it holds the mutex.
* Nobody blocks while it holds the GIL. `_enter` takes the mutex with the GIL held, and yields both while it is taken.
* Every wait is a loop over a predicate, until an absolute monotonic time in nanoseconds.
* A waiting ticket is owned by its slot of the ring. Who takes it out of the ring drops that reference (or hands it
  on), after it has left the mutex.
* Finishing a batch wakes the threads that wait for that batch, and no others.
* A wait in the main thread comes back every 200 ms to let signal handlers run.
* `_pushed` and `_popped` only grow; what lies between them is the ring's content.

`invariant` states what must hold at a place. It is C's assert: the debug build keeps it (see setup.py).
"""
import threading

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.stdint cimport INT64_MAX, int64_t
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

cdef extern from "<assert.h>" nogil:
    void invariant "assert"(bint)

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass
    ctypedef struct pthread_condattr_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *, void *)
    int pthread_mutex_destroy(pthread_mutex_t *)
    int pthread_mutex_lock(pthread_mutex_t *)
    int pthread_mutex_trylock(pthread_mutex_t *)
    int pthread_mutex_unlock(pthread_mutex_t *)
    int pthread_condattr_init(pthread_condattr_t *)
    int pthread_condattr_setclock(pthread_condattr_t *, int)
    int pthread_cond_init(pthread_cond_t *, pthread_condattr_t *)
    int pthread_cond_destroy(pthread_cond_t *)
    int pthread_cond_signal(pthread_cond_t *)
    int pthread_cond_broadcast(pthread_cond_t *)
    int pthread_cond_wait(pthread_cond_t *, pthread_mutex_t *)
    int pthread_cond_timedwait(pthread_cond_t *, pthread_mutex_t *, const timespec *)

# Why a batch was taken. The first that holds counts, in this order.
cdef enum Reason:
    NOT_DUE = -1
    FULL
    EVERYONE_IN
    TIMEOUT
    DRAIN

REASONS = ("full", "everyone_in", "timeout", "drain")

# What became of a ticket. It is WAITING, then perhaps TAKEN, then one of the others for good.
cdef enum State:
    _WAITING
    _TAKEN
    _FINISHED
    _LEFT
    _EXPIRED
    _CLOSED

WAITING, TAKEN, FINISHED, LEFT, EXPIRED, CLOSED = _WAITING, _TAKEN, _FINISHED, _LEFT, _EXPIRED, _CLOSED

cdef int64_t NEVER = INT64_MAX
cdef int64_t RECENT_NS = 1_000_000_000
cdef int64_t SIGNAL_CHECK_NS = 200_000_000
cdef int64_t MAX_WINDOW_NS = INT64_MAX // 4
cdef int64_t MAX_CAPACITY = 1 << 30

cdef struct stream_t:
    ticket_t *unfinished     # its one request without an outcome, or NULL
    bint is_open
    bint was_answered
    bint is_recent           # answered within RECENT_NS: a link of the room's list, oldest answer first
    int64_t answered_ns
    stream_t *older
    stream_t *newer

cdef struct ticket_t:
    PyObject *owner          # the Ticket around it
    stream_t *stream
    State state
    int64_t position         # its slot is position & mask; only while it waits
    int64_t pushed_ns
    int64_t taken_ns
    int64_t deadline_ns
    pthread_cond_t settled   # broadcast when the state is for good
    ticket_t *next           # chains tickets on their way out of the room

# Waits must not follow the wall clock: it jumps.
cdef pthread_condattr_t monotonic
pthread_condattr_init(&monotonic)
pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC)


cdef int64_t monotonic_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <int64_t>now.tv_sec * 1_000_000_000 + now.tv_nsec


cdef void wait_until(pthread_cond_t *condition, pthread_mutex_t *mutex, int64_t wake_ns) noexcept nogil:
    """Wait for the condition until a monotonic time; may come back for no reason, as condition variables do."""
    cdef timespec wake
    if wake_ns == NEVER:
        pthread_cond_wait(condition, mutex)
        return
    wake.tv_sec = wake_ns // 1_000_000_000
    wake.tv_nsec = wake_ns % 1_000_000_000
    pthread_cond_timedwait(condition, mutex, &wake)


cdef WaitingRoom room_of(Stream stream):
    """The room of a stream; one that Python made by itself has none."""
    if stream is None or stream._room is None:
        raise TypeError("a Stream comes from WaitingRoom.open_stream, and a Ticket from Stream.push")
    return stream._room


cdef bint in_main_thread():
    return threading.get_ident() == threading.main_thread().ident


class QueueFullError(Exception):
    """The room holds as many waiting requests as it may."""


class RoomClosedError(Exception):
    """The room takes no more requests."""


@cython.final
cdef class ManualClock:
    """A clock that stands until it is set, for tests of the window.

    It never wakes a sleeper: use it with `poll_batch`, not with the calls that block.
    """
    cdef public int64_t now_ns

    def __init__(self, now_ns=0):
        self.now_ns = now_ns


@cython.final
@cython.freelist(64)
@cython.no_gc_clear  # __dealloc__ needs the stream
cdef class Ticket:
    """One request's place in the room, made by `Stream.push`.

    request: the object that was pushed.
    outcome: the object that `WaitingRoom.finish` was given for it, if its state is FINISHED.
    """
    cdef ticket_t _c
    cdef Stream _stream
    cdef readonly object request
    cdef readonly object outcome

    def __cinit__(self):
        pthread_cond_init(&self._c.settled, &monotonic)
        self._c.owner = <PyObject *>self

    def __dealloc__(self):
        cdef WaitingRoom room
        if self._c.state == _TAKEN and self._stream._room is not None:
            # It was taken, and then thrown away without an outcome.
            room = self._stream._room
            room._enter()
            self._stream._c.unfinished = NULL
            room._leave()
        pthread_cond_destroy(&self._c.settled)

    @property
    def state(self):
        """WAITING, TAKEN, or what `wait` would return."""
        cdef WaitingRoom room = room_of(self._stream)
        room._enter()
        cdef State state = self._c.state
        room._leave()
        return <int>state

    @property
    def owner(self):
        """What `open_stream` was given."""
        room_of(self._stream)
        return self._stream._owner

    @property
    def pushed_ns(self):
        """When it was pushed, on the monotonic clock."""
        return self._c.pushed_ns

    @property
    def taken_ns(self):
        """When it was taken in a batch, on the monotonic clock; 0 before that."""
        return self._c.taken_ns

    def wait(self):
        """Block, without the GIL, until the ticket's state is for good, and return it:

        FINISHED: `outcome` is there.
        LEFT: its stream was closed.
        EXPIRED: its deadline passed, in the ring or in the callback.
        CLOSED: the room was abandoned.
        """
        cdef WaitingRoom room = room_of(self._stream)
        cdef bint check_signals = in_main_thread()
        cdef State state
        cdef bint left_the_ring = False
        while True:
            with nogil:
                state = room._await_settled(&self._c, check_signals, &left_the_ring)
            if left_the_ring:
                Py_DECREF(self)
            if state > _TAKEN:
                return <int>state
            PyErr_CheckSignals()


@cython.final
cdef class Stream:
    """A source of single requests, made by `WaitingRoom.open_stream`. The window counts it until it is closed."""
    cdef stream_t _c
    cdef WaitingRoom _room
    cdef object _owner

    def push(self, request, deadline_ns=None):
        """Let a request in and return its Ticket; never blocks.

        deadline_ns: monotonic time from which the request is worth nothing; None for never.

        Raises RoomClosedError or QueueFullError if the room takes no more, and RuntimeError while the stream's last
        request has no outcome. On a stream that was closed, in an open room, the ticket is LEFT at once.
        """
        cdef Ticket ticket = Ticket.__new__(Ticket)
        ticket._stream = self
        ticket.request = request
        ticket._c.deadline_ns = NEVER if deadline_ns is None else deadline_ns
        room_of(self)._admit(self, ticket)
        return ticket

    def close(self):
        """Take the stream, and a request of it that has no outcome, out of the room. May be called again."""
        room_of(self)._dismiss(self, _LEFT)


@cython.final
cdef class WaitingRoom:
    """A bounded first-in-first-out queue of requests that leave in batches.

    batch_size: most requests in a batch.
    window_ns: longest time for which the oldest request waits for others while the taker is free; 0 for not at all.
    capacity: most requests that may wait.
    clock: a ManualClock, for tests; None for the system's monotonic clock.

    Callers `open_stream`, `push` and `wait`; one taker thread alternates `take_batch` and `finish`. A batch is due
    as soon as one of these holds, and is counted under the first that does:

    full: `batch_size` requests wait.
    everyone_in: nobody could add one. Each waiting request is from a stream that was answered before, and each open
        stream that was answered within the last second is among them. (A stream's first request proves nothing about
        its caller.)
    timeout: the oldest waiting request has waited `window_ns`.
    drain: the room is closed.

    Every request that `push` let in ends in exactly one way: FINISHED by `finish`, LEFT as its stream closed, EXPIRED
    at its deadline, or CLOSED by `abandon`. It is handed out by `take_batch` at most once, and never after it ended;
    what `finish` says of a ticket that has ended already is dropped.

    `push`, `poll_batch`, `finish`, `close` and the properties never block. `take_batch` blocks until a batch is due or
    the room is closed and empty; `Ticket.wait` until the ticket ended. Both leave the GIL to others meanwhile.
    After `close`, `push` raises, and what waits leaves in batches at once. All calls may come from any thread; a room
    is of no use in a forked child.
    """
    cdef pthread_mutex_t _mutex
    cdef pthread_cond_t _due_sooner        # wakes a taker that would otherwise sleep past a due batch
    cdef ticket_t **_ring                  # NULL where a ticket left before its turn
    cdef int64_t _mask                     # the ring's size is a power of two: mask + 1
    cdef int64_t _pushed                   # next position to fill
    cdef int64_t _popped                   # oldest position that may hold a ticket
    cdef int64_t _waiting                  # tickets in the ring
    cdef int64_t _first_timers             # ... of them, those whose stream was never answered
    cdef int64_t _recent                   # open streams answered within the last second
    cdef int64_t _recent_waiting           # ... of them, those with a ticket in the ring
    cdef stream_t *_oldest_answer          # ends of the list of the recent streams
    cdef stream_t *_newest_answer
    cdef int64_t[4] _batches               # taken so far, by reason
    cdef int64_t _batched                  # requests in them
    cdef int64_t _takers                   # threads in take_batch that sleep
    cdef int64_t _taker_wakes_ns           # when the last of them to fall asleep wakes by itself
    cdef int64_t _closed                   # 0 or 1
    cdef ManualClock _clock
    cdef set _streams                      # the open ones; guarded by the GIL
    cdef readonly int64_t batch_size
    cdef readonly int64_t capacity
    cdef readonly int64_t window_ns

    def __cinit__(self):
        pthread_mutex_init(&self._mutex, NULL)
        pthread_cond_init(&self._due_sooner, &monotonic)

    def __init__(self, batch_size, window_ns, capacity, clock=None):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        if not 1 <= capacity <= MAX_CAPACITY:
            raise ValueError(f"capacity is {capacity}; it must be from 1 to {MAX_CAPACITY}")
        if not 0 <= window_ns <= MAX_WINDOW_NS:
            raise ValueError(f"window_ns is {window_ns}; it must be from 0 to {MAX_WINDOW_NS}")
        if self._ring != NULL:
            raise RuntimeError("a WaitingRoom is initialised once")
        cdef int64_t size = 1
        while size < capacity:
            size *= 2
        self._ring = <ticket_t **>PyMem_Malloc(size * sizeof(ticket_t *))
        if self._ring == NULL:
            raise MemoryError(f"a ring of {size} slots")
        self._mask = size - 1
        self.batch_size = batch_size
        self.capacity = capacity
        self.window_ns = window_ns
        self._clock = clock
        self._streams = set()

    def __dealloc__(self):
        # Nobody waits here any more: a waiting ticket keeps its stream alive, and so this room.
        PyMem_Free(self._ring)
        pthread_cond_destroy(&self._due_sooner)
        pthread_mutex_destroy(&self._mutex)

    # ---- what callers use ----

    def open_stream(self, owner=None):
        """Return a new Stream. The room keeps it until it is closed.

        owner: any object, to be found again as the `owner` of the stream's tickets.
        """
        cdef Stream stream = Stream.__new__(Stream)
        stream._owner = owner
        stream._room = self
        stream._c.is_open = True
        self._streams.add(stream)
        return stream

    def poll_batch(self):
        """Return (reason, tickets, oldest first) if a batch is due, else None."""
        cdef ticket_t *batch = NULL
        cdef ticket_t *expired = NULL
        self._enter()
        cdef Reason reason = self._pop_if_due(self._now_ns(), &batch, &expired)
        self._leave()
        return self._hand_out(reason, batch, expired)

    def is_due(self):
        """Whether a batch is due. (It may come to nothing, where all that wait have expired.)"""
        self._enter()
        cdef Reason reason = self._reason(self._now_ns())
        self._leave()
        return reason != NOT_DUE

    def take_batch(self):
        """Block until a batch is due and return (reason, tickets, oldest first); None once closed and empty."""
        cdef ticket_t *batch
        cdef ticket_t *expired
        cdef Reason reason
        cdef bint over = False
        cdef bint check_signals = in_main_thread()
        while True:
            batch = expired = NULL
            with nogil:
                reason = self._await_batch(check_signals, &batch, &expired, &over)
            taken = self._hand_out(reason, batch, expired)
            if taken is not None or over:
                return taken
            PyErr_CheckSignals()

    def finish(self, tickets, outcomes):
        """Give each taken ticket its outcome (any object), all at one moment, and wake those who wait for them.

        Raises ValueError unless there is one outcome per ticket and the tickets are this room's.
        """
        tickets, outcomes = tuple(tickets), tuple(outcomes)  # which nobody can change meanwhile
        cdef Py_ssize_t count = len(tickets)
        if len(outcomes) != count:
            raise ValueError(f"{len(outcomes)} outcomes for {count} tickets; there must be one each")
        cdef ticket_t **settled = <ticket_t **>PyMem_Malloc((count + 1) * sizeof(ticket_t *))
        if settled == NULL:
            raise MemoryError(f"a batch of {count} tickets")
        cdef Ticket ticket
        cdef Py_ssize_t i
        try:
            for i in range(count):
                ticket = tickets[i]
                if ticket is None or room_of(ticket._stream) is not self:
                    raise ValueError("a ticket of another room")
                settled[i] = &ticket._c
            self._enter()
            self._leave_out_ended(settled, count)
            self._leave()
            # Before the state says that it is there, and never again once the ticket ended.
            for i in range(count):
                if settled[i] != NULL:
                    (<Ticket>settled[i].owner).outcome = outcomes[i]
            self._enter()
            self._settle_answered(settled, count, self._now_ns())
            self._leave()
            # After the mutex, or those who wake would only queue up for it.
            for i in range(count):
                if settled[i] != NULL:
                    pthread_cond_broadcast(&settled[i].settled)
        finally:
            PyMem_Free(settled)

    def close(self):
        """Refuse further requests; those that wait are due at once. May be called again."""
        self._enter()
        self._closed = 1
        pthread_cond_broadcast(&self._due_sooner)
        self._leave()

    def abandon(self):
        """Close the room and its streams; what has no outcome yet is CLOSED. Returns how many that were."""
        self.close()
        cdef Stream stream
        abandoned = 0
        for stream in tuple(self._streams):
            abandoned += self._dismiss(stream, _CLOSED)
        return abandoned

    @property
    def closed(self):
        """Whether `close` or `abandon` was called."""
        return self._read_count(&self._closed) != 0

    @property
    def waiting(self):
        """Requests that wait now."""
        return self._read_count(&self._waiting)

    @property
    def pushed(self):
        """Ring positions filled so far."""
        return self._read_count(&self._pushed)

    @property
    def popped(self):
        """Ring positions emptied for good so far; never more than `pushed`."""
        return self._read_count(&self._popped)

    @property
    def takers(self):
        """Threads that sleep in `take_batch`."""
        return self._read_count(&self._takers)

    @property
    def open_streams(self):
        """Streams that were opened and not closed."""
        return len(self._streams)

    def batches(self):
        """Return what was taken so far, of one moment: batches by reason, and the requests in all of them."""
        cdef int64_t[4] batches
        cdef int64_t batched
        self._enter()
        batches = self._batches
        batched = self._batched
        self._leave()
        return dict(zip(REASONS, batches, strict=True)), batched

    # ---- between the GIL and the mutex ----

    cdef inline void _enter(self) noexcept:
        while pthread_mutex_trylock(&self._mutex) != 0:
            with nogil:
                sched_yield()

    cdef inline void _leave(self) noexcept nogil:
        pthread_mutex_unlock(&self._mutex)

    cdef int64_t _read_count(self, int64_t *field) noexcept:
        self._enter()
        cdef int64_t value = field[0]
        self._leave()
        return value

    cdef int _admit(self, Stream stream, Ticket ticket) except -1:
        """Put a new ticket into the ring, which then owns a reference to it. Wake the taker if need be."""
        cdef bint closed, full, busy, left
        self._enter()
        closed = self._closed
        full = self._waiting >= self.capacity
        busy = stream._c.unfinished != NULL
        left = not stream._c.is_open and not closed
        if left:
            ticket._c.state = _LEFT
        elif not (closed or full or busy):
            Py_INCREF(ticket)
            self._push(&stream._c, &ticket._c, self._now_ns())
        self._leave()
        if busy:
            raise RuntimeError("this stream's last request has no outcome yet; a stream has one request at a time")
        if closed:
            raise RoomClosedError("the room is closed")
        if full and not left:
            raise QueueFullError(f"{self.capacity} requests wait, and no more may")
        return 0

    cdef int _dismiss(self, Stream stream, State state) except -1:
        """Close a stream; what it still waits for ends in `state`. Returns how many requests that were: 0 or 1."""
        cdef ticket_t *ticket
        cdef bint left_the_ring = False
        self._streams.discard(stream)
        self._enter()
        ticket = stream._c.unfinished
        if ticket != NULL:
            left_the_ring = ticket.state == _WAITING
            self._settle(ticket, state)
            pthread_cond_broadcast(&ticket.settled)
        if stream._c.is_open:
            stream._c.is_open = False
            self._forget_answer(&stream._c)
            self._wake_if_due_sooner(self._now_ns())
        self._leave()
        if left_the_ring:
            Py_DECREF(<Ticket>ticket.owner)
        return ticket != NULL

    cdef _hand_out(self, Reason reason, ticket_t *batch, ticket_t *expired):
        """Turn chains of tickets that left the ring into what Python gets, and take over the ring's references."""
        cdef ticket_t *next
        while expired != NULL:
            next = expired.next
            Py_DECREF(<Ticket>expired.owner)
            expired = next
        if batch == NULL:
            return None
        tickets = []
        while batch != NULL:
            next = batch.next
            tickets.append(<Ticket>batch.owner)
            Py_DECREF(<Ticket>batch.owner)
            batch = next
        return REASONS[<int>reason], tickets

    # ---- below: without the GIL or with it, always under the mutex (the two _await functions take it themselves) ----

    cdef inline int64_t _now_ns(self) noexcept nogil:
        return monotonic_ns() if self._clock is None else self._clock.now_ns

    cdef State _await_settled(self, ticket_t *ticket, bint check_signals, bint *left_the_ring) noexcept nogil:
        """Wait until a ticket's state is for good; with `check_signals` come back early now and then."""
        cdef int64_t now_ns, wake_ns
        cdef State state
        pthread_mutex_lock(&self._mutex)
        while ticket.state <= _TAKEN:
            now_ns = self._now_ns()
            if now_ns >= ticket.deadline_ns:
                left_the_ring[0] = ticket.state == _WAITING
                self._settle(ticket, _EXPIRED)
                self._wake_if_due_sooner(now_ns)
                break
            wake_ns = ticket.deadline_ns
            if check_signals:
                wake_ns = min(wake_ns, now_ns + SIGNAL_CHECK_NS)
            wait_until(&ticket.settled, &self._mutex, wake_ns)
            if check_signals:
                break
        state = ticket.state
        pthread_mutex_unlock(&self._mutex)
        return state

    cdef Reason _await_batch(
        self, bint check_signals, ticket_t **batch, ticket_t **expired, bint *over
    ) noexcept nogil:
        """Wait for a due batch. Comes back without one if the room is over, a ticket expired, or to check signals."""
        cdef int64_t now_ns, wake_ns
        cdef Reason reason
        pthread_mutex_lock(&self._mutex)
        while True:
            now_ns = self._now_ns()
            reason = self._pop_if_due(now_ns, batch, expired)
            over[0] = self._closed and self._waiting == 0
            if batch[0] != NULL or expired[0] != NULL or over[0]:
                break
            wake_ns = self._due_ns(now_ns)
            if check_signals:
                wake_ns = min(wake_ns, now_ns + SIGNAL_CHECK_NS)
            self._takers += 1
            self._taker_wakes_ns = wake_ns
            wait_until(&self._due_sooner, &self._mutex, wake_ns)
            self._takers -= 1
            if check_signals:
                break
        pthread_mutex_unlock(&self._mutex)
        return reason

    cdef void _push(self, stream_t *stream, ticket_t *ticket, int64_t now_ns) noexcept nogil:
        invariant(self._waiting < self.capacity)
        if self._pushed - self._popped > self._mask:
            self._close_gaps()
        invariant(self._pushed - self._popped <= self._mask)
        ticket.stream = stream
        ticket.pushed_ns = now_ns
        ticket.position = self._pushed
        self._ring[self._pushed & self._mask] = ticket
        self._pushed += 1
        self._waiting += 1
        self._first_timers += not stream.was_answered
        self._recent_waiting += stream.is_recent
        stream.unfinished = ticket
        self._wake_if_due_sooner(now_ns)

    cdef void _close_gaps(self) noexcept nogil:
        """Move the tickets of a full ring towards its end, over the slots of those that left before their turn."""
        cdef int64_t source = self._pushed
        cdef int64_t target = self._pushed
        cdef ticket_t *ticket
        while source > self._popped:
            source -= 1
            ticket = self._ring[source & self._mask]
            if ticket != NULL:
                target -= 1
                ticket.position = target
                self._ring[target & self._mask] = ticket
        invariant(self._pushed - target == self._waiting)
        self._popped = target

    cdef void _leave_ring(self, ticket_t *ticket) noexcept nogil:
        cdef int64_t slot = ticket.position & self._mask
        invariant(ticket.state == _WAITING)
        invariant(self._ring[slot] == ticket)
        self._ring[slot] = NULL
        self._waiting -= 1
        self._first_timers -= not ticket.stream.was_answered
        self._recent_waiting -= ticket.stream.is_recent
        while self._popped < self._pushed and self._ring[self._popped & self._mask] == NULL:
            self._popped += 1
        invariant(0 <= self._waiting <= self._pushed - self._popped)
        invariant(0 <= self._first_timers <= self._waiting)
        invariant(0 <= self._recent_waiting <= self._recent)

    cdef void _settle(self, ticket_t *ticket, State state) noexcept nogil:
        """Give an unfinished ticket its last state. Its slot's reference, if it was waiting, is then the caller's."""
        invariant(ticket.state <= _TAKEN < state)
        invariant(ticket.stream.unfinished == ticket)
        if ticket.state == _WAITING:
            self._leave_ring(ticket)
        ticket.state = state
        ticket.stream.unfinished = NULL

    cdef void _settle_answered(self, ticket_t **tickets, Py_ssize_t count, int64_t now_ns) noexcept nogil:
        """Finish the tickets that still stand as taken; those that ended otherwise meanwhile become NULL."""
        cdef Py_ssize_t i
        for i in range(count):
            if tickets[i] == NULL or tickets[i].state != _TAKEN:  # again, for one that is listed twice
                tickets[i] = NULL
                continue
            self._settle(tickets[i], _FINISHED)
            self._remember_answer(tickets[i].stream, now_ns)

    cdef void _leave_out_ended(self, ticket_t **tickets, Py_ssize_t count) noexcept nogil:
        """NULL stands for a ticket that is not, or no longer, taken."""
        cdef Py_ssize_t i
        for i in range(count):
            if tickets[i] != NULL and tickets[i].state != _TAKEN:
                tickets[i] = NULL

    cdef Reason _pop_if_due(self, int64_t now_ns, ticket_t **batch, ticket_t **expired) noexcept nogil:
        """Take the oldest requests if a batch is due; those whose deadline has passed leave too, but into `expired`."""
        cdef Reason reason = self._reason(now_ns)
        cdef int64_t room_left = self.batch_size
        cdef ticket_t *ticket
        if reason == NOT_DUE:
            return reason
        while self._waiting > 0 and room_left > 0:
            ticket = self._ring[self._popped & self._mask]
            if now_ns >= ticket.deadline_ns:
                self._settle(ticket, _EXPIRED)
                pthread_cond_broadcast(&ticket.settled)
                ticket.next = expired[0]
                expired[0] = ticket
                continue
            self._leave_ring(ticket)
            ticket.state = _TAKEN
            ticket.taken_ns = now_ns
            ticket.next = NULL
            batch[0] = ticket
            batch = &ticket.next
            room_left -= 1
        if room_left == self.batch_size:
            return NOT_DUE
        self._batches[<int>reason] += 1
        self._batched += self.batch_size - room_left
        return reason

    # ---- the window ----

    cdef Reason _reason(self, int64_t now_ns) noexcept nogil:
        if self._waiting == 0:
            return NOT_DUE
        if self._waiting >= self.batch_size:
            return FULL
        self._forget_old_answers(now_ns)
        if self._first_timers == 0 and self._recent == self._recent_waiting:
            return EVERYONE_IN
        if now_ns - self._oldest_pushed_ns() >= self.window_ns:
            return TIMEOUT
        return DRAIN if self._closed else NOT_DUE

    cdef int64_t _due_ns(self, int64_t now_ns) noexcept nogil:
        """When a batch will be due if nothing else happens (or may be, and it is worth looking again)."""
        cdef int64_t due_ns
        if self._waiting == 0:
            return NEVER
        if self._reason(now_ns) != NOT_DUE:
            return now_ns
        due_ns = self._oldest_pushed_ns() + self.window_ns
        if self._first_timers == 0:
            # Only streams that were answered a while ago are missing: soon they will not count any more.
            due_ns = min(due_ns, self._oldest_answer.answered_ns + RECENT_NS)
        return due_ns

    cdef inline int64_t _oldest_pushed_ns(self) noexcept nogil:
        return self._ring[self._popped & self._mask].pushed_ns

    cdef void _wake_if_due_sooner(self, int64_t now_ns) noexcept nogil:
        if self._takers > 0 and self._due_ns(now_ns) < self._taker_wakes_ns:
            pthread_cond_signal(&self._due_sooner)

    cdef void _remember_answer(self, stream_t *stream, int64_t now_ns) noexcept nogil:
        stream.was_answered = True
        if not stream.is_open:
            return
        self._forget_answer(stream)
        stream.is_recent = True
        stream.answered_ns = now_ns
        stream.older = self._newest_answer
        stream.newer = NULL
        if stream.older == NULL:
            self._oldest_answer = stream
        else:
            stream.older.newer = stream
        self._newest_answer = stream
        self._recent += 1
        self._recent_waiting += stream.unfinished != NULL and stream.unfinished.state == _WAITING

    cdef void _forget_answer(self, stream_t *stream) noexcept nogil:
        if not stream.is_recent:
            return
        if stream.older == NULL:
            self._oldest_answer = stream.newer
        else:
            stream.older.newer = stream.newer
        if stream.newer == NULL:
            self._newest_answer = stream.older
        else:
            stream.newer.older = stream.older
        stream.is_recent = False
        self._recent -= 1
        self._recent_waiting -= stream.unfinished != NULL and stream.unfinished.state == _WAITING

    cdef void _forget_old_answers(self, int64_t now_ns) noexcept nogil:
        while self._oldest_answer != NULL and now_ns - self._oldest_answer.answered_ns >= RECENT_NS:
            self._forget_answer(self._oldest_answer)
