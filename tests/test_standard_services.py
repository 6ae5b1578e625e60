"""gRPC's health and reflection services, as probes and tools use them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from grpc_batcher import MukoeBatcher, MukoeBatcherClient
from grpc_batcher._server.standard_services import StandardServices

import grpc
import pytest
from google.protobuf import descriptor_pool, message_factory
from http2 import HandmadeCaller, message_head
from serving import (
    METHOD,
    Held,
    address_of,
    answer,
    connect,
    error_of,
    finish_program,
    in_background,
    in_callback,
    run_program,
    serving,
    start_program,
    waiting,
)

SERVICE = "mukoe_batcher.MukoeService"
NAMES = ("", SERVICE)

health_pb2 = pytest.importorskip("grpc_health.v1.health_pb2")
health_pb2_grpc = pytest.importorskip("grpc_health.v1.health_pb2_grpc")
descriptor_database = pytest.importorskip("grpc_reflection.v1alpha.proto_reflection_descriptor_database")

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Probe:
    """Asks a server for its health."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._stub = health_pb2_grpc.HealthStub(channel)

    def check(self, name: str) -> int:
        return int(self._stub.Check(health_pb2.HealthCheckRequest(service=name)).status)

    def watch(self, name: str) -> Iterator[int]:
        for response in self._stub.Watch(health_pb2.HealthCheckRequest(service=name)):
            yield int(response.status)


@contextmanager
def probe_of(address: str) -> Iterator[Probe]:
    with grpc.insecure_channel(address) as channel:
        yield Probe(channel)


# ---- health ----


