"""Plain grpcio, with its synchronous server and no batching: `python grpcio_echo.py THREADS`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import lines
from answers import answer_to


def serve(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    for message in messages:
        yield answer_to(message)


class Echo(grpc.GenericRpcHandler):  # type: ignore[misc]
    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return grpc.stream_stream_rpc_method_handler(serve)


def main() -> None:
    server = grpc.server(ThreadPoolExecutor(max_workers=int(sys.argv[1])), handlers=(Echo(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    lines.say(port=port)
    for _command in lines.commands():
        pass
    server.stop(None).wait()


if __name__ == "__main__":
    main()
