"""A token: callers send it in the metadata, and a gRPC interceptor checks it before a stream is served.

Others can read and use a token that is sent in plaintext: give both ends `credentials`, as tls.py does.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable, Iterator

from grpc_batcher import MukoeBatcherClient, RequestError, create_batcher

import grpc


class TokenCheck(grpc.ServerInterceptor):
    """Ends streams without the token with UNAUTHENTICATED. Health checks need no token, because probes have none."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler | None],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        given = dict(details.invocation_metadata).get("authorization", "")
        if details.method.startswith("/grpc.health.v1.Health/") or hmac.compare_digest(given.encode(), self._expected):
            return continuation(details)
        return grpc.stream_stream_rpc_method_handler(refuse)


def refuse(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    context.abort(grpc.StatusCode.UNAUTHENTICATED, "the metadata has no 'authorization' with the right token")


token = secrets.token_urlsafe()  # in production, from a file that only both ends can read

with create_batcher(
    "repr",
    batch_size=16,
    batch_timeout_s=0.005,
    port=0,
    batch_process_fn=lambda requests: [({"result": data}, 0) for data in requests],
    host="127.0.0.1",
    interceptors=[TokenCheck(token)],
) as batcher:
    address = f"localhost:{batcher.port}"

    with MukoeBatcherClient(address, metadata=[("authorization", f"Bearer {token}")]) as client:
        print(client.send_request(b"hi"))  # ({'result': b'hi'}, 0)

    with MukoeBatcherClient(address, metadata=[("authorization", "Bearer of bad news")]) as client:
        try:
            client.send_request(b"hi")
        except RequestError as error:
            print(error.code().name)  # UNAUTHENTICATED
