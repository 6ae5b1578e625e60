"""Arrays as bytes: what the actors and the network's process say to each other through a batcher.

To a batcher a payload is opaque bytes, so both ends agree on a form of their own. This one is a
msgpack map with the array's shape, its dtype and its values in C order.
"""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt


def pack_array(array: npt.NDArray[Any]) -> bytes:
    """Pack an array of any shape and any plain dtype."""
    # `dtype.str` is like "<f4": it names the byte order too.
    message = {"shape": array.shape, "dtype": array.dtype.str, "values": array.tobytes()}
    packed: bytes = msgpack.packb(message)
    return packed


def unpack_array(packed: bytes) -> npt.NDArray[Any]:
    """Unpack what `pack_array` packed. The array is read-only, for its values are not copied."""
    message = msgpack.unpackb(packed)
    return np.frombuffer(message["values"], message["dtype"]).reshape(message["shape"])
