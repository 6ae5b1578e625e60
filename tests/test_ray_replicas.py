"""Replicas on a real Ray: placed, found, killed, drained, published to, with an account of every request.

`make test-ray` runs these tests. They are skipped where Ray is not installed.
"""

from __future__ import annotations

import os
import pickle
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc_batcher
from grpc_batcher import Array, Batch, MukoeBatcher, MukoeBatcherClient, RequestError, create_batcher

import pytest
from accounting import Ledger, asking, wait_for_answers
from serving import error_of, eventually, in_background, run_program

ray = pytest.importorskip("ray", reason="Ray is not installed")
np = pytest.importorskip("numpy")

from grpc_batcher.prometheus import ReplicasCollector  # noqa: E402
from grpc_batcher.ray import Replicas, connect, launch  # noqa: E402

pytestmark = [pytest.mark.timeout(180), pytest.mark.filterwarnings("default")]

NAMESPACE = "grpc_batcher tests"
CALLERS = 8
SMALL = {"num_cpus": 0}  # the replicas of these tests share two cores


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Ray of this machine. Yields its address."""
    before = Path.cwd()
    # Ray's workers look for modules where the driver runs, and would find the uncompiled tree.
    os.chdir(tmp_path_factory.mktemp("driver"))
    ray.init(
        num_cpus=2,
        namespace=NAMESPACE,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}},
    )
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()
    os.chdir(before)


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    eventually(lambda: not [name for name in ray.util.list_named_actors() if name.startswith("grpc_batcher.")])


def make_pid_batcher() -> MukoeBatcher:
    """Answers with the process that served the request. The step is what was published."""
    pid = str(os.getpid()).encode()
    return create_batcher("repr", 8, 0.001, batch_process_fn=lambda requests: [({"pid": pid}, None)] * len(requests))


def make_recording_batcher(ledger: Ledger) -> MukoeBatcher:
    return create_batcher("repr", 8, 0.001, batch_process_fn=ledger.callback)


class launched:
    """A context manager that ends the replicas."""

    def __init__(self, make_batcher: Callable[[], MukoeBatcher], count: int, **options: Any) -> None:
        self.replicas = launch(make_batcher, count, actor_options=SMALL, **options)

    def __enter__(self) -> Replicas:
        return self.replicas

    def __exit__(self, *_: object) -> None:
        self.replicas.shutdown()


def pid_of(client: MukoeBatcherClient) -> int:
    return int(client.send_request(b"x")[0]["pid"])


def shares(clients: list[MukoeBatcherClient]) -> list[int]:
    """How many clients each replica has, from the fewest."""
    return sorted(Counter(pid_of(client) for client in clients).values())


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def is_back(replicas: Replicas, count: int) -> bool:
    return len(replicas.metrics()) == count


# ---- launch and connect ----


def test_replicas_serve_once_launch_returns_and_clients_are_shared_out() -> None:
    with launched(make_pid_batcher, 2) as replicas:
        clients = [replicas.client() for _ in range(CALLERS)]
        assert isinstance(clients[0], MukoeBatcherClient)
        assert shares(clients) == [CALLERS // 2, CALLERS // 2]
        pids = {pid_of(client) for client in clients}
        for client in clients:
            client.close()
            client.close()
            with pytest.raises(RuntimeError, match="the client is closed"):
                client.send_request(b"x")
    eventually(lambda: not any(map(is_alive, pids)))


def test_launch_raises_what_a_replica_raised_and_leaves_nothing_behind() -> None:
    def make() -> MukoeBatcher:
        raise KeyError("no such checkpoint")

    with pytest.raises(KeyError, match="no such checkpoint"):
        launch(make, 2, actor_options=SMALL)


def test_launch_refuses_what_is_no_batcher() -> None:
    with pytest.raises(TypeError, match="make_batcher returned 3"):
        launch(lambda: 3, 1, actor_options=SMALL)  # type: ignore[arg-type, return-value]


def test_launch_waits_for_the_warm_up_and_raises_its_error() -> None:
    def make() -> MukoeBatcher:
        def infer(requests: list[bytes]) -> list[Any]:
            raise FloatingPointError(f"cannot compile for {requests!r}")

        return create_batcher("repr", 1, 0, batch_process_fn=infer, warm_up=[b"sample"])

    with pytest.raises(FloatingPointError, match="cannot compile for"):
        launch(make, 1, actor_options=SMALL)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"make_batcher": 3}, TypeError, "make_batcher is 3"),
        ({"count": 0}, ValueError, "count is 0"),
        ({"count": True}, ValueError, "count is True"),
        ({"count": 1.5}, ValueError, "count is 1.5"),
        ({"name": ""}, ValueError, "name is ''"),
        ({"actor_options": {"name": "x"}}, ValueError, "'name', which the replicas set"),
        ({"actor_options": {"no_such_option": 1}}, ValueError, "no_such_option"),
    ],
)
def test_bad_arguments_are_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        launch(**{"make_batcher": make_pid_batcher, "count": 1, **change})


def test_other_programs_find_replicas_by_their_name_and_use_all_of_their_methods(cluster: str, tmp_path: Path) -> None:
    with launched(make_pid_batcher, 1, name="shared") as replicas:
        printed = run_program(
            tmp_path,
            """
            import sys
            from grpc_batcher.ray import connect
            import ray

            ray.init(address=sys.argv[1], namespace=sys.argv[2], log_to_driver=False)
            replicas = connect("shared")
            replicas.publish(b"weights", step=7)
            replicas.scale(2)
            with replicas.client() as client:
                print(client.send_request(b"x")[1], len(replicas.metrics()))
            """,
            cluster,
            NAMESPACE,
        )
        assert printed[-1:] == ["7 2"]
        # What the program added outlives it, and what it published too once every replica has it.
        assert is_back(replicas, 2)
        with pytest.raises(ValueError, match="shared"):
            launch(make_pid_batcher, 1, name="shared")
    with pytest.raises(ValueError, match="name is 'shared'"):
        connect("shared")


def test_replicas_end_with_the_program_that_launched_them(cluster: str, tmp_path: Path) -> None:
    printed = run_program(
        tmp_path,
        """
        import os, sys
        from grpc_batcher import create_batcher
        from grpc_batcher.ray import launch
        import ray

        def make():
            pid = str(os.getpid()).encode()
            return create_batcher("repr", 1, 0, batch_process_fn=lambda requests: [({"pid": pid}, 0)] * len(requests))

        ray.init(address=sys.argv[1], namespace=sys.argv[2], log_to_driver=False)
        replicas = launch(make, 1, actor_options={"num_cpus": 0})
        with replicas.client() as client:
            print(client.send_request(b"x")[0]["pid"].decode())
        """,
        cluster,
        NAMESPACE,
    )
    eventually(lambda: not is_alive(int(printed[-1])))


# ---- clients ----


def test_a_client_can_be_sent_to_tasks_and_actors_and_each_copy_is_a_client_of_its_own() -> None:
    @ray.remote(num_cpus=0)
    def ask(client: MukoeBatcherClient, count: int) -> list[int]:
        return [pid_of(client) for _ in range(count)]

    with launched(make_pid_batcher, 2) as replicas, replicas.client(max_message_bytes=1000) as client:
        copy = pickle.loads(pickle.dumps(client))
        with copy:
            assert copy._connection.max_message_bytes == 1000
            assert pid_of(copy) != pid_of(client)
        assert ray.get([ask.remote(client, 5) for _ in range(2)])


def test_clients_are_as_strict_as_others_about_their_options() -> None:
    with launched(make_pid_batcher, 1) as replicas:
        with pytest.raises(ValueError, match="max_message_bytes is 0"):
            replicas.client(max_message_bytes=0)
        with replicas.client() as client:
            assert error_of(client.send_request, b"x", 1).code().name == "INVALID_ARGUMENT"
            assert pid_of(client)


# ---- weights ----


def make_array_batcher() -> MukoeBatcher:
    pid = os.getpid()

    def infer(batch: Batch) -> Any:
        weights = -1 if batch.weights is None else batch.weights[0]
        return {
            "pid": np.full(batch.size, pid),
            "weights": np.full(batch.size, weights),
            "step": np.full(batch.size, batch.step),
        }

    return create_batcher(
        "repr", 8, 0.001, batch_process_fn=infer, arrays={"data": Array((2,), "float32")}, warm_up=True
    )


def test_publishing_under_load_never_mixes_versions_and_steps_never_go_back() -> None:
    over = threading.Event()

    def ask(client: MukoeBatcherClient) -> int:
        newest: dict[int, int] = {}
        while not over.is_set():
            answer, step = client.send_request(np.zeros(2, "float32"))
            assert answer["weights"] == answer["step"] == step
            pid = int(answer["pid"])
            assert step >= newest.get(pid, 0)
            newest[pid] = step
        return max(newest.values())

    with launched(make_array_batcher, 2) as replicas:
        replicas.publish(np.full(1000, 1), step=1)
        clients = [replicas.client(arrays=True) for _ in range(CALLERS)]
        callers = [in_background(ask, client) for client in clients]
        for step in range(2, 102):
            weights = np.full(1000, step)
            replicas.publish(ray.put(weights) if step % 2 else weights, step=step)
        # Every replica has the last version when publish returns.
        for client in clients:
            assert client.send_request(np.zeros(2, "float32"))[1] == 101
        over.set()
        assert {caller.result() for caller in callers} <= {100, 101}


def test_a_replica_that_is_restarted_or_added_starts_with_the_latest_weights() -> None:
    with launched(make_pid_batcher, 1) as replicas, replicas.client() as client:
        replicas.publish("weights", step=5)
        killed = pid_of(client)
        os.kill(killed, signal.SIGKILL)
        eventually(lambda: is_back(replicas, 1) and answer_or_none(client) is not None)
        assert client.send_request(b"x")[1] == 5
        assert pid_of(client) != killed
        replicas.scale(2)
        clients = [replicas.client() for _ in range(4)]
        assert len(shares(clients)) == 2
        assert {each.send_request(b"x")[1] for each in clients} == {5}
        with pytest.raises(ValueError, match="step"):
            replicas.publish("weights", step=2**31)


def answer_or_none(client: MukoeBatcherClient) -> Any:
    try:
        return client.send_request(b"x")
    except RequestError:
        return None


# ---- trials: 8 callers on 2 replicas, with an account of every request ----


def test_a_killed_replica_costs_its_own_callers_one_request_each_at_most_and_is_replaced(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    with launched(partial(make_recording_batcher, ledger), 2) as replicas:
        clients = [replicas.client() for _ in range(CALLERS)]
        with asking(ledger, "caller", clients):
            eventually(lambda: streams_of(replicas) == [4, 4])
            wait_for_answers(ledger, 100)
            os.kill(pid_of_replica(replicas, 0), signal.SIGKILL)
            wait_for_answers(ledger, 100)  # while it is away
            eventually(lambda: is_back(replicas, 2) and streams_of(replicas) == [4, 4])
            wait_for_answers(ledger, 100)
    account = ledger.account(failures={"UNAVAILABLE"})
    assert len(account.failed) <= 4
    assert max(Counter(name.partition("/")[0] for name in account.failed).values(), default=0) <= 1


def test_draining_and_adding_replicas_fails_no_request(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    with launched(partial(make_recording_batcher, ledger), 1) as replicas:
        clients = [replicas.client() for _ in range(CALLERS)]
        with asking(ledger, "caller", clients):
            for count, even in ((3, [2, 3, 3]), (2, [4, 4])):
                wait_for_answers(ledger, 100)
                replicas.scale(count)
                eventually(lambda even=even: streams_of(replicas) == even)
            replicas.scale(1)
            assert streams_of(replicas) == [CALLERS]
            wait_for_answers(ledger, 100)
    assert ledger.account().failed == {}


def test_requests_do_not_notice_a_killed_directory_and_it_comes_back(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    with launched(partial(make_recording_batcher, ledger), 2) as replicas:
        replicas.publish("weights", step=3)
        clients = [replicas.client() for _ in range(CALLERS)]
        with asking(ledger, "caller", clients):
            eventually(lambda: streams_of(replicas) == [4, 4])
            ray.kill(replicas._directory, no_restart=False)
            wait_for_answers(ledger, 200)
            replicas.scale(3)
            eventually(lambda: streams_of(replicas) == [2, 3, 3])
            # It has learnt from the replicas what was published, and tells the new one.
            assert {metrics.step for metrics in replicas.metrics().values()} == {3}
            replicas.publish("weights", step=4)
            assert {metrics.step for metrics in replicas.metrics().values()} == {4}
    assert ledger.account().failed == {}


def test_the_clients_of_a_killed_caller_are_forgotten_and_the_rest_is_shared_out_again(tmp_path: Path) -> None:
    @ray.remote(num_cpus=0)
    class Caller:
        def __init__(self, ledger: Ledger, name: str, client: MukoeBatcherClient) -> None:
            self._work = ledger, name, client
            threading.Thread(target=self._ask, daemon=True).start()

        def _ask(self) -> None:
            ledger, name, client = self._work
            ledger.keep_asking(client, name, lambda: False, thinking_s=0.01)

    ledger = Ledger(tmp_path / "ledger")
    with launched(partial(make_recording_batcher, ledger), 2) as replicas, replicas.client() as client:
        callers = [Caller.remote(ledger, f"caller-{number}", client) for number in range(4)]
        eventually(lambda: streams_of(replicas) == [2, 2])
        for caller in callers[:2]:
            ray.kill(caller)
        eventually(lambda: streams_of(replicas) == [1, 1])
        for caller in callers[2:]:
            ray.kill(caller)
        eventually(lambda: streams_of(replicas) == [0, 0])
    ledger.account(killed={f"caller-{number}" for number in range(4)})


def streams_of(replicas: Replicas) -> list[int]:
    """How many streams each replica has, from the fewest. A client that sends one request at a time has one."""
    return sorted(metrics.open_streams for metrics in replicas.metrics().values())


def pid_of_replica(replicas: Replicas, number: int) -> int:
    actor = ray.get_actor(f"{replicas._actor_name}.{number}")
    pid: int = ray.get(actor.__ray_call__.remote(lambda _self: os.getpid()))
    return pid


# ---- metrics, and the package ----


def test_prometheus_gets_the_metrics_of_all_replicas_each_with_its_label() -> None:
    with launched(make_pid_batcher, 2) as replicas:
        clients = [replicas.client() for _ in range(4)]
        assert shares(clients) == [2, 2]
        families = {family.name: family for family in ReplicasCollector(replicas).collect()}
        answered = {
            (sample.labels["model"], sample.labels["replica"]): sample.value
            for sample in families["grpc_batcher_requests"].samples
            if sample.labels["code"] == "OK"
        }
        assert answered == {("repr", "0"): 2.0, ("repr", "1"): 2.0}
        assert [sample.value for sample in families["grpc_batcher_ready"].samples] == [1.0, 1.0]


def test_importing_the_package_does_not_import_ray(tmp_path: Path) -> None:
    assert run_program(
        tmp_path, "import sys, grpc_batcher, grpc_batcher.prometheus\nprint('ray' in sys.modules)"
    ) == ["False"]
    assert not hasattr(grpc_batcher, "launch")


def test_in_a_replica_grpc_is_polled_as_elsewhere() -> None:
    def make() -> MukoeBatcher:
        chosen = grpc_batcher.info()["poller"].encode()
        return create_batcher("repr", 1, 0, batch_process_fn=lambda requests: [({"poller": chosen}, 0)])

    with launched(make, 1) as replicas, replicas.client() as client:
        assert client.send_request(b"x")[0]["poller"] == grpc_batcher.info()["poller"].encode()
