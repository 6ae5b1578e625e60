"""OpenTelemetry's instrumentation, which wraps what `grpc.insecure_channel` and `grpc.server` return."""

from __future__ import annotations

from pathlib import Path

import pytest
from serving import run_program

PROGRAM = """
    import logging, sys, time
    from opentelemetry import trace
    from opentelemetry.instrumentation.grpc import GrpcInstrumentorClient, GrpcInstrumentorServer
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    logging.basicConfig(level=logging.DEBUG, format="LOG %(levelname)s %(message)s", stream=sys.stdout)
    from grpc_batcher import MukoeBatcherClient, create_batcher

    def echo(requests):
        return [({"result": data}, 0) for data in requests]

    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    with create_batcher("repr", 4, 0.0, 0, batch_process_fn=echo, host="127.0.0.1") as batcher:
        with MukoeBatcherClient(f"127.0.0.1:{batcher.port}") as before:
            before.send_request(b"hi")
        if "client" in sys.argv:
            GrpcInstrumentorClient().instrument()
        if "server" in sys.argv:
            GrpcInstrumentorServer().instrument()
        with create_batcher("repr", 4, 0.0, 0, batch_process_fn=echo, host="127.0.0.1") as traced:
            with MukoeBatcherClient(f"127.0.0.1:{traced.port}") as client:
                for _ in range(3):
                    assert client.send_request(b"hi") == ({"result": b"hi"}, 0)
                transports = traced.transport, client.transport
        with MukoeBatcherClient(f"127.0.0.1:{batcher.port}") as client:
            assert client.send_request(b"hi") == ({"result": b"hi"}, 0)
    while len(exporter.get_finished_spans()) < int(sys.argv[1]):  # a span ends a little after its stream
        time.sleep(0.002)
    print("TRANSPORTS", *transports)
    print("SPANS", *sorted({span.kind.name for span in exporter.get_finished_spans()}))
"""


@pytest.mark.parametrize(
    ("instrumented", "spans", "kinds", "transports"),
    [
        (("client",), 2, "CLIENT", "direct public"),
        (("server",), 1, "SERVER", "direct direct"),
        (("client", "server"), 3, "CLIENT SERVER", "direct public"),
    ],
)
def test_instrumented_ends_give_spans_and_only_a_wrapped_channel_leaves_the_direct_transport(
    instrumented: tuple[str, ...], spans: int, kinds: str, transports: str, tmp_path: Path
) -> None:
    lines = run_program(tmp_path, PROGRAM, str(spans), *instrumented, environment={"GRPC_BATCHER_TRANSPORT": "direct"})
    assert f"TRANSPORTS {transports}" in lines
    assert f"SPANS {kinds}" in lines
    assert not [line for line in lines if "LOG WARNING" in line]
    wrapped = [line for line in lines if "with the public transport" in line]
    assert len(wrapped) == (2 if "client" in instrumented else 0)
    assert all("opentelemetry" in line for line in wrapped)
