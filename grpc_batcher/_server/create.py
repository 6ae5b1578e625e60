"""`create_batcher`: what its arguments may be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import grpc

from .._contract import DEFAULT_MAX_MESSAGE_BYTES, MAX_MESSAGE_BYTES, as_tuple, check_duration
from .._models import MODELS
from .batcher import MukoeBatcher
from .standard_services import StandardServices

_MIN_DEFAULT_QUEUE_SIZE = 8192


def create_batcher(
    model: str,
    batch_size: int,
    batch_timeout_s: float,
    port: int = 50051,
    num_threads: int = 16,
    batch_process_fn: Callable[[list[Any]], Sequence[Any]] | None = None,
    *,
    track_metrics: bool = True,
    host: str = "0.0.0.0",
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    max_queue_size: int | None = None,
    max_queue_bytes: int = 1024 * 1024 * 1024,
    max_streams: int = 8192,
    leave_early: bool = True,
    credentials: grpc.ServerCredentials | None = None,
    interceptors: Iterable[grpc.ServerInterceptor] = (),
    health: bool = False,
    reflection: bool = False,
) -> MukoeBatcher:
    """Return a batcher, not yet started, that serves a model to many callers.

    model: "repr", whose callback gets a list of bytes, or "dyna", whose callback gets a list of (bytes, int).
    batch_size: the most requests that the callback gets at once, from 1.
    batch_timeout_s: how long the oldest request waits for others to fill its batch, in seconds; 0 for not at all.
    port: the TCP port to listen on; 0 lets the system choose, and `.port` then tells.
    num_threads: accepted so that calls written for the C++ wheel work; at least 1. It limits nothing.
    batch_process_fn: called with the list of a batch's requests, always on the same thread, one batch at a time.
        Returns a list with one result per request, in order: (dictionary, step), where the values are bytes and the
        step is an int32, or an Exception instance to fail that request alone. Required, despite following optional
        parameters (the wheel's order).
    track_metrics: whether durations are measured, for `metrics()` and `print_batcher_summary()`.
    host: the address to listen on, such as "127.0.0.1" or "::1", or a unix socket such as "unix:/run/batcher.sock",
        which has no port. The default is every IPv4 interface.
    max_message_bytes: the largest request accepted; larger ones get RESOURCE_EXHAUSTED.
    max_queue_size: the most requests that may wait; the next one gets RESOURCE_EXHAUSTED. At least batch_size; None
        stands for the larger of 8,192 and twice batch_size.
    max_queue_bytes: the most bytes that waiting requests may hold together; a request that would exceed it gets
        RESOURCE_EXHAUSTED. The default is 1 GiB; leave room for a batch, or none is ever full.
    max_streams: the most callers' streams open at once; the next one gets RESOURCE_EXHAUSTED.
    leave_early: whether a batch leaves before its time once no known caller could still join it (`everyone_in`). False
        makes every batch that is not full wait out `batch_timeout_s`.
    credentials: for TLS, for instance from grpc.ssl_server_credentials; None for plaintext.
    interceptors: gRPC server interceptors, for instance to check a token in the metadata.
    health: whether to serve gRPC's health service as well: SERVING from the end of `start` to the beginning of
        `shutdown`.
    reflection: whether to serve gRPC's reflection service as well, which tools such as grpcurl ask what there is.

    Raises ValueError or TypeError naming the argument, its value and what is allowed; for `health` and `reflection`
    ImportError naming what to install.
    """
    if not isinstance(model, str) or model not in MODELS:
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
    _check("host", host, isinstance(host, str) and host != "", "an address such as '0.0.0.0' or '::1'")
    if not callable(batch_process_fn):
        raise TypeError(
            f"batch_process_fn is {batch_process_fn!r}; it must be a function that takes a list of requests and "
            "returns a list with one (dictionary, step) for each"
        )
    if credentials is not None and not isinstance(credentials, grpc.ServerCredentials):
        raise TypeError(f"credentials is {credentials!r}; it must be a grpc.ServerCredentials, or None")
    interceptors = as_tuple("interceptors", interceptors)
    for interceptor in interceptors:
        if not isinstance(interceptor, grpc.ServerInterceptor):
            raise TypeError(f"interceptors contains {interceptor!r}, which is not a grpc.ServerInterceptor")
    return MukoeBatcher(
        model=MODELS[model],
        batch_process_fn=batch_process_fn,
        batch_size=int(batch_size),
        batch_timeout_s=float(batch_timeout_s),
        host=host.strip("[]"),
        port=int(port),
        max_message_bytes=int(max_message_bytes),
        max_queue_size=int(max_queue_size),
        max_queue_bytes=int(max_queue_bytes),
        max_streams=int(max_streams),
        leave_early=bool(leave_early),
        track_metrics=bool(track_metrics),
        credentials=credentials,
        interceptors=interceptors,
        standard_services=StandardServices(health=bool(health), reflection=bool(reflection)),
    )


def _check(name: str, value: Any, is_good: bool, allowed: str) -> None:
    if not is_good:
        raise ValueError(f"{name} is {value!r}; it must be {allowed}")


def _is_int(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)
