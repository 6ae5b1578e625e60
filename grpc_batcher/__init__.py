"""Gathers single gRPC requests into batches for a model, and gives each caller its own answer."""

try:
    from . import _arrays as _arrays
    from . import _core as _core
    from . import _wire as _wire
except ImportError as error:
    raise ImportError(
        "grpc_batcher's native modules are not compiled, or only for another Python. Run `pip install .` in the "
        "source tree and import the package from another folder, or `pip install -e .` to work on the tree itself."
    ) from error

from . import _process as _process  # before grpc is imported
from ._array import Array, arrays
from ._client.async_client import AsyncMukoeBatcherClient
from ._client.client import MukoeBatcherClient
from ._errors import BatcherError, BindError, RequestError
from ._info import info
from ._server.batch import Batch
from ._server.batcher import MukoeBatcher
from ._server.create import create_batcher
from ._server.metrics import Histogram, Metrics, Percentiles
from ._version import __version__

__all__ = [
    "Array",
    "AsyncMukoeBatcherClient",
    "Batch",
    "BatcherError",
    "BindError",
    "Histogram",
    "Metrics",
    "MukoeBatcher",
    "MukoeBatcherClient",
    "Percentiles",
    "RequestError",
    "__version__",
    "arrays",
    "create_batcher",
    "info",
]
