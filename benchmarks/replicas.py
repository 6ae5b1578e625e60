"""Replicas on Ray, next to Ray Serve: `python benchmarks/replicas.py --help`.

The callback waits 10 ms on up to 16 requests, as an accelerator would, so one replica answers at most 1,600 requests
per second, and the machine's cores are not the limit. (Where they are, have it wait longer: CALLBACK_MS=20.) Callers
are threads of two Ray actors, each with one request in flight: 32 per replica, so that one batch gathers while another
is computed.

Prints a table and writes it as JSON. It needs `pip install ".[bench-ray]"`.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import os
import signal
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpc_batcher import MukoeBatcher, RequestError, create_batcher
from grpc_batcher.ray import Replicas, launch

import grpc
import ray
from google.protobuf.wrappers_pb2 import BytesValue
from ray import serve
from ray.serve.config import gRPCOptions

CALLBACK_S = float(os.environ.get("CALLBACK_MS", "10")) / 1000  # from the environment, as Ray's processes read it, too
BATCH_SIZE, BATCH_TIMEOUT_S = 16, 0.005
CALLERS_PER_REPLICA = 32
CALLER_PROCESSES = 2
CALLERS_PER_CLIENT = 8
COUNTS = (1, 2, 4)
WARM_UP_S = 1.0
DATA = bytes(64)
SHARED = {"num_cpus": 0}  # a real replica would have an accelerator of its own

HTTP_PORT, GRPC_PORT = 18_000, 19_000
SERVE_METHOD = "/benchmark.Benchmark/Ask"


# ---- the servers ----


def make_batcher() -> MukoeBatcher:
    pid = str(os.getpid()).encode()

    def infer(requests: list[bytes]) -> list[tuple[dict[str, bytes], int]]:
        time.sleep(CALLBACK_S)
        return [({"pid": pid}, 0)] * len(requests)

    return create_batcher("repr", BATCH_SIZE, BATCH_TIMEOUT_S, batch_process_fn=infer)


class Deployment:
    """The same callback behind Ray Serve, for both of its proxies."""

    def __init__(self) -> None:
        self._pid = str(os.getpid()).encode()

    @serve.batch(max_batch_size=BATCH_SIZE, batch_wait_timeout_s=BATCH_TIMEOUT_S)
    async def infer(self, requests: list[bytes]) -> list[bytes]:
        await asyncio.sleep(CALLBACK_S)  # a model that blocks would hold up its event loop
        return [self._pid] * len(requests)

    async def __call__(self, request: Any) -> bytes:
        answer: bytes = await self.infer(await request.body())
        return answer

    async def Ask(self, request: BytesValue) -> BytesValue:
        return BytesValue(value=await self.infer(request.value))


def add_servicer(servicer: Any, server: Any) -> None:
    """What protobuf's compiler would have generated for Ray Serve's gRPC proxy."""
    handler = grpc.unary_unary_rpc_method_handler(
        servicer.Ask, request_deserializer=BytesValue.FromString, response_serializer=BytesValue.SerializeToString
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("benchmark.Benchmark", {"Ask": handler}),))


# ---- the callers ----


def ask_replicas(clients: list[Any], caller: int) -> Callable[[], bytes]:
    client = clients[caller // CALLERS_PER_CLIENT]

    def ask() -> bytes:
        pid: bytes = client.send_request(DATA)[0]["pid"]
        return pid

    return ask


def ask_http(_clients: list[Any], _caller: int) -> Callable[[], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", HTTP_PORT)

    def ask() -> bytes:
        connection.request("POST", "/", DATA)
        response = connection.getresponse()
        answer = response.read()
        if response.status != 200:
            raise RuntimeError(f"Ray Serve answers with status {response.status}: {answer!r:.200}")
        return answer

    return ask


def ask_grpc(_clients: list[Any], _caller: int) -> Callable[[], bytes]:
    channel = grpc.insecure_channel(f"127.0.0.1:{GRPC_PORT}", [("grpc.use_local_subchannel_pool", 1)])
    stub = channel.unary_unary(SERVE_METHOD, BytesValue.SerializeToString, BytesValue.FromString)

    def ask() -> bytes:
        pid: bytes = stub(BytesValue(value=DATA), metadata=(("application", "default"),)).value
        return pid

    return ask


@ray.remote(num_cpus=0)
class Callers:
    """Threads that ask as soon as they are answered."""

    def measure(
        self,
        make_ask: Callable[[list[Any], int], Callable[[], bytes]],
        clients: list[Any],
        callers: int,
        seconds: float,
    ) -> Counter[bytes]:
        """Return how many answers came from each process, after a warm-up."""
        counts: list[Counter[bytes]] = [Counter() for _ in range(callers)]
        begin_s = time.monotonic() + WARM_UP_S
        errors: list[Exception] = []

        def run(number: int) -> None:
            try:
                ask = make_ask(clients, number)
                while True:
                    pid = ask()
                    now_s = time.monotonic()
                    if now_s >= begin_s + seconds:
                        return
                    if now_s >= begin_s:
                        counts[number][pid] += 1
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=run, args=(number,)) for number in range(callers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for client in clients:
            client.close()
        if errors:
            raise errors[0]
        return sum(counts, Counter())


def measure(make_ask: Any, new_client: Callable[[], Any] | None, count: int, seconds: float) -> dict[str, Any]:
    """Return requests per second, and each replica's share of them, from the smallest."""
    per_process = CALLERS_PER_REPLICA * count // CALLER_PROCESSES
    processes = [Callers.remote() for _ in range(CALLER_PROCESSES)]
    ray.get([process.__ray_ready__.remote() for process in processes])  # or they would measure at different times
    pending = []
    for process in processes:
        clients = [new_client() for _ in range(per_process // CALLERS_PER_CLIENT)] if new_client else []
        pending.append(process.measure.remote(make_ask, clients, per_process, seconds))
    found: Counter[bytes] = sum(ray.get(pending), Counter())
    for process in processes:
        ray.kill(process)
    total = sum(found.values())
    return {"requests_per_s": total / seconds, "shares": sorted(round(each / total, 3) for each in found.values())}


def time_to_replacement_s(replicas: Replicas) -> float:
    """Return the time from SIGKILL of the only replica to the first answer of its replacement."""
    with replicas.client() as client:
        killed = int(client.send_request(DATA)[0]["pid"])
        begin_s = time.monotonic()
        os.kill(killed, signal.SIGKILL)
        while True:
            try:
                if int(client.send_request(DATA)[0]["pid"]) != killed:
                    return time.monotonic() - begin_s
            except RequestError:
                time.sleep(0.005)


def main() -> int:
    parser = argparse.ArgumentParser(description="Replicas on Ray, next to Ray Serve.")
    parser.add_argument("--quick", action="store_true", help="one short round: to see that it runs, not to compare")
    parser.add_argument("--output", type=Path, default=Path("build/replicas.json"), help="where to write the results")
    options = parser.parse_args()
    rounds, seconds = (1, 1.0) if options.quick else (3, 2.0)
    output = options.output.resolve()

    here = Path(__file__).resolve().parent
    results: dict[str, list[Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # Ray's processes would import the uncompiled package from the project's root
        os.environ["PYTHONPATH"] = str(here)  # where they find this file
        ray.init(namespace="benchmark", include_dashboard=False, log_to_driver=False, logging_level="WARNING")
        for number in range(rounds):
            print(f"round {number + 1} of {rounds}", flush=True)
            measure_replicas(seconds, results)
            measure_serve(seconds, results)
        ray.shutdown()
        os.chdir(here)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1))
    print_table(results)
    return 0


def measure_replicas(seconds: float, results: dict[str, list[Any]]) -> None:
    replicas = launch(make_batcher, COUNTS[0], actor_options=SHARED)
    results.setdefault("replacement_s", []).append(time_to_replacement_s(replicas))
    for count in COUNTS:
        replicas.scale(count)
        results.setdefault(f"grpc_batcher/{count}", []).append(measure(ask_replicas, replicas.client, count, seconds))
    replicas.shutdown()


def measure_serve(seconds: float, results: dict[str, list[Any]]) -> None:
    serve.start(
        http_options={"port": HTTP_PORT},
        grpc_options=gRPCOptions(port=GRPC_PORT, grpc_servicer_functions=["replicas.add_servicer"]),
    )
    for count in COUNTS:
        deployment = serve.deployment(Deployment).options(
            num_replicas=count, max_ongoing_requests=2 * CALLERS_PER_REPLICA, ray_actor_options=SHARED
        )
        serve.run(deployment.bind(), name="default")
        results.setdefault(f"serve HTTP/{count}", []).append(measure(ask_http, None, count, seconds))
        results.setdefault(f"serve gRPC/{count}", []).append(measure(ask_grpc, None, count, seconds))
    serve.shutdown()


def print_table(results: dict[str, list[Any]]) -> None:
    limit = BATCH_SIZE / CALLBACK_S
    print(f"\n{'system':14}{'replicas':>9}{'requests/s':>12}{'of the limit':>14}  shares")
    for key, samples in results.items():
        if key == "replacement_s":
            continue
        system, _, count = key.rpartition("/")
        median = statistics.median(sample["requests_per_s"] for sample in samples)
        shares = samples[-1]["shares"]
        print(f"{system:14}{count:>9}{median:12.0f}{median / (limit * int(count)):14.2f}  {shares}")
    one = statistics.median(sample["requests_per_s"] for sample in results["grpc_batcher/1"])
    for count in COUNTS[1:]:
        many = statistics.median(sample["requests_per_s"] for sample in results[f"grpc_batcher/{count}"])
        print(f"{count} replicas reach {many / (one * count):.2f} of linear")
    print(f"from SIGKILL to the replacement's first answer: {statistics.median(results['replacement_s']):.2f} s")


if __name__ == "__main__":
    raise SystemExit(main())
