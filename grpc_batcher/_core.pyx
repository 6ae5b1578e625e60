# cython: autotestdict=False, auto_pickle=False
"""The waiting room: requests come in one by one and leave in batches.

This module knows nothing about gRPC, models or messages. A request is any object, and so is its outcome.

Rules for changing this file:

* Each room has one mutex. It guards every C field of the room, of the room's streams and of their tickets.
* Never acquire the GIL, touch a Python object or raise while holding the mutex.
* Never block while holding the GIL. `_lock`, which is called with the GIL, yields both until it has the mutex.
* Every wait is a loop over a predicate, with an absolute timeout in nanoseconds on the monotonic clock.
* The ring owns one reference to each waiting ticket. Whoever removes a ticket drops that reference, or passes it on,
  after releasing the mutex.
* Finishing a batch wakes the threads that wait for that batch, and no others.
* A wait on the main thread returns every 200 ms so that signal handlers can run.
* `_pushed` and `_popped` only grow. The ring holds the positions between them.

`invariant` states what must be true at that point. It is C's assert, which only debug builds check (see setup.py).
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

# Why a batch left. If several reasons hold, the first in this order counts.
cdef enum Reason:
    NOT_DUE = -1
    FULL
    EVERYONE_IN
    TIMEOUT
    DRAIN

REASONS = ("full", "everyone_in", "timeout", "drain")

# A ticket is WAITING, then perhaps TAKEN, and ends in one of the other states.
cdef enum State:
    _WAITING
    _TAKEN
    _FINISHED
    _LEFT
    _EXPIRED
    _CLOSED

WAITING, TAKEN, FINISHED, LEFT, EXPIRED, CLOSED = _WAITING, _TAKEN, _FINISHED, _LEFT, _EXPIRED, _CLOSED

cdef int64_t NEVER = INT64_MAX
cdef int64_t NO_LIMIT = INT64_MAX
cdef int64_t RECENT_NS = 1_000_000_000
cdef int64_t SIGNAL_CHECK_NS = 200_000_000
cdef int64_t MAX_WINDOW_NS = INT64_MAX // 4
cdef int64_t MAX_CAPACITY = 1 << 30
cdef int64_t MAX_CAPACITY_BYTES = 1 << 62

# Guarded by the room's mutex.
cdef struct stream_t:
    ticket_t *unfinished     # the stream's one request that has not ended, or NULL
    bint is_open
    bint was_answered
    bint is_pooled           # never changes after `open_stream`
    bint is_recent           # answered within RECENT_NS, and so linked into the room's list of recent streams
    int64_t answered_ns
    stream_t *older          # neighbours in that list
    stream_t *newer

# Guarded by the room's mutex, except what never changes after `push`: `wrapper`, `pushed_ns`, `deadline_ns`,
# `size_bytes` and `rows`.
cdef struct ticket_t:
    PyObject *wrapper        # the Ticket that contains this struct; borrowed
    stream_t *stream
    State state
    int64_t position         # while it waits, its slot in the ring is position & mask
    int64_t pushed_ns
    int64_t taken_ns
    int64_t deadline_ns      # NEVER if it has none
    int64_t size_bytes
    int64_t rows
    pthread_cond_t settled   # broadcast when the ticket ends
    ticket_t *next           # links tickets that were removed from the ring and not yet handed out

# The wall clock can jump, so no wait may depend on it.
cdef pthread_condattr_t monotonic
pthread_condattr_init(&monotonic)
pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC)


cdef int64_t monotonic_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <int64_t>now.tv_sec * 1_000_000_000 + now.tv_nsec


cdef void wait_until(pthread_cond_t *condition, pthread_mutex_t *mutex, int64_t wake_ns) noexcept nogil:
    """Wait for the condition until a monotonic time. Spurious wake-ups are possible, as always."""
    cdef timespec wake
    if wake_ns == NEVER:
        pthread_cond_wait(condition, mutex)
        return
    wake.tv_sec = wake_ns // 1_000_000_000
    wake.tv_nsec = wake_ns % 1_000_000_000
    pthread_cond_timedwait(condition, mutex, &wake)


cdef WaitingRoom room_of(Stream stream):
    """Return the room of a stream. A Stream or Ticket that was constructed directly has none."""
    if stream is None or stream._room is None:
        raise TypeError("use WaitingRoom.open_stream to create a Stream, and Stream.push to create a Ticket")
    return stream._room


cdef bint in_main_thread() except -1:
    return threading.get_ident() == threading.main_thread().ident


class QueueFullError(Exception):
    """The request was refused because the waiting requests would have more than `capacity` rows with it."""


class QueueBytesFullError(QueueFullError):
    """The request was refused because the waiting requests would have more than `capacity_bytes` bytes with it."""


class RoomClosedError(Exception):
    """The request was refused because the room is closed."""


@cython.final
cdef class ManualClock:
    """A clock that stands still until it is set, for testing windows and deadlines.

    Setting it does not wake sleeping threads: use it with `poll_batch`, not with calls that block.

    now_ns: the time it shows.
    """
    cdef public int64_t now_ns

    def __init__(self, now_ns=0):
        self.now_ns = now_ns


@cython.final
@cython.freelist(64)
@cython.no_gc_clear  # __dealloc__ uses the stream
cdef class Ticket:
    """One request and what became of it. Created by `Stream.push`.

    request: the object that was pushed.
    outcome: the object that was passed to `WaitingRoom.finish`, if the state is FINISHED.
    """
    cdef ticket_t _c
    cdef Stream _stream
    cdef readonly object request
    cdef readonly object outcome

    def __cinit__(self):
        pthread_cond_init(&self._c.settled, &monotonic)
        self._c.wrapper = <PyObject *>self

    def __dealloc__(self):
        cdef WaitingRoom room
        if self._c.state == _TAKEN and self._stream._room is not None:
            # The batch was thrown away without an outcome. The stream may push again.
            room = self._stream._room
            room._lock()
            self._stream._c.unfinished = NULL
            room._unlock()
        pthread_cond_destroy(&self._c.settled)

    @property
    def state(self):
        """The state now: WAITING, TAKEN, or the final state that `wait` returns."""
        cdef WaitingRoom room = room_of(self._stream)
        room._lock()
        cdef State state = self._c.state
        room._unlock()
        return <int>state

    @property
    def owner(self):
        """The object that was passed to `open_stream`."""
        room_of(self._stream)
        return self._stream._owner

    @property
    def rows(self):
        """The `rows` that the request was pushed with."""
        return self._c.rows

    @property
    def pushed_ns(self):
        """Monotonic time of the push, in nanoseconds."""
        return self._c.pushed_ns

    @property
    def taken_ns(self):
        """Monotonic time at which a batch took the request, in nanoseconds; 0 if none has."""
        return room_of(self._stream)._read_count(&self._c.taken_ns)

    def wait(self):
        """Block, without the GIL, until the request ends, and return its final state.

        FINISHED: `outcome` is set.
        LEFT: the stream was closed.
        EXPIRED: the deadline passed, before or after a batch took the request.
        CLOSED: the room was abandoned.

        On the main thread, signal handlers run meanwhile. If one raises, `wait` raises that and may be called again.
        """
        cdef WaitingRoom room = room_of(self._stream)
        cdef bint check_signals = in_main_thread()
        cdef State state
        cdef bint was_waiting = False
        while True:
            with nogil:
                state = room._await_settled(&self._c, check_signals, &was_waiting)
            if was_waiting:
                Py_DECREF(self)
            if state > _TAKEN:
                return <int>state
            PyErr_CheckSignals()


@cython.final
cdef class Stream:
    """A caller's connection to the room, with one request at a time. Created by `WaitingRoom.open_stream`."""
    cdef stream_t _c
    cdef WaitingRoom _room
    cdef object _owner

    def push(self, request, deadline_ns=None, int64_t size_bytes=0, int64_t rows=1):
        """Put a request into the queue and return its Ticket. Never blocks.

        deadline_ns: monotonic time from which the answer is useless; None for no deadline.
        size_bytes: what the request counts towards `capacity_bytes` while it waits; at least 0.
        rows: what the request counts towards `batch_size`, and towards `capacity` while it waits; from 1 to
            `batch_size`.

        If the stream is closed and the room is not, the ticket's state is LEFT at once.

        Raises RoomClosedError if the room is closed, QueueFullError if the request would exceed `capacity`, its
        subclass QueueBytesFullError if it would exceed `capacity_bytes`, RuntimeError if the stream's last request has
        not ended, and ValueError if `size_bytes` or `rows` is out of range.
        """
        cdef WaitingRoom room = room_of(self)
        if size_bytes < 0:
            raise ValueError(f"size_bytes is {size_bytes}; it must be at least 0")
        if not 1 <= rows <= room.batch_size:
            raise ValueError(f"rows is {rows}; it must be from 1 to {room.batch_size}")
        cdef Ticket ticket = Ticket.__new__(Ticket)
        ticket._stream = self
        ticket.request = request
        ticket._c.deadline_ns = NEVER if deadline_ns is None else deadline_ns
        ticket._c.size_bytes = size_bytes
        ticket._c.rows = rows
        room._admit(self, ticket)
        return ticket

    def close(self):
        """Close the stream. If it has a request that has not ended, that ends as LEFT. May be called again."""
        room_of(self)._dismiss(self, _LEFT)


