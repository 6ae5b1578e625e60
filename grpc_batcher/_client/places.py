"""How many requests of a client may be on their way at once, and who waits for a place.

A signal handler may raise in the main thread at any moment. So places are kept by their holder, not counted: whoever is
interrupted frees all places that it may have had, and finishes what others wait for.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from .. import _process


class Wish:
    """Somebody's turn for a place.

    holder: who is to have the place.
    give: called when it is given, on any thread; perhaps twice.
    """

    def __init__(self, holder: object, give: Callable[[], None]) -> None:
        self.holder = holder
        self.give = give


class PlacesInFlight:
    """A limited number of places, given in the order in which they were asked for.

    limit: how many there are.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.forget_parent()
        _process.start_afresh_after_fork(self)

    def forget_parent(self) -> None:
        self._lock = threading.RLock()  # a signal handler may send a request at any moment
        # These are guarded by it.
        self._holders: set[object] = set()
        self._wishes: deque[Wish] = deque()

    def take_free(self, holders: Sequence[object]) -> int:
        """Give places that are free now to the first of these. Returns how many; 0 while others wait for a place."""
        with self._lock:
            count = 0 if self._wishes else max(0, min(len(holders), self.limit - len(self._holders)))
            self._holders.update(holders[:count])
            return count

    def take_regardless(self, holder: object) -> None:
        """Take a place even if none is free."""
        with self._lock:
            self._holders.add(holder)

    def take(self, holder: object, due_ns: int | None) -> bool:
        """Wait for a place. Returns whether there was one before a monotonic time; None for no limit.

        If this is interrupted, the caller has to free the place.
        """
        if self.take_free((holder,)):
            return True
        given = threading.Event()
        wish = Wish(holder, given.set)
        try:
            self.ask(wish)
            given.wait(None if due_ns is None else max(0.0, (due_ns - time.monotonic_ns()) / 1e9))
            return not self.withdraw(wish)
        except BaseException:  # such as Ctrl-C
            self.withdraw(wish)
            raise

    def ask(self, wish: Wish) -> None:
        """Ask for a place; it is given once there is one, perhaps at once."""
        with self._lock:
            self._wishes.append(wish)
        self._give()

    def withdraw(self, wish: Wish) -> bool:
        """Give up a wish. Returns False if the place has been given: then it is to be freed."""
        with self._lock:
            try:
                self._wishes.remove(wish)
            except ValueError:
                return False
            return True

    def free(self, holder: object) -> None:
        """Give a place back, if this has one."""
        with self._lock:
            self._holders.discard(holder)
            is_wanted = bool(self._wishes)
        if is_wanted:
            self._give()

    def _give(self) -> None:
        with self._lock:
            while self._wishes and len(self._holders) < self.limit:
                wish = self._wishes[0]
                try:
                    self._hand_over(wish)
                except BaseException:  # such as Ctrl-C; another thread may be waiting for this
                    self._hand_over(wish)
                    raise

    def _hand_over(self, wish: Wish) -> None:
        self._holders.add(wish.holder)
        self.withdraw(wish)
        wish.give()
