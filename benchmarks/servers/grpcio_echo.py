"""Plain grpcio, with its synchronous server and no batching."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

from grpc_batcher import info
from grpc_batcher._cli.workers import obey

import grpc
from answers import answer_to


def serve(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    for message in messages:
        yield answer_to(message)


class Echo(grpc.GenericRpcHandler):  # type: ignore[misc]
    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return grpc.stream_stream_rpc_method_handler(serve)


def run(pipe: Connection, threads: int) -> None:
    """The process."""
    server = grpc.server(ThreadPoolExecutor(max_workers=threads), handlers=(Echo(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    pipe.send({"port": port})
    obey(pipe, {"info": info})
    server.stop(None).wait()
