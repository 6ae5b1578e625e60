"""How many requests of a client may be on their way at once, and who waits for a place."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from .. import _process


class Wish:
    """Somebody's turn for a place.

    give: called once when the place is given, on any thread.
    """

    def __init__(self, give: Callable[[], None]) -> None:
        self.give = give
        self.is_given = False


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
        self._taken = 0
        self._wishes: deque[Wish] = deque()

    def take_free(self, most: int) -> int:
        """Take up to `most` places that are free now, and return how many; 0 while others are waiting for one."""
        with self._lock:
            count = 0 if self._wishes else max(0, min(most, self.limit - self._taken))
            self._taken += count
            return count

    def take_regardless(self) -> None:
        """Take a place even if none is free."""
        with self._lock:
            self._taken += 1

    def take(self, due_ns: int | None) -> bool:
        """Wait for a place. Returns whether there was one before a monotonic time; None for no limit."""
        if self.take_free(1):
            return True
        given = threading.Event()
        wish = self.wish(given.set)
        try:
            given.wait(None if due_ns is None else max(0.0, (due_ns - time.monotonic_ns()) / 1e9))
        except BaseException:  # such as Ctrl-C
            if not self.withdraw(wish):
                self.free()
            raise
        return not self.withdraw(wish)

    def wish(self, give: Callable[[], None]) -> Wish:
        """Ask for a place; `give` is called once there is one, perhaps at once."""
        wish = Wish(give)
        with self._lock:
            self._wishes.append(wish)
        self._give()
        return wish

    def withdraw(self, wish: Wish) -> bool:
        """Give up a wish. Returns False if the place has been given: then it is to be freed."""
        with self._lock:
            if wish.is_given:
                return False
            self._wishes.remove(wish)
            return True

    def free(self) -> None:
        """Give a place back."""
        with self._lock:
            self._taken -= 1
            is_wanted = bool(self._wishes)
        if is_wanted:
            self._give()

    def _give(self) -> None:
        while True:
            with self._lock:
                if not self._wishes or self._taken >= self.limit:
                    return
                wish = self._wishes.popleft()
                wish.is_given = True
                self._taken += 1
            wish.give()
