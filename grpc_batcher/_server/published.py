"""The weights that callbacks see, and their step."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from .._models import check_int32


class Version(NamedTuple):
    """What was published last.

    published_ns: monotonic time; None if nothing was published.
    """

    weights: Any = None
    step: int = 0
    published_ns: int | None = None


class Published:
    """Holds one version, which is replaced as a whole: whoever reads `version` once never mixes two."""

    def __init__(self) -> None:
        self.version = Version()

    def publish(self, weights: Any, step: int) -> None:
        """Raises TypeError or ValueError unless the step is an int32."""
        self.version = Version(weights, check_int32("step", step), time.monotonic_ns())
