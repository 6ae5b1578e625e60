"""Arrays as bytes: how the actors and the network's process exchange arrays through a batcher.

A batcher does not look into the data, so both ends agree on a format. This one is a msgpack map with the array's shape,
its dtype, and its values in C order.
"""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt


def pack_array(array: npt.NDArray[Any]) -> bytes:
    """Pack an array of any shape and any plain dtype."""
    # `dtype.str`, such as "<f4", includes the byte order.
    message = {"shape": array.shape, "dtype": array.dtype.str, "values": array.tobytes()}
    packed: bytes = msgpack.packb(message)
    return packed


def unpack_array(packed: bytes) -> npt.NDArray[Any]:
    """Unpack what `pack_array` packed. The array is read-only, because its values are not copied."""
    message = msgpack.unpackb(packed)
    return np.frombuffer(message["values"], message["dtype"]).reshape(message["shape"])