def test_health_says_not_serving_until_it_is_told_otherwise() -> None:
    services = StandardServices(health=True, reflection=False)
    with ThreadPoolExecutor(1) as threads:
        server = grpc.server(threads)
        services.add_to(server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        with probe_of(f"127.0.0.1:{port}") as probe:
            assert [probe.check(name) for name in NAMES] == [NOT_SERVING] * 2
            services.say_serving(True)
            assert [probe.check(name) for name in NAMES] == [SERVING] * 2
        server.stop(None).wait()


def test_health_says_serving_once_the_batcher_has_started() -> None:
    with serving(health=True) as batcher, probe_of(address_of(batcher)) as probe:
        assert [probe.check(name) for name in NAMES] == [SERVING] * 2
        with pytest.raises(grpc.RpcError) as caught:
            probe.check("another.Service")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_health_says_not_serving_during_a_shutdown_and_watchers_are_told() -> None:
    with (
        Held() as held,
        serving(held, health=True) as batcher,
        connect(batcher) as client,
        probe_of(address_of(batcher)) as probe,
    ):
        watches = [probe.watch(name) for name in NAMES]
        assert [next(watch) for watch in watches] == [SERVING] * 2
        taken_in = in_callback(held, client, b"taken in")
        shutdown = in_background(batcher.shutdown, grace_s=60)
        assert [next(watch) for watch in watches] == [NOT_SERVING] * 2
        assert [probe.check(name) for name in NAMES] == [NOT_SERVING] * 2
        held.release()
        assert taken_in.result() == answer(b"taken in")
        shutdown.result()
        for watch in watches:
            with pytest.raises(grpc.RpcError):
                next(watch)


def test_watchers_do_not_delay_a_shutdown() -> None:
    with ExitStack() as stack:
        batcher = stack.enter_context(serving(health=True, reflection=True))
        for _ in range(20):
            probe = stack.enter_context(probe_of(address_of(batcher)))
            assert next(probe.watch("")) == SERVING
        batcher.shutdown(grace_s=1000)  # more than a test may take


def test_health_and_reflection_answer_while_the_callback_is_stuck() -> None:
    with (
        Held() as held,
        serving(held, health=True, reflection=True, num_threads=1) as batcher,
        connect(batcher) as client,
        probe_of(address_of(batcher)) as probe,
    ):
        requests = [in_callback(held, client, b"stuck")]
        requests += [waiting(batcher, client.send_request, b"waits") for _ in range(40)]
        assert [probe.check(name) for name in NAMES] == [SERVING] * 2
        assert next(probe.watch("")) == SERVING
        assert SERVICE in services_of(batcher)
        assert not any(request.done() for request in requests)
        held.release(float("inf"))
        for request in requests:
            request.result()


EXIT_PROGRAM = """
    import sys
    import threading

    from grpc_batcher import create_batcher

    def never_answer(batch):
        print("in the callback", flush=True)
        threading.Event().wait()

    batcher = create_batcher("repr", 1, 0, port=0, batch_process_fn=never_answer, health=True, reflection=True)
    batcher.start()
    print(batcher.port, flush=True)
    sys.stdin.readline()
"""


def test_a_program_that_never_shuts_down_exits_with_0_and_its_watchers_are_told(tmp_path: Path) -> None:
    with start_program(tmp_path, EXIT_PROGRAM) as program:
        address = f"127.0.0.1:{program.read_line()}"
        with probe_of(address) as probe, MukoeBatcherClient(address) as client:
            watch = probe.watch("")
            assert next(watch) == SERVING
            request = in_background(client.send_request, b"x")
            assert program.read_line() == "in the callback"
            status, output, errors = finish_program(program, "end\n")
            assert (status, output) == (0, ""), errors
            assert "Traceback" not in errors
            assert next(watch) == NOT_SERVING
            with pytest.raises(grpc.RpcError):
                next(watch)
            assert error_of(request.result).code() is grpc.StatusCode.UNAVAILABLE


def test_health_and_reflection_are_off_by_default() -> None:
    with serving() as batcher, probe_of(address_of(batcher)) as probe:
        with pytest.raises(grpc.RpcError) as caught:
            probe.check("")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        with pytest.raises(grpc.RpcError):
            services_of(batcher)


# ---- reflection ----


def services_of(batcher: MukoeBatcher) -> list[str]:
    with grpc.insecure_channel(address_of(batcher)) as channel:
        return sorted(descriptor_database.ProtoReflectionDescriptorDatabase(channel).get_services())


def test_reflection_lists_the_services() -> None:
    reflection = "grpc.reflection.v1alpha.ServerReflection"
    with serving(reflection=True) as batcher:
        assert services_of(batcher) == [reflection, SERVICE]
    with serving(reflection=True, health=True) as batcher:
        assert services_of(batcher) == ["grpc.health.v1.Health", reflection, SERVICE]


def test_a_tool_without_the_proto_can_find_the_method_and_call_it() -> None:
    with (
        serving(model="dyna", reflection=True) as batcher,
        grpc.insecure_channel(address_of(batcher)) as channel,
    ):
        pool = descriptor_pool.DescriptorPool(descriptor_database.ProtoReflectionDescriptorDatabase(channel))
        (method,) = pool.FindServiceByName(SERVICE).methods
        assert f"/{method.containing_service.full_name}/{method.name}" == METHOD
        if hasattr(message_factory, "GetMessageClass"):
            class_of = message_factory.GetMessageClass
        else:  # protobuf before 4.22
            class_of = message_factory.MessageFactory(pool).GetPrototype
        request_class, response_class = map(class_of, (method.input_type, method.output_type))
        request = request_class(dynamics={"data": b"hi", "action": 3})
        (reply,) = channel.stream_stream(METHOD, request_class.SerializeToString, response_class.FromString)(
            iter((request,))
        )
        assert {pair.key: pair.values for pair in reply.result.dictionary} == {"result": b"hi"}
        assert reply.result.step == 3


# ---- if the packages are not installed ----

ABSENT = """
    import sys

    sys.modules.update(dict.fromkeys(("grpc_health", "grpc_reflection", "prometheus_client")))

    from grpc_batcher import MukoeBatcherClient, create_batcher

    def attempt(**arguments):
        try:
            return create_batcher("repr", 1, 0, 0, 1, lambda batch: [({"r": data}, 0) for data in batch], **arguments)
        except ImportError as error:
            print(error)

    attempt(health=True)
    attempt(reflection=True)
    try:
        import grpc_batcher.prometheus
    except ImportError as error:
        print(error)
    with attempt(host="127.0.0.1") as batcher, MukoeBatcherClient(f"127.0.0.1:{batcher.port}") as client:
        print(client.send_request(b"x"), batcher.metrics().requests["OK"])
"""


def test_without_the_extras_only_what_needs_them_fails_and_says_what_to_install(tmp_path: Path) -> None:
    health, reflection, prometheus, rest = run_program(tmp_path, ABSENT)
    for line, name in ((health, "health"), (reflection, "reflection"), (prometheus, "prometheus")):
        assert f'pip install "grpc-batcher[{name}]"' in line
    assert rest == "({'r': b'x'}, 0) 1"


UNUSED = """
    import sys

    from grpc_batcher import create_batcher

    with create_batcher("repr", 1, 0, port=0, batch_process_fn=len, host="127.0.0.1"):
        print(sorted({"grpc_health.v1", "grpc_reflection.v1alpha", "prometheus_client"} & set(sys.modules)))
"""


def test_extras_that_are_not_used_are_not_imported(tmp_path: Path) -> None:
    assert run_program(tmp_path, UNUSED) == ["[]"]


def test_a_watcher_that_never_reads_delays_neither_other_probes_nor_a_shutdown() -> None:
    with (
        serving(health=True) as batcher,
        HandmadeCaller(batcher.port, window_bytes=0) as watcher,
        probe_of(address_of(batcher)) as probe,
    ):
        watcher.send(watcher.open_stream("/grpc.health.v1.Health/Watch"), message_head(0), end=True)
        watcher.wait_for_headers()
        assert probe.check("") == SERVING
        batcher.shutdown(grace_s=0)
        with pytest.raises(grpc.RpcError):
            probe.check("")
