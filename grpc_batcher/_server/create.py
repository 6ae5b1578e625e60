"""`create_batcher`: what its arguments may be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import grpc

from .._array import Array, declared_on, import_numpy
from .._contract import DEFAULT_MAX_MESSAGE_BYTES, MAX_MESSAGE_BYTES, as_tuple, check_duration
from .._models import ARRAYS, MODELS, Model
from .batcher import MukoeBatcher
from .standard_services import StandardServices

_MIN_DEFAULT_QUEUE_SIZE = 8192

# Arguments of send_request, which cannot be the names of arrays.
_RESERVED_NAMES = {"action", "data", "rows", "self", "timeout_s"}


def create_batcher(
    model: str,
    batch_size: int,
    batch_timeout_s: float,
    port: int = 50051,
    num_threads: int = 16,
    batch_process_fn: Callable[[Any], Any] | None = None,
    *,
    arrays: Mapping[str, Array] | None = None,
    batch_sizes: Iterable[int] | None = None,
    warm_up: bool | Sequence[Any] = False,
    track_metrics: bool = True,
    host: str = "0.0.0.0",
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    max_queue_size: int | None = None,
    max_queue_bytes: int = 1024 * 1024 * 1024,
    max_streams: int = 8192,
    max_connection_age_s: float | None = None,
    leave_early: bool = True,
    credentials: grpc.ServerCredentials | None = None,
    interceptors: Iterable[grpc.ServerInterceptor] = (),
    health: bool = False,
    reflection: bool = False,
    open_inference: bool = False,
    model_name: str | None = None,
) -> MukoeBatcher:
    """Return a batcher, not yet started, that serves a model to many callers.

    model: "repr", whose callback gets a list of bytes, or "dyna", whose callback gets a list of (bytes, int). Or
        "arrays", for arrays of any names.
    batch_size: the most requests that the callback gets at once, from 1; with `arrays`, the most rows.
    batch_timeout_s: how long the oldest request waits for others to fill its batch, in seconds; 0 for not at all.
    port: the TCP port to listen on; 0 lets the system choose, and `.port` then tells.
    num_threads: accepted so that calls written for the C++ wheel work; at least 1. It limits nothing.
    batch_process_fn: called with the list of a batch's requests, always on the same thread, one batch at a time.
        Returns a list with one result per request, in order: (dictionary, step), where the values are bytes and the
        step is an int32, or an Exception instance to fail that request alone. Required, despite following optional
        parameters (the wheel's order).
    arrays: what a request holds, by name: {"data": Array((96, 96, 3, 4), "uint8")} for "repr" and "dyna", any names for
        "arrays". The callback then gets a `Batch`, and returns a mapping from names to arrays with a row for each of
        the batch's, or a pair of that and a step. Anything that numpy.asarray takes is an array. None stands for what
        the decorator `arrays` declared on the callback; without that, requests are bytes.
    batch_sizes: how many rows the callback may get, for frameworks that compile once per shape; batch_size must be one
        of them. Smaller batches are padded. The default is every number up to batch_size. Only with `arrays`.
    warm_up: True calls the callback, on its thread, with zeros of each of batch_sizes before the port is open, and
        `start` raises what it raises. Without arrays, a list of requests to call it with does the same.
    track_metrics: whether durations are measured, for `metrics()` and `print_batcher_summary()`.
    host: the address to listen on, such as "127.0.0.1" or "::1", or a unix socket such as "unix:/run/batcher.sock",
        which has no port. The default is every IPv4 interface.
    max_message_bytes: the largest request accepted; larger ones get RESOURCE_EXHAUSTED.
    max_queue_size: the most requests, or with `arrays` rows, that may wait; the next gets RESOURCE_EXHAUSTED. At least
        batch_size; None stands for the larger of 8,192 and twice batch_size.
    max_queue_bytes: the most bytes that waiting requests may hold together; a request that would exceed it gets
        RESOURCE_EXHAUSTED. The default is 1 GiB; leave room for a batch, or none is ever full.
    max_streams: the most callers' streams open at once; the next one gets RESOURCE_EXHAUSTED.
    max_connection_age_s: the age of a connection, in seconds, at which its caller is asked to connect again, so that
        callers with a `dns:///` address find servers that were added since. No request fails: a connection ends once
        its requests are answered. None keeps connections for as long as their callers do.
    leave_early: whether a batch leaves before its time once no known caller could still join it (`everyone_in`). False
        makes every batch that is not full wait out `batch_timeout_s`.
    credentials: for TLS, for instance from grpc.ssl_server_credentials; None for plaintext.
    interceptors: gRPC server interceptors, for instance to check a token in the metadata.
    health: whether to serve gRPC's health service as well: SERVING from the end of `start` to the beginning of
        `shutdown`.
    reflection: whether to serve gRPC's reflection service as well, which tools such as grpcurl ask what there is.
    open_inference: whether to serve the Open Inference Protocol, KServe's and Triton's, as well, from the same batches.
        Only with `arrays`, of dtypes that the protocol has.
    model_name: the model's name in that protocol; None for that of `model`.

    Raises ValueError or TypeError naming the argument, its value and what is allowed; for `health`, `reflection` and
    `arrays` ImportError naming what to install.
    """
    if not isinstance(model, str) or model not in (*MODELS, ARRAYS.name):
        raise ValueError(f"Invalid model: {model}")
    for name, value, minimum, maximum in (
        ("batch_size", batch_size, 1, 2**20),
        ("port", port, 0, 65535),
        ("num_threads", num_threads, 1, 2**31 - 1),
        ("max_message_bytes", max_message_bytes, 1, MAX_MESSAGE_BYTES),
        ("max_queue_size", 1 if max_queue_size is None else max_queue_size, 1, 2**24),
        ("max_queue_bytes", max_queue_bytes, 1, 2**62),
        ("max_streams", max_streams, 1, 2**24),
    ):
        _check(name, value, _is_int(value) and minimum <= value <= maximum, f"an int from {minimum} to {maximum}")
    if max_queue_size is None:
        max_queue_size = max(_MIN_DEFAULT_QUEUE_SIZE, 2 * batch_size)
    _check(
        "max_queue_size",
        max_queue_size,
        max_queue_size >= batch_size,
        f"at least batch_size ({batch_size}) to fill one",
    )
    check_duration("batch_timeout_s", batch_timeout_s)
    if max_connection_age_s is not None:
        check_duration("max_connection_age_s", max_connection_age_s)
        _check("max_connection_age_s", max_connection_age_s, max_connection_age_s > 0, "above 0, or None for no limit")
    _check("host", host, isinstance(host, str) and host != "", "an address such as '0.0.0.0' or '::1'")
    if not callable(batch_process_fn):
        raise TypeError(
            f"batch_process_fn is {batch_process_fn!r}; it must be a function that takes a list of requests and "
            "returns a list with one (dictionary, step) for each"
        )
    if arrays is None:
        arrays = declared_on(batch_process_fn)
    kind = ARRAYS if model == ARRAYS.name else MODELS[model]
    declared = None if arrays is None else _checked_arrays(kind, arrays)
    if declared is None and kind is ARRAYS:
        raise ValueError("model is 'arrays', which needs arrays: declare what a request holds, by name")
    row_bytes = sum(array.row_bytes for array in (declared or {}).values())
    _check(
        "max_message_bytes",
        max_message_bytes,
        row_bytes < max_message_bytes,
        f"more than the {row_bytes} bytes that a request's arrays take",
    )
    sizes = _checked_sizes(batch_sizes, batch_size, has_arrays=declared is not None)
    if credentials is not None and not isinstance(credentials, grpc.ServerCredentials):
        raise TypeError(f"credentials is {credentials!r}; it must be a grpc.ServerCredentials, or None")
    interceptors = as_tuple("interceptors", interceptors)
    for interceptor in interceptors:
        if not isinstance(interceptor, grpc.ServerInterceptor):
            raise TypeError(f"interceptors contains {interceptor!r}, which is not a grpc.ServerInterceptor")
    inference_name = _checked_inference(open_inference, model_name, model, declared)
    return MukoeBatcher(
        model=kind,
        batch_process_fn=batch_process_fn,
        arrays=declared,
        batch_sizes=sizes,
        inference_name=inference_name,
        warm_up=_checked_warm_up(warm_up, batch_size, has_arrays=declared is not None),
        batch_size=int(batch_size),
        batch_timeout_s=float(batch_timeout_s),
        host=host.strip("[]"),
        port=int(port),
        max_message_bytes=int(max_message_bytes),
        max_queue_size=int(max_queue_size),
        max_queue_bytes=int(max_queue_bytes),
        max_streams=int(max_streams),
        max_connection_age_s=None if max_connection_age_s is None else float(max_connection_age_s),
        leave_early=bool(leave_early),
        track_metrics=bool(track_metrics),
        credentials=credentials,
        interceptors=interceptors,
        standard_services=StandardServices(health=bool(health), reflection=bool(reflection)),
    )


def _checked_arrays(model: Model, arrays: Mapping[str, Array]) -> dict[str, Array]:
    if not isinstance(arrays, Mapping) or not arrays:
        raise TypeError(f"arrays is {arrays!r:.200}; it must be a mapping from names to Arrays")
    import_numpy()
    for name, array in arrays.items():
        if not isinstance(name, str) or not isinstance(array, Array):
            raise TypeError(f"arrays has {name!r}: {array!r:.200}; it must map names to Arrays")
        if model is ARRAYS and name in _RESERVED_NAMES:
            raise ValueError(f"arrays has the name {name!r}, which is an argument of send_request's own; use another")
    if model is not ARRAYS and ("data" not in model.arguments or not {*model.arguments} <= {"data", "action"}):
        raise ValueError(f"model is {model.name!r}, which holds {', '.join(model.arguments)}; arrays need data")
    if model is not ARRAYS and set(arrays) != {"data"}:
        raise ValueError(f"arrays has the names {list(arrays)}; for model {model.name!r} the only name is 'data'")
    return dict(arrays)


def _checked_sizes(batch_sizes: Iterable[int] | None, batch_size: int, *, has_arrays: bool) -> Sequence[int]:
    if batch_sizes is None:
        return range(1, batch_size + 1)
    if not has_arrays:
        raise ValueError(f"batch_sizes is {batch_sizes!r}, which needs arrays=: without it nothing is padded")
    sizes = as_tuple("batch_sizes", batch_sizes)
    _check(
        "batch_sizes",
        sizes,
        all(_is_int(size) and 1 <= size <= batch_size for size in sizes) and batch_size in sizes,
        f"ints from 1 to batch_size ({batch_size}), which must be one of them",
    )
    return sorted({int(size) for size in sizes})


def _checked_inference(
    is_served: bool, model_name: str | None, model: str, declared: Mapping[str, Array] | None
) -> str | None:
    """Return the model's name in the Open Inference Protocol; None if that is not to be served."""
    if not is_served:
        if model_name is not None:
            raise ValueError(f"model_name is {model_name!r}, but only open_inference=True gives the model a name")
        return None
    if declared is None:
        raise ValueError("open_inference is True, which needs arrays=")
    if model_name is None:
        return model
    _check("model_name", model_name, isinstance(model_name, str) and model_name != "", "a text that is not empty")
    return model_name


def _checked_warm_up(warm_up: Any, batch_size: int, *, has_arrays: bool) -> bool | list[Any]:
    if warm_up is False or (has_arrays and warm_up is True):
        return warm_up
    if has_arrays:
        raise TypeError(f"warm_up is {warm_up!r:.200}; with arrays it must be True or False")
    if isinstance(warm_up, (bool, str, bytes)) or not isinstance(warm_up, Sequence):
        raise TypeError(
            f"warm_up is {warm_up!r:.200}; without arrays it must be a list of requests to call batch_process_fn with"
        )
    _check("warm_up", warm_up, 1 <= len(warm_up) <= batch_size, f"a list of 1 to batch_size ({batch_size}) requests")
    return list(warm_up)


def _check(name: str, value: Any, is_good: bool, allowed: str) -> None:
    if not is_good:
        raise ValueError(f"{name} is {value!r}; it must be {allowed}")


def _is_int(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)