@cython.final
cdef class WaitingRoom:
    """A bounded first-in, first-out queue whose requests leave in batches.

    batch_size: most rows per batch, at least 1. A request has one row unless it is pushed with more.
    window_ns: nanoseconds that the oldest request may wait for others while the taker is free; 0 for none.
    capacity: most rows that may wait, from 1 to 2**30.
    capacity_bytes: most bytes that waiting requests may have in total, by the `size_bytes` they were pushed with; at
        least 1, or None for no limit.
    leave_early: whether a batch leaves as soon as everyone is in (see below).
    clock: a ManualClock, for tests; None for the system's monotonic clock.

    **Use.** A caller opens a stream, pushes a request and waits for its ticket. One taker thread calls `take_batch` and
    `finish` in turn. Every method may be called from any thread. A room must not be used in a forked child.

    **When a batch leaves.** A batch is due as soon as one of these holds; if several do, the first one is its reason:

    full: `batch_size` rows or more are waiting.
    everyone_in: no more are expected. Every waiting request is from a stream that was answered before, and every open
        stream that was answered within the last second has a request waiting. (A stream's first request says nothing
        about what its caller will do.) With `leave_early=False` this reason does not exist. A pooled stream no longer
        counts once a batch has waited for it in vain, for a whole window, until it is answered again.
    timeout: the oldest waiting request has waited for `window_ns`.
    drain: the room is closed.

    The oldest requests leave first. Requests past their deadline are removed before the reason is decided, so it is
    true of the requests that are left.

    **Rows.** A batch takes the oldest requests as long as their rows fit into `batch_size`. A request is never split or
    overtaken: the first that does not fit ends the batch, even if smaller ones behind it would fit. A full batch
    therefore has either exactly `batch_size` rows, or too many for the next request. A batch that leaves for another
    reason takes every request that is waiting.

    **How a request ends.** Each request that `push` accepts ends in exactly one way: FINISHED by `finish`, LEFT because
    its stream closed, EXPIRED at its deadline, or CLOSED by `abandon`. A batch contains it at most once and never after
    it has ended. An outcome for a ticket that has already ended is dropped. A deadline takes effect when somebody
    looks: a thread in the ticket's `wait`, or the taker when a batch is due. Until then the request counts as waiting.

    **Limits.** Past `capacity` or `capacity_bytes`, `push` raises at once; it never waits for space. A request
    with more rows than `capacity`, or larger than `capacity_bytes`, is refused even by an empty room. Requests count
    while they wait; once a batch takes them they no longer do.

    **What blocks.** Only `take_batch` and `Ticket.wait`, both without holding the GIL:

    take_batch: until a batch is due. A push, a stream or room that closes, an expired request and the passing of time
        can make one due. It returns None once the room is closed and no request is waiting. `nudge` makes it return
        without a batch.
    Ticket.wait: until the request ends.

    **Closing.** After `close`, `push` raises RoomClosedError, waiting requests are due at once, and batches that were
    taken can still be finished. `abandon` also closes every stream and ends every request that has not ended as CLOSED,
    which wakes its waiters.
    """
    # Constant after __init__; the ring's slots are guarded by _mutex.
    cdef ticket_t **_ring                  # a slot is NULL if its ticket was removed before its turn
    cdef int64_t _mask                     # the ring's size is a power of two: mask + 1
    cdef int64_t _capacity_bytes           # NO_LIMIT for none
    cdef ManualClock _clock
    cdef readonly int64_t batch_size
    cdef readonly int64_t window_ns
    cdef readonly int64_t capacity
    cdef readonly bint leave_early
    # Guarded by the GIL.
    cdef set _streams                      # the open ones
    # Guarded by _mutex.
    cdef pthread_mutex_t _mutex
    cdef pthread_cond_t _due_sooner        # signalled when a batch is due before the taker would wake by itself
    cdef int64_t _pushed                   # next position to fill
    cdef int64_t _popped                   # oldest position that may hold a ticket
    cdef int64_t _waiting                  # tickets in the ring
    cdef int64_t _waiting_rows             # their rows, added up
    cdef int64_t _waiting_bytes            # their size_bytes, added up
    cdef int64_t _first_timers             # tickets in the ring whose stream was never answered
    cdef int64_t _recent                   # open streams answered within the last second; 0 unless leave_early
    cdef int64_t _recent_waiting           # recent streams with a ticket in the ring
    cdef stream_t *_oldest_answer          # the list of recent streams, in the order of their answers
    cdef stream_t *_newest_answer
    cdef int64_t[4] _batches               # batches taken so far, by reason
    cdef int64_t _batched                  # requests in those batches
    cdef int64_t _batched_rows             # rows of those requests
    cdef int64_t _takers                   # threads that sleep in take_batch
    cdef int64_t _taker_wakes_ns           # when the one that fell asleep last wakes by itself
    cdef bint _nudged                      # the taker is to return without a batch
    cdef int64_t _closed                   # 0 or 1

    def __cinit__(self):
        pthread_mutex_init(&self._mutex, NULL)
        pthread_cond_init(&self._due_sooner, &monotonic)

    def __init__(self, batch_size, window_ns, capacity, *, capacity_bytes=None, leave_early=True, clock=None):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        if not 1 <= capacity <= MAX_CAPACITY:
            raise ValueError(f"capacity is {capacity}; it must be from 1 to {MAX_CAPACITY}")
        if capacity_bytes is not None and not 1 <= capacity_bytes <= MAX_CAPACITY_BYTES:
            raise ValueError(f"capacity_bytes is {capacity_bytes}; it must be None or from 1 to {MAX_CAPACITY_BYTES}")
        if not 0 <= window_ns <= MAX_WINDOW_NS:
            raise ValueError(f"window_ns is {window_ns}; it must be from 0 to {MAX_WINDOW_NS}")
        if self._ring != NULL:
            raise RuntimeError("this WaitingRoom is already initialised")
        # Half of the slots or more are spare, so _push calls _close_gaps, which visits every slot, at most once per
        # `capacity` pushes. A push then costs O(1) on average, even if requests leave from the middle of a full room.
        cdef int64_t size = 2
        while size < 2 * capacity:
            size *= 2
        self._ring = <ticket_t **>PyMem_Malloc(size * sizeof(ticket_t *))
        if self._ring == NULL:
            raise MemoryError(f"a ring of {size} slots")
        self._mask = size - 1
        self.batch_size = batch_size
        self.window_ns = window_ns
        self.capacity = capacity
        self._capacity_bytes = NO_LIMIT if capacity_bytes is None else capacity_bytes
        self.leave_early = leave_early
        self._clock = clock
        self._streams = set()

    def __dealloc__(self):
        # The ring is empty: each waiting ticket keeps its stream alive, and that this room.
        PyMem_Free(self._ring)
        pthread_cond_destroy(&self._due_sooner)
        pthread_mutex_destroy(&self._mutex)

    # ---- methods for Python ----

    def open_stream(self, owner=None, *, bint pooled=False):
        """Return a new Stream, which the room keeps alive until it is closed.

        owner: any object; it is the `owner` of the stream's tickets.
        pooled: whether its caller has several such streams and uses any of them, so that an idle one says little about
            what the caller will do.
        """
        cdef Stream stream = Stream.__new__(Stream)
        stream._owner = owner
        stream._room = self
        stream._c.is_open = True
        stream._c.is_pooled = pooled
        self._streams.add(stream)
        return stream

    def poll_batch(self):
        """Take a batch if one is due, without blocking.

        Returns (reason, tickets), with the oldest ticket first, or None if no batch is due.
        """
        cdef ticket_t *batch = NULL
        cdef ticket_t *expired = NULL
        self._lock()
        cdef Reason reason = self._pop_if_due(self._now_ns(), &batch, &expired)
        self._unlock()
        return self._hand_out(reason, batch, expired)

    def is_due(self):
        """Return whether a batch is due, without taking it.

        Requests past their deadline still count here, so `poll_batch` may return None even though this was true.
        """
        self._lock()
        cdef Reason reason = self._reason(self._now_ns())
        self._unlock()
        return reason != NOT_DUE

    def take_batch(self):
        """Block, without the GIL, until a batch is due, and take it.

        Returns (reason, tickets), with the oldest ticket first, or None once the room is closed and nothing is waiting.
        After a `nudge`, returns ("nudge", []) rather than wait.

        On the main thread, signal handlers run meanwhile. If one raises, this raises that, and no request is lost.
        """
        cdef ticket_t *batch
        cdef ticket_t *expired
        cdef Reason reason
        cdef bint over = False
        cdef bint nudged = False
        cdef bint check_signals = in_main_thread()
        while True:
            batch = expired = NULL
            with nogil:
                reason = self._await_batch(check_signals, &batch, &expired, &over, &nudged)
            if nudged:
                return "nudge", []
            taken = self._hand_out(reason, batch, expired)
            if taken is not None or over:
                return taken
            PyErr_CheckSignals()

    def nudge(self):
        """Have `take_batch` return even if no batch is due: now if a thread is in it, otherwise the next time."""
        self._lock()
        self._nudged = True
        pthread_cond_signal(&self._due_sooner)
        self._unlock()

    def finish(self, tickets, outcomes):
        """Give each taken ticket its outcome (any object), all at the same moment, and wake the threads that wait.

        Tickets that have not been taken, or have already ended, are skipped.

        Raises ValueError if the number of outcomes differs from that of the tickets, or if a ticket belongs to another
        room. Nothing is finished then.
        """
        tickets, outcomes = tuple(tickets), tuple(outcomes)  # no other thread can change these
        cdef Py_ssize_t count = len(tickets)
        if len(outcomes) != count:
            raise ValueError(f"{len(outcomes)} outcomes for {count} tickets; there must be one for each ticket")
        cdef ticket_t **settled = <ticket_t **>PyMem_Malloc((count + 1) * sizeof(ticket_t *))
        if settled == NULL:
            raise MemoryError(f"a batch of {count} tickets")
        cdef Ticket ticket
        cdef Py_ssize_t i
        try:
            for i in range(count):
                ticket = tickets[i]
                if ticket is None or room_of(ticket._stream) is not self:
                    raise ValueError("one of the tickets belongs to another room")
                settled[i] = &ticket._c
            self._lock()
            self._drop_ended(settled, count)
            self._unlock()
            # The outcome is set before the state says so. A ticket that has ended keeps what it has.
            for i in range(count):
                if settled[i] != NULL:
                    (<Ticket>settled[i].wrapper).outcome = outcomes[i]
            self._lock()
            self._settle_answered(settled, count, self._now_ns())
            self._unlock()
            # Without the mutex, or every thread that wakes would have to wait for it.
            for i in range(count):
                if settled[i] != NULL:
                    pthread_cond_broadcast(&settled[i].settled)
        finally:
            PyMem_Free(settled)

    def close(self):
        """Refuse further requests. Those waiting are due at once. May be called again."""
        self._lock()
        self._closed = 1
        pthread_cond_broadcast(&self._due_sooner)
        self._unlock()

    def abandon(self):
        """Close the room and every stream. Requests that have not ended become CLOSED. May be called again.

        Returns the number of those requests.
        """
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
        """Requests that are waiting now."""
        return self._read_count(&self._waiting)

    @property
    def waiting_rows(self):
        """The `rows` of the requests that are waiting now, added up."""
        return self._read_count(&self._waiting_rows)

    @property
    def waiting_bytes(self):
        """The `size_bytes` of the requests that are waiting now, added up."""
        return self._read_count(&self._waiting_bytes)

    @property
    def capacity_bytes(self):
        """Most bytes that may wait; None for no limit."""
        return None if self._capacity_bytes == NO_LIMIT else self._capacity_bytes

    @property
    def pushed(self):
        """Requests accepted so far, and so positions of the ring that were filled."""
        return self._read_count(&self._pushed)

    @property
    def popped(self):
        """Positions of the ring before the oldest waiting request; equal to `pushed` if nothing is waiting."""
        return self._read_count(&self._popped)

    @property
    def takers(self):
        """Threads that are asleep in `take_batch`."""
        return self._read_count(&self._takers)

    @property
    def open_streams(self):
        """Streams that are open now."""
        return len(self._streams)

    def batches(self):
        """Return (batches taken so far by reason, requests in them, rows in them), all as of the same moment."""
        cdef int64_t[4] batches
        cdef int64_t requests, rows
        self._lock()
        batches = self._batches
        requests = self._batched
        rows = self._batched_rows
        self._unlock()
        return dict(zip(REASONS, batches, strict=True)), requests, rows

    # ---- with the GIL, and with the mutex only between _lock and _unlock ----

    cdef inline void _lock(self) noexcept:
        while pthread_mutex_trylock(&self._mutex) != 0:
            with nogil:
                sched_yield()

    cdef inline void _unlock(self) noexcept nogil:
        pthread_mutex_unlock(&self._mutex)

    cdef int64_t _read_count(self, int64_t *field) noexcept:
        self._lock()
        cdef int64_t value = field[0]
        self._unlock()
        return value

    cdef int _admit(self, Stream stream, Ticket ticket) except -1:
        """Put a new ticket into the ring, which then owns a reference to it, or raise why it was refused."""
        cdef bint closed, full, bytes_full, busy, left
        cdef int64_t waiting, waiting_rows, waiting_bytes
        self._lock()
        closed = self._closed
        waiting = self._waiting
        waiting_rows = self._waiting_rows
        waiting_bytes = self._waiting_bytes
        # This way round neither can overflow.
        full = ticket._c.rows > self.capacity - waiting_rows
        bytes_full = ticket._c.size_bytes > self._capacity_bytes - waiting_bytes
        busy = stream._c.unfinished != NULL
        left = not stream._c.is_open and not closed
        if left:
            ticket._c.state = _LEFT
        elif not (closed or full or bytes_full or busy):
            Py_INCREF(ticket)
            self._push(&stream._c, &ticket._c, self._now_ns())
        self._unlock()
        if busy:
            raise RuntimeError("this stream's last request has not ended; a stream has one request at a time")
        if closed:
            raise RoomClosedError("the room is closed")
        if left:
            return 0
        if full and ticket._c.rows == 1:
            counted = "requests" if waiting == waiting_rows else "rows"
            raise QueueFullError(f"the queue is full: {waiting_rows} {counted} are waiting, the most allowed")
        if full:
            raise QueueFullError(
                f"the queue is full: {waiting_rows} rows are waiting, and this request's {ticket._c.rows} "
                f"would exceed the limit of {self.capacity}"
            )
        if bytes_full:
            raise QueueBytesFullError(
                f"the queue is full: {waiting_bytes} bytes are waiting, and this request's {ticket._c.size_bytes} "
                f"would exceed the limit of {self._capacity_bytes}"
            )
        return 0

    cdef int _dismiss(self, Stream stream, State state) except -1:
        """Close a stream, whose request, if it has not ended, ends in `state`. Returns how many that were: 0 or 1."""
        cdef ticket_t *ticket
        cdef bint was_waiting = False
        self._streams.discard(stream)
        self._lock()
        ticket = stream._c.unfinished
        if ticket != NULL:
            was_waiting = ticket.state == _WAITING
            self._settle(ticket, state)
            pthread_cond_broadcast(&ticket.settled)
        if stream._c.is_open:
            stream._c.is_open = False
            self._forget_answer(&stream._c)
            self._wake_if_due_sooner(self._now_ns())
        self._unlock()
        if was_waiting:
            Py_DECREF(<Ticket>ticket.wrapper)
        return ticket != NULL

    cdef _hand_out(self, Reason reason, ticket_t *batch, ticket_t *expired):
        """Return a chain of taken tickets as `take_batch` does, and drop the ring's references to both chains."""
        cdef ticket_t *next
        while expired != NULL:
            next = expired.next
            Py_DECREF(<Ticket>expired.wrapper)
            expired = next
        if batch == NULL:
            return None
        tickets = []
        while batch != NULL:
            next = batch.next
            tickets.append(<Ticket>batch.wrapper)
            Py_DECREF(<Ticket>batch.wrapper)
            batch = next
        return REASONS[<int>reason], tickets

    # ---- with or without the GIL, always with the mutex (the two _await methods acquire it themselves) ----

    cdef inline int64_t _now_ns(self) noexcept nogil:
        return monotonic_ns() if self._clock is None else self._clock.now_ns

    cdef State _await_settled(self, ticket_t *ticket, bint check_signals, bint *was_waiting) noexcept nogil:
        """Wait until a ticket ends. With `check_signals`, return early from time to time.

        was_waiting: set if this removed the ticket from the ring, whose reference to it is then the caller's.
        """
        cdef int64_t now_ns, wake_ns
        cdef State state
        pthread_mutex_lock(&self._mutex)
        while ticket.state <= _TAKEN:
            now_ns = self._now_ns()
            if now_ns >= ticket.deadline_ns:
                was_waiting[0] = ticket.state == _WAITING
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
        self, bint check_signals, ticket_t **batch, ticket_t **expired, bint *over, bint *nudged
    ) noexcept nogil:
        """Wait until a batch is due, and take it.

        Returns without one if the room is closed and empty (`over`), if it was `nudged`, if tickets expired, or to
        check for signals. The ring's references to the tickets in `batch` and `expired` are then the caller's.
        """
        cdef int64_t now_ns, wake_ns
        cdef Reason reason = NOT_DUE
        pthread_mutex_lock(&self._mutex)
        while True:
            now_ns = self._now_ns()
            reason = self._pop_if_due(now_ns, batch, expired)
            over[0] = self._closed and self._waiting == 0
            if batch[0] != NULL or expired[0] != NULL or over[0]:
                break
            # Only now: nudges that follow one another without a pause must keep nobody waiting.
            nudged[0], self._nudged = self._nudged, False
            if nudged[0]:
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
        """Put a ticket into the ring, which takes over the caller's reference. Wake the taker if need be."""
        invariant(1 <= ticket.rows <= self.batch_size)
        if self._pushed - self._popped > self._mask:
            self._close_gaps()
        invariant(self._pushed - self._popped <= self._mask)
        ticket.stream = stream
        ticket.pushed_ns = now_ns
        ticket.position = self._pushed
        self._ring[self._pushed & self._mask] = ticket
        self._pushed += 1
        self._waiting += 1
        self._waiting_rows += ticket.rows
        self._waiting_bytes += ticket.size_bytes
        self._first_timers += not stream.was_answered
        self._recent_waiting += stream.is_recent
        stream.unfinished = ticket
        invariant(self._waiting <= self._waiting_rows <= self.capacity)
        invariant(0 <= ticket.size_bytes <= self._waiting_bytes <= self._capacity_bytes)
        self._wake_if_due_sooner(now_ns)

    cdef void _close_gaps(self) noexcept nogil:
        """Move all tickets to the newest positions, so that none is empty between them."""
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

    cdef void _remove(self, ticket_t *ticket) noexcept nogil:
        """Take a ticket out of the ring, whose reference to it is then the caller's."""
        cdef int64_t slot = ticket.position & self._mask
        invariant(ticket.state == _WAITING)
        invariant(self._ring[slot] == ticket)
        self._ring[slot] = NULL
        self._waiting -= 1
        self._waiting_rows -= ticket.rows
        self._waiting_bytes -= ticket.size_bytes
        self._first_timers -= not ticket.stream.was_answered
        self._recent_waiting -= ticket.stream.is_recent
        while self._popped < self._pushed and self._ring[self._popped & self._mask] == NULL:
            self._popped += 1
        invariant(0 <= self._waiting <= self._pushed - self._popped)
        invariant(self._waiting <= self._waiting_rows <= self.capacity)
        invariant(0 <= self._waiting_bytes <= self._capacity_bytes)
        invariant(self._waiting > 0 or self._waiting_rows == self._waiting_bytes == 0)
        invariant(0 <= self._first_timers <= self._waiting)
        invariant(0 <= self._recent_waiting <= self._recent)

    cdef void _settle(self, ticket_t *ticket, State state) noexcept nogil:
        """End a ticket. If it was waiting, the ring's reference to it is then the caller's."""
        invariant(ticket.state <= _TAKEN < state)
        invariant(ticket.stream.unfinished == ticket)
        if ticket.state == _WAITING:
            self._remove(ticket)
        ticket.state = state
        ticket.stream.unfinished = NULL

    cdef void _settle_answered(self, ticket_t **tickets, Py_ssize_t count, int64_t now_ns) noexcept nogil:
        """Finish the tickets that are still TAKEN, and replace the others by NULL."""
        cdef Py_ssize_t i
        for i in range(count):
            # The state is read for each in turn, as a ticket may be listed twice.
            if tickets[i] == NULL or tickets[i].state != _TAKEN:
                tickets[i] = NULL
                continue
            self._settle(tickets[i], _FINISHED)
            self._remember_answer(tickets[i].stream, now_ns)

    cdef void _drop_ended(self, ticket_t **tickets, Py_ssize_t count) noexcept nogil:
        """Replace the tickets that are not TAKEN by NULL."""
        cdef Py_ssize_t i
        for i in range(count):
            if tickets[i] != NULL and tickets[i].state != _TAKEN:
                tickets[i] = NULL

    cdef Reason _pop_if_due(self, int64_t now_ns, ticket_t **batch, ticket_t **expired) noexcept nogil:
        """If a batch is due, chain its tickets to `batch`. Tickets that turn out to have expired go to `expired`.

        The ring's references to all of them are then the caller's.
        """
        cdef Reason reason = self._reason(now_ns)
        cdef int64_t rows = 0
        cdef ticket_t *ticket
        if reason == NOT_DUE:
            return reason
        self._drop_expired(now_ns, expired)
        if expired[0] != NULL:
            reason = self._reason(now_ns)  # the reason may have been due to those that expired
            if reason == NOT_DUE:
                self._close_gaps()  # or the next look would go over them again
                self._wake_if_due_sooner(now_ns)
                return reason
        self._batches[<int>reason] += 1
        if reason == TIMEOUT:
            self._forget_absent()
        while self._waiting > 0:
            ticket = self._ring[self._popped & self._mask]
            if ticket.rows > self.batch_size - rows:
                break
            invariant(now_ns < ticket.deadline_ns)
            rows += ticket.rows
            self._batched += 1
            self._remove(ticket)
            ticket.state = _TAKEN
            ticket.taken_ns = now_ns
            ticket.next = NULL
            batch[0] = ticket
            batch = &ticket.next
        self._batched_rows += rows
        invariant(0 < rows <= self.batch_size)
        invariant((reason == FULL) == (rows == self.batch_size or self._waiting > 0))
        return reason

    cdef void _drop_expired(self, int64_t now_ns, ticket_t **expired) noexcept nogil:
        """End the tickets past their deadline, from the oldest to where the others seen have `batch_size` rows.

        That is far enough: with `batch_size` rows the batch is full, and with fewer no ticket has been missed. What
        this visits is taken next, except for the last if it does not fit, or has its gaps closed.
        """
        cdef int64_t position = self._popped
        cdef int64_t rows = 0
        cdef ticket_t *ticket
        while position < self._pushed and rows < self.batch_size:
            ticket = self._ring[position & self._mask]
            position += 1
            if ticket == NULL:
                continue
            if now_ns < ticket.deadline_ns:
                rows += ticket.rows
                continue
            self._settle(ticket, _EXPIRED)
            pthread_cond_broadcast(&ticket.settled)
            ticket.next = expired[0]
            expired[0] = ticket

    # ---- the window ----

    cdef Reason _reason(self, int64_t now_ns) noexcept nogil:
        """Why a batch is due, counting tickets that have expired unnoticed as waiting."""
        if self._waiting == 0:
            return NOT_DUE
        if self._waiting_rows >= self.batch_size:
            return FULL
        if self.leave_early:
            self._forget_old_answers(now_ns)
            if self._first_timers == 0 and self._recent == self._recent_waiting:
                return EVERYONE_IN
        if now_ns - self._oldest_pushed_ns() >= self.window_ns:
            return TIMEOUT
        return DRAIN if self._closed else NOT_DUE

    cdef int64_t _due_ns(self, int64_t now_ns) noexcept nogil:
        """When a batch will be due if nothing else happens, or earlier: when it may be, and the taker should look."""
        cdef int64_t due_ns
        if self._waiting == 0:
            return NEVER
        if self._reason(now_ns) != NOT_DUE:
            return now_ns
        due_ns = self._oldest_pushed_ns() + self.window_ns
        if self.leave_early and self._first_timers == 0:
            # Everyone will be in once the recent streams without a request are no longer recent.
            due_ns = min(due_ns, self._oldest_answer.answered_ns + RECENT_NS)
        return due_ns

    cdef inline int64_t _oldest_pushed_ns(self) noexcept nogil:
        return self._ring[self._popped & self._mask].pushed_ns

    cdef void _wake_if_due_sooner(self, int64_t now_ns) noexcept nogil:
        if self._takers > 0 and self._due_ns(now_ns) < self._taker_wakes_ns:
            pthread_cond_signal(&self._due_sooner)

    cdef void _remember_answer(self, stream_t *stream, int64_t now_ns) noexcept nogil:
        stream.was_answered = True
        if not (stream.is_open and self.leave_early):
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

    cdef void _forget_absent(self) noexcept nogil:
        """Forget the answers of pooled streams that stayed idle for the whole window of the oldest request."""
        cdef int64_t since_ns = self._oldest_pushed_ns()
        cdef stream_t *stream = self._oldest_answer
        cdef stream_t *newer
        while stream != NULL and stream.answered_ns <= since_ns:
            newer = stream.newer
            if stream.is_pooled and stream.unfinished == NULL:
                self._forget_answer(stream)
            stream = newer
