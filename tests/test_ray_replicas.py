"""Replicas on a real Ray: placed, found, killed, drained, published to, with an account of every request.

`make test-ray` runs these tests. They are skipped where Ray is not installed.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import pickle
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import grpc_batcher
from grpc_batcher import Array, Batch, MukoeBatcher, MukoeBatcherClient, RequestError, create_batcher

import pytest
from accounting import Ledger, asking, wait_for_answers
from prometheus_client import CollectorRegistry
from serving import error_of, eventually, in_background, run_program

ray = pytest.importorskip("ray", reason="Ray is not installed")
np = pytest.importorskip("numpy")

from grpc_batcher._replicas import client as replica_client  # noqa: E402
from grpc_batcher._replicas.directory import Directory  # noqa: E402
from grpc_batcher._replicas.names import exists  # noqa: E402
from grpc_batcher._replicas.replica import Publication  # noqa: E402
from grpc_batcher.prometheus import ReplicasCollector  # noqa: E402
from grpc_batcher.ray import Replicas, connect, launch  # noqa: E402

from ray._private.internal_api import memory_summary  # noqa: E402

pytestmark = [
    pytest.mark.timeout(300),  # starting Ray, or a process of it, takes seconds
    pytest.mark.filterwarnings("default"),
    pytest.mark.xdist_group("ray"),
]

NAMESPACE = "grpc_batcher tests"
CALLERS = 8
SMALL = {"num_cpus": 0}  # the replicas of these tests share two cores


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Ray of this machine. Yields its address."""
    before = Path.cwd()
    with pytest.MonkeyPatch.context() as patch:
        # Ray's workers look for modules where the driver runs, and would find the uncompiled tree.
        os.chdir(tmp_path_factory.mktemp("driver"))
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            num_cpus=2,
            resources={"accelerator": 1},
            object_store_memory=200_000_000,
            namespace=NAMESPACE,
            include_dashboard=False,
            log_to_driver=False,
        )
        yield ray.get_runtime_context().gcs_address
        ray.shutdown()
        os.chdir(before)


@pytest.fixture(autouse=True)
def _nothing_is_left(cluster: str) -> Iterator[None]:
    """Every test leaves only what the tests share."""
    yield
    eventually(lambda: all(name.startswith(("grpc_batcher.pids", "grpc_batcher.trials")) for name in actors()))


def actors() -> list[str]:
    return [name for name in ray.util.list_named_actors() if name.startswith("grpc_batcher.")]


def make_pid_batcher() -> MukoeBatcher:
    """Answers with the process that served the request, and how gRPC polls there. The step is what was published."""
    answer = {"pid": str(os.getpid()).encode(), "poller": grpc_batcher.info()["poller"].encode()}
    return create_batcher("repr", 8, 0.001, batch_process_fn=lambda requests: [(answer, None)] * len(requests))


def make_recording_batcher(ledger: Ledger) -> MukoeBatcher:
    return create_batcher("repr", 8, 0.001, batch_process_fn=ledger.callback)


class launched:
    """A context manager that ends the replicas."""

    def __init__(self, make_batcher: Callable[[], MukoeBatcher], count: int, **options: Any) -> None:
        self.replicas = launch(make_batcher, count, **{"actor_options": SMALL, **options})

    def __enter__(self) -> Replicas:
        return self.replicas

    def __exit__(self, *_: object) -> None:
        self.replicas.shutdown()


@pytest.fixture(scope="module")
def pids(cluster: str) -> Iterator[Replicas]:
    """Two replicas that answer with their process, for all tests that leave them as they are."""
    with launched(make_pid_batcher, 2, name="pids") as replicas:
        yield replicas


@pytest.fixture(scope="module")
def trials(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Replicas, Ledger]]:
    """Replicas that record what they see, and the ledger. Every trial begins with two."""
    ledger = Ledger(tmp_path_factory.mktemp("trials") / "ledger")
    with launched(partial(make_recording_batcher, ledger), 2, name="trials") as replicas:
        yield replicas, ledger


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


def pid_of_actor(actor: Any) -> int:
    pid: int = ray.get(actor.__ray_call__.remote(lambda _self: os.getpid()))
    return pid


def replica(replicas: Replicas, number: int) -> Any:
    """The actor."""
    return ray.get_actor(f"{replicas._actor_name}.{number}")


def pid_of_replica(replicas: Replicas, number: int) -> int:
    return pid_of_actor(replica(replicas, number))


def kill(pid: int) -> None:
    """Returns once the process is dead."""
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not is_alive(pid))


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Have a process do nothing until this is left."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def in_directory(replicas: Replicas, function: Callable[[Any], Any]) -> Any:
    """Call a function with the directory, in its process."""
    return ray.get(replicas._directory.__ray_call__.remote(function))


def set_in_directory(replicas: Replicas, **constants: float) -> None:
    def change(directory: Any) -> None:
        vars(sys.modules[type(directory).__module__]).update(constants)

    in_directory(replicas, change)


# ---- launch and connect ----


def test_replicas_serve_once_launch_returns_and_clients_are_shared_out() -> None:
    with launched(make_pid_batcher, 2) as replicas:
        clients = [replicas.client() for _ in range(CALLERS)]
        assert isinstance(clients[0], MukoeBatcherClient)
        eventually(lambda: shares(clients) == [CALLERS // 2, CALLERS // 2])
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


def test_launch_raises_when_a_replicas_process_dies_before_it_serves() -> None:
    with pytest.raises(RuntimeError, match="replica 0 died before it served"):
        launch(lambda: os._exit(1), 1, actor_options=SMALL)  # type: ignore[arg-type, return-value]


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
        ({"name": "model.1"}, ValueError, "name is 'model.1'; it must not end in a dot and a number"),
        ({"actor_options": {"name": "x"}}, ValueError, "'name', which the replicas set"),
        ({"actor_options": {"no_such_option": 1}}, ValueError, "no_such_option"),
    ],
)
def test_bad_arguments_are_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        launch(**{"make_batcher": make_pid_batcher, "count": 1, **change})


def test_other_programs_find_replicas_by_their_name_and_use_all_of_their_methods(
    cluster: str, tmp_path: Path, pids: Replicas
) -> None:
    printed = run_program(
        tmp_path,
        """
        import sys
        from grpc_batcher.ray import connect
        import ray

        ray.init(address=sys.argv[1], namespace=sys.argv[2], log_to_driver=False)
        replicas = connect("pids")
        replicas.publish(b"weights", step=7)
        replicas.scale(3)
        with replicas.client() as client:
            print(client.send_request(b"x")[1], len(replicas.metrics()))
        """,
        cluster,
        NAMESPACE,
    )
    assert printed[-1:] == ["7 3"]
    # What the program added outlives it, and so does what it published once every replica has it.
    assert is_back(pids, 3)
    assert {metrics.step for metrics in pids.metrics().values()} == {7}
    pids.scale(2)
    with pytest.raises(ValueError, match="pids"):
        launch(make_pid_batcher, 1, name="pids")
    with pytest.raises(ValueError, match="name is 'nobody'"):
        connect("nobody")
    with pytest.raises(ValueError, match=r"name is 'pids\.1'"):  # a replica
        connect("pids.1")


def test_a_later_call_takes_over_from_one_that_waits_for_a_place() -> None:
    """Ray has one accelerator here."""
    options = {"num_cpus": 0, "resources": {"accelerator": 1}}
    with launched(make_pid_batcher, 1, actor_options=options) as replicas, replicas.client() as client:
        waiting = in_background(replicas.scale, 3)
        eventually(lambda: len([name for name in actors() if name.startswith(f"{replicas._actor_name}.")]) == 3)
        replicas.scale(1)
        with pytest.raises(RuntimeError, match="scaling to 3 was given up"):
            waiting.result()
        assert pid_of(client)
        waiting = in_background(replicas.scale, 2)
        eventually(lambda: f"{replicas._actor_name}.1" in actors())
        replicas.shutdown()
        with pytest.raises(RuntimeError, match="scaling to 2 was given up"):
            waiting.result()


def test_a_call_that_takes_over_while_a_replica_that_failed_ends_forgets_that_one(tmp_path: Path) -> None:
    def make() -> MukoeBatcher:
        (tmp_path / "made").touch(exist_ok=False)  # the second one fails
        return make_pid_batcher()

    def keep_names(directory: Any) -> None:
        """What was killed seems to be there until this is undone."""
        directory._has_name = lambda _entry: True

    def is_ending_one(directory: Any) -> bool:
        return any(entry.is_draining for entry in directory._replicas.values())

    with launched(make, 1) as replicas:
        in_directory(replicas, keep_names)
        failing = in_background(replicas.scale, 2)
        eventually(lambda: in_directory(replicas, is_ending_one))
        replicas.scale(1)
        with pytest.raises(RuntimeError, match="scaling to 2 was given up"):
            failing.result()
        in_directory(replicas, lambda directory: delattr(directory, "_has_name"))
        eventually(lambda: in_directory(replicas, remembered) == (1, 0))


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


def test_a_client_can_be_sent_to_tasks_and_actors_and_each_copy_is_a_client_of_its_own(pids: Replicas) -> None:
    @ray.remote(num_cpus=0)
    def ask(client: MukoeBatcherClient, count: int) -> list[int]:
        return [pid_of(client) for _ in range(count)]

    with pids.client(max_message_bytes=1000) as client, pickle.loads(pickle.dumps(client)) as copy:
        assert copy._connection.max_message_bytes == 1000
        eventually(lambda: pid_of(copy) != pid_of(client))
        assert [len(found) for found in ray.get([ask.remote(client, 5) for _ in range(2)])] == [5, 5]


def test_a_client_sends_in_every_way_that_others_do(pids: Replicas) -> None:
    with pids.client(max_in_flight=4) as client:
        futures = [client.submit(b"x") for _ in range(10)]
        answers = [*(future.result() for future in futures), *client.send_many([b"x"] * 10)]
        assert all(is_alive(int(answer["pid"])) for answer, _step in answers)


def test_clients_are_as_strict_as_others_about_their_options(pids: Replicas) -> None:
    with pytest.raises(ValueError, match="max_message_bytes is 0"):
        pids.client(max_message_bytes=0)
    with pids.client() as client:
        assert error_of(client.send_request, b"x", 1).code().name == "INVALID_ARGUMENT"
        assert pid_of(client)


def test_in_a_replica_grpc_is_polled_as_elsewhere(pids: Replicas) -> None:
    with pids.client() as client:
        assert client.send_request(b"x")[0]["poller"] == grpc_batcher.info()["poller"].encode()


def test_without_a_replica_requests_are_unavailable_and_closing_still_works() -> None:
    with launched(make_pid_batcher, 1) as replicas:
        clients = [replicas.client() for _ in range(2)]
        assert pid_of(clients[0])
    eventually(lambda: not exists(replicas._actor_name))  # so closing clients does not call it
    assert error_of(clients[0].send_request, b"x").code().name == "UNAVAILABLE"
    # It never asked before. The directory ends a moment after the replicas.
    eventually(lambda: "directory does not answer" in error_of(clients[1].send_request, b"x").details())
    assert error_of(clients[1].send_request, b"x").code().name == "UNAVAILABLE"
    # Errors are the outcomes of the requests also where these are not waited for one by one.
    future = clients[1].submit(b"x")
    for error in (future.exception(), *clients[1].send_many([b"x"] * 2, return_exceptions=True)):
        assert isinstance(error, RequestError)
        assert error.code().name == "UNAVAILABLE"
    assert error_of(clients[1].send_many, [b"x"]).code().name == "UNAVAILABLE"
    for client in clients:
        client.close()
    replicas.shutdown()


def test_a_first_request_waits_for_a_silent_directory_within_limits_and_holds_up_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with launched(make_pid_batcher, 1) as replicas, replicas.client() as patient, replicas.client() as closed:
        with stopped(pid_of_actor(replicas._directory)):
            waiting, doomed = in_background(patient.send_request, b"x"), in_background(closed.send_request, b"x")
            eventually(lambda: patient._directory_route._waits_until_ns and closed._directory_route._waits_until_ns)
            closed.close()
            error = error_of(patient.send_request, b"x", timeout_s=0.01)
            assert error.code().name == "DEADLINE_EXCEEDED"
            monkeypatch.setattr(replica_client, "_FIRST_ANSWER_LIMIT_NS", 10_000_000)
            with replicas.client() as impatient:
                error = error_of(impatient.send_request, b"x")
                assert error.code().name == "UNAVAILABLE"
                assert "directory does not answer" in error.details()
            assert not waiting.done()
        assert waiting.result()
        with pytest.raises(RuntimeError, match="the client is closed"):
            doomed.result()


def test_an_idle_client_finds_replicas_that_were_restarted_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_client, "_LONG_PAUSE_INTERVALS", 0)
    with launched(make_pid_batcher, 2) as replicas, replicas.client() as client:
        killed = {pid_of_replica(replicas, number) for number in range(2)}
        assert pid_of(client) in killed
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: not any(map(is_alive, killed)))
        eventually(lambda: is_back(replicas, 2))
        assert pid_of(client) not in killed


def test_an_idle_client_whose_replica_dies_finds_the_other_where_it_was_restarted() -> None:
    with launched(make_pid_batcher, 2) as replicas, replicas.client() as client:
        own = pid_of(client)
        (other,) = (number for number in range(2) if pid_of_replica(replicas, number) != own)
        before = set(client._directory_route._replicas)
        kill(pid_of_replica(replicas, other))

        def knows_where_it_is_now() -> bool:
            assert pid_of(client) == own  # while it sends requests, it asks
            known = set(client._directory_route._replicas)
            return len(known) == 2 and known != before

        eventually(knows_where_it_is_now)
        with stopped(pid_of_actor(replicas._directory)):  # so that it has to know by itself
            kill(own)
            eventually(lambda: not any(loan.stream.is_alive() for loan in client._pool._idle))
            assert pid_of(client) == pid_of_replica(replicas, other)


def test_a_directory_recovers_beside_a_replica_that_vanishes_and_although_ray_did_not_answer_at_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @ray.remote(num_cpus=0)
    class Vanishing:
        pass

    name = "grpc_batcher.nobody.0"
    list_named_actors = ray.util.list_named_actors
    attempts = itertools.count()

    def list_late() -> list[str]:
        if next(attempts) == 0:
            raise ray.exceptions.RaySystemError("not now")
        actor = Vanishing.options(name=name).remote()
        eventually(lambda: exists(name))
        names: list[str] = list_named_actors()
        assert name in names
        ray.kill(actor)
        eventually(lambda: not exists(name))
        return names

    async def recover() -> None:
        directory = Directory("grpc_batcher.nobody", b"", {})
        with pytest.raises(ray.exceptions.RaySystemError):
            await directory.metrics()
        assert await directory.metrics() == {}
        assert directory._replicas == {}

    monkeypatch.setattr(ray.util, "list_named_actors", list_late)
    asyncio.run(recover())


def test_no_call_by_which_a_replica_watches_the_directory_lasts_for_ever() -> None:
    with launched(make_pid_batcher, 1) as replicas, replicas.client() as client:
        set_in_directory(replicas, _HOLD_S=0.001)
        ray.get(replicas._directory.hold.remote())
        assert pid_of(client)


def test_new_clients_of_a_restarted_directory_do_not_wait_for_a_replica_that_hangs() -> None:
    with launched(make_pid_batcher, 2) as replicas:
        replicas.publish("weights", step=7)
        hanging, other = (pid_of_replica(replicas, number) for number in range(2))
        with stopped(hanging):
            kill(pid_of_actor(replicas._directory))
            with replicas.client() as client:
                answer, step = client.send_request(b"x")
                assert (int(answer["pid"]), step) == (other, 7)
        eventually(lambda: is_back(replicas, 2))
        assert pid_of_replica(replicas, 0) == hanging


def test_a_shutdown_right_after_the_directory_was_killed_answers_what_was_taken_in(tmp_path: Path) -> None:
    def make() -> MukoeBatcher:
        def hold(requests: list[bytes]) -> list[Any]:
            (tmp_path / "held").touch()
            eventually((tmp_path / "released").exists)
            return [({"result": data}, 0) for data in requests]

        return create_batcher("repr", 8, 0.001, batch_process_fn=hold)

    def is_ending(this: Any) -> bool:
        return not this._batcher.is_server_ready()

    with launched(make, 1) as replicas, replicas.client() as client:
        actor = replica(replicas, 0)
        request = client.submit(b"x")
        eventually((tmp_path / "held").exists)
        kill(pid_of_actor(replicas._directory))
        ending = in_background(replicas.shutdown, grace_s=100)
        eventually(lambda: request.done() or ray.get(actor.__ray_call__.remote(is_ending)))
        (tmp_path / "released").touch()
        assert request.result() == ({"result": b"x"}, 0)
        ending.result()


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
    """What was published before is forgotten."""

    def ask(client: MukoeBatcherClient) -> None:
        newest: dict[int, int] = {}
        while max(newest.values(), default=0) < 101:
            answer, step = client.send_request(np.zeros(2, "float32"))
            assert answer["weights"] == answer["step"] == step
            pid = int(answer["pid"])
            assert step >= newest.get(pid, 0)
            newest[pid] = step

    with launched(make_array_batcher, 2) as replicas:
        replicas.publish(np.full(100_000, 1), step=1)
        clients = [replicas.client(arrays=True) for _ in range(CALLERS)]
        callers = [in_background(ask, client) for client in clients]
        for step in range(2, 102):
            weights = np.full(100_000, step)
            replicas.publish(ray.put(weights) if step % 2 else weights, step=step)
        # Every replica has the last version when publish returns.
        for client in clients:
            assert client.send_request(np.zeros(2, "float32"))[1] == 101
        for caller in callers:
            caller.result()
        for actor in (replicas._directory, *actors_of(replicas)):
            eventually(lambda actor=actor: ray.get(actor.__ray_call__.remote(count_publications)) <= 2)


def count_publications(_self: Any) -> int:
    """How many publications this process remembers, the one of nothing included."""
    gc.collect()
    return sum(type(each) is Publication for each in gc.get_objects())


def actors_of(replicas: Replicas) -> list[Any]:
    """The actors that serve."""
    return [replica(replicas, int(number)) for number in replicas.metrics()]


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
        eventually(lambda: len(shares(clients)) == 2)
        assert {each.send_request(b"x")[1] for each in clients} == {5}
        with pytest.raises(ValueError, match="step"):
            replicas.publish("weights", step=2**31)


def test_publishing_does_not_wait_for_ever_for_a_replica_that_hangs_and_it_gets_the_weights_when_it_goes_on() -> None:
    with launched(make_pid_batcher, 2) as replicas:
        set_in_directory(replicas, _PUBLISH_LIMIT_S=1.0)
        with stopped(pid_of_replica(replicas, 0)):
            replicas.publish("weights", step=5)
            assert ray.get(replica(replicas, 1).metrics.remote()).step == 5
        eventually(lambda: [metrics.step for metrics in replicas.metrics().values()] == [5, 5])


def test_a_replica_that_was_restarted_unnoticed_serves_without_another_restart() -> None:
    def forget(this: Any) -> tuple[int, int]:
        """Make the process look like a new one. Returns it, and the port that it served on."""
        this.former, this._batcher = this._batcher, None
        return os.getpid(), this.former.port

    def serving(this: Any) -> tuple[int, int] | None:
        return None if this._batcher is None else (os.getpid(), this._batcher.port)

    with launched(make_pid_batcher, 1) as replicas:
        actor = replica(replicas, 0)
        pid, port = ray.get(actor.__ray_call__.remote(forget))
        eventually(lambda: is_back(replicas, 1))
        new_pid, new_port = ray.get(actor.__ray_call__.remote(serving))
        assert (new_pid, new_port != port) == (pid, True)


def answer_or_none(client: MukoeBatcherClient) -> Any:
    try:
        return client.send_request(b"x")
    except RequestError:
        return None


# ---- trials: 8 callers on 2 replicas, with an account of every request ----

# Each sends one request at a time, in one of the ways.
WAYS = {
    "blocking": lambda client, data, timeout_s: client.send_request(data, timeout_s=timeout_s),
    "futures": lambda client, data, timeout_s: client.submit(data, timeout_s=timeout_s).result(),
    "many": lambda client, data, timeout_s: client.send_many([data], timeout_s=timeout_s)[0],
}


class Way:
    """Looks to a ledger like a client that only has `send_request`."""

    def __init__(self, way: str, client: MukoeBatcherClient) -> None:
        self._send, self._client = WAYS[way], client

    def send_request(self, data: bytes, *, timeout_s: float | None = None) -> Any:
        return self._send(self._client, data, timeout_s)


@contextmanager
def trial(replicas: Replicas, ledger: Ledger, name: str) -> Iterator[None]:
    """Have callers ask until this is left."""
    replicas.scale(2)
    with ExitStack() as stack:
        clients: list[Any] = []
        for _, way in zip(range(CALLERS), itertools.cycle(WAYS), strict=False):
            clients.append(Way(way, stack.enter_context(replicas.client())))
        stack.enter_context(asking(ledger, name, clients))
        eventually(lambda: streams_of(replicas) == [4, 4])
        wait_for_answers(ledger, 100)
        yield


def failures_of(ledger: Ledger, name: str) -> list[str]:
    """The requests of a trial that failed. The account is of all trials until now."""
    return [request for request in ledger.account(failures={"UNAVAILABLE"}).failed if request.startswith(f"{name}-")]


def outlasting(ledger: Ledger, answers: int) -> set[str]:
    """The requests that do not end while this many others are answered."""
    before = ledger.unended()
    wait_for_answers(ledger, answers)
    return before & ledger.unended()


def test_a_killed_replica_costs_its_own_callers_one_request_each_at_most_and_is_replaced(
    trials: tuple[Replicas, Ledger],
) -> None:
    replicas, ledger = trials
    with trial(replicas, ledger, "killed"):
        victim = pid_of_replica(replicas, 0)
        os.kill(victim, signal.SIGSTOP)  # now its callers are those whose requests do not end
        stuck: set[str] = set()
        while len(stuck) != CALLERS // 2:
            stuck = outlasting(ledger, 20)
        os.kill(victim, signal.SIGKILL)
        wait_for_answers(ledger, 100)  # while it is away
        eventually(lambda: is_back(replicas, 2) and streams_of(replicas) == [4, 4])
        wait_for_answers(ledger, 100)
        assert pid_of_replica(replicas, 0) != victim
    assert set(failures_of(ledger, "killed")) <= stuck


def test_a_replica_that_is_killed_while_it_answers_costs_its_callers_one_request_each_at_most(
    trials: tuple[Replicas, Ledger],
) -> None:
    replicas, ledger = trials
    with trial(replicas, ledger, "shot"):
        os.kill(pid_of_replica(replicas, 1), signal.SIGKILL)
        wait_for_answers(ledger, 100)
        eventually(lambda: is_back(replicas, 2) and streams_of(replicas) == [4, 4])
    callers = Counter(request.partition("/")[0] for request in failures_of(ledger, "shot"))
    assert max(callers.values(), default=0) <= 1
    assert len(callers) <= CALLERS // 2


def test_draining_and_adding_replicas_fails_no_request(trials: tuple[Replicas, Ledger]) -> None:
    replicas, ledger = trials
    with trial(replicas, ledger, "drained"):
        for count, even in ((1, [8]), (3, [2, 3, 3]), (2, [4, 4])):
            replicas.scale(count)
            eventually(lambda even=even: streams_of(replicas) == even)
            wait_for_answers(ledger, 100)
    assert failures_of(ledger, "drained") == []


def test_many_requests_in_flight_move_from_drained_replicas_and_only_a_killed_ones_fail(
    trials: tuple[Replicas, Ledger],
) -> None:
    replicas, ledger = trials
    replicas.scale(2)
    with sending_many(replicas, ledger, "many-drained"):
        for count in (1, 3, 2):
            replicas.scale(count)
            wait_for_answers(ledger, 200)
    assert failures_of(ledger, "many-drained") == []
    with sending_many(replicas, ledger, "many-shot"):
        eventually(lambda: streams_of(replicas) == [AT_ONCE, AT_ONCE])
        os.kill(pid_of_replica(replicas, 0), signal.SIGKILL)
        wait_for_answers(ledger, 200)
        eventually(lambda: is_back(replicas, 2))
    # At most what one client had sent at once.
    assert len({request.partition(".")[0] for request in failures_of(ledger, "many-shot")}) <= 1


AT_ONCE = 16


@contextmanager
def sending_many(replicas: Replicas, ledger: Ledger, name: str) -> Iterator[None]:
    """Have two clients with many requests in flight until this is left."""
    over = threading.Event()

    def ask(client: MukoeBatcherClient, caller: str) -> None:
        for number in itertools.count():
            if over.is_set():
                return
            ledger.ask_many(client, [f"{caller}/{number}.{each}" for each in range(AT_ONCE)])

    with replicas.client() as first, replicas.client() as second:
        callers = [in_background(ask, first, f"{name}-0"), in_background(ask, second, f"{name}-1")]
        wait_for_answers(ledger, 200)
        try:
            yield
        finally:
            over.set()
        for caller in callers:
            caller.result()


def test_requests_do_not_notice_a_killed_directory_and_it_comes_back(trials: tuple[Replicas, Ledger]) -> None:
    replicas, ledger = trials
    replicas.publish("weights", step=3)
    with trial(replicas, ledger, "lost"):
        ray.kill(replicas._directory, no_restart=False)
        wait_for_answers(ledger, 200)
        replicas.scale(3)
        eventually(lambda: streams_of(replicas) == [2, 3, 3])
        # It has learnt from the replicas what was published, and tells the new one.
        assert {metrics.step for metrics in replicas.metrics().values()} == {3}
        replicas.publish("weights", step=4)
        assert {metrics.step for metrics in replicas.metrics().values()} == {4}
    assert failures_of(ledger, "lost") == []


def test_scaling_down_right_after_the_directory_was_killed_fails_no_request_and_new_clients_are_answered(
    trials: tuple[Replicas, Ledger],
) -> None:
    replicas, ledger = trials
    with trial(replicas, ledger, "orphaned"):
        kill(pid_of_actor(replicas._directory))
        scaling = in_background(replicas.scale, 1)
        with replicas.client() as client:
            assert ledger.ask(client, "orphaned-new/1")
        scaling.result()
        eventually(lambda: streams_of(replicas) == [CALLERS])
        wait_for_answers(ledger, 100)
    assert failures_of(ledger, "orphaned") == []


def test_the_clients_of_a_killed_caller_are_forgotten_and_the_rest_is_shared_out_again(
    trials: tuple[Replicas, Ledger], tmp_path: Path
) -> None:
    @ray.remote(num_cpus=0)
    class Caller:
        """Two callers in one process."""

        def __init__(self, ledger: Ledger, name: str, client: MukoeBatcherClient) -> None:
            for number in range(2):
                copy = pickle.loads(pickle.dumps(client))
                threading.Thread(
                    target=ledger.keep_asking,
                    args=(copy, f"{name}-{number}", lambda: False),
                    kwargs={"thinking_s": 0.01},
                    daemon=True,
                ).start()

    replicas, ledger = trials
    replicas.scale(2)
    with replicas.client() as client:
        callers = [Caller.remote(ledger, f"mortal-{number}", client) for number in range(2)]
        eventually(lambda: streams_of(replicas) == [2, 2])
        ray.kill(callers[0])
        eventually(lambda: streams_of(replicas) == [1, 1])
        ray.kill(callers[1])
        eventually(lambda: streams_of(replicas) == [0, 0])
    killed = {f"mortal-{process}-{number}" for process in range(2) for number in range(2)}
    ledger.account(failures={"UNAVAILABLE"}, killed=killed)


def test_after_all_trials_nothing_has_grown(trials: tuple[Replicas, Ledger]) -> None:
    replicas, _ledger = trials
    replicas.scale(2)
    eventually(lambda: in_directory(replicas, remembered) == (2, 0))
    eventually(lambda: streams_of(replicas) == [0, 0])
    # No process is left of those that died or were drained.
    names = actors()
    directories = [name for name in names if not name.rpartition(".")[2].isdecimal()]
    raylet = parent_of(pid_of_replica(replicas, 0))
    eventually(lambda: processes_called("ray::Directory", raylet) == len(directories))
    eventually(lambda: processes_called("ray::Replica", raylet) == len(names) - len(directories))


# The larger they are and the more of them there are, the clearer is a leak from what an allocator keeps.
LARGE_MIB = 8
LARGE_BYTES = LARGE_MIB << 20
ROUNDS = 8


def make_large_batcher() -> MukoeBatcher:
    answer = {"pid": str(os.getpid()).encode(), "padding": b"x" * LARGE_BYTES}
    return create_batcher("repr", 8, 0.001, batch_process_fn=lambda requests: [(answer, None)] * len(requests))


def test_rounds_of_large_weights_and_answers_leave_no_memory_in_use() -> None:
    steps = itertools.count()

    def memory_after_rounds() -> Counter[int]:
        """How many bytes each process uses after each client had an answer from each of these weights."""
        for step in itertools.islice(steps, ROUNDS):
            replicas.publish(np.full(LARGE_BYTES, step, "uint8"), step=step)
            assert [client.send_request(b"x")[1] for client in clients] == [step, step]
        eventually(lambda: stored_mib() // LARGE_MIB == 1)  # the latest weights
        return Counter({pid: own_bytes(pid) for pid in processes})

    with launched(make_large_batcher, 2) as replicas, replicas.client() as first, replicas.client() as second:
        clients = [first, second]
        eventually(lambda: shares(clients) == [1, 1])
        processes = [pid_of_actor(actor) for actor in (replicas._directory, *actors_of(replicas))]
        memory_after_rounds()
        before = memory_after_rounds()
        growth = memory_after_rounds() - before
        assert max(growth.values(), default=0) < ROUNDS * LARGE_BYTES / 2


def stored_mib() -> int:
    """How much of Ray's object store is in use, as `ray memory` says. What processes still read counts."""
    found = memory_summary(stats_only=True).partition("Plasma memory usage ")[2]
    return int(found.split()[0])


def own_bytes(pid: int) -> int:
    """How much memory a process uses, without what it shares with others, such as the object store."""
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def remembered(directory: Any) -> tuple[int, int]:
    """How many replicas and clients a directory knows."""
    directory._forget_clients()
    return len(directory._replicas), len(directory._clients)


def processes_called(beginning: str, parent: str) -> int:
    """How many processes of a parent have a name that begins like this."""
    count = 0
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            count += (process / "cmdline").read_text().startswith(beginning) and parent_of(process.name) == parent
    return count


def parent_of(pid: int | str) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]


def streams_of(replicas: Replicas) -> list[int]:
    """How many streams each replica has, from the fewest. A client that sends one request at a time has one."""
    return sorted(metrics.open_streams for metrics in replicas.metrics().values())


# ---- metrics, and the package ----


def test_prometheus_gets_the_metrics_of_all_replicas_each_with_its_label(pids: Replicas) -> None:
    with pids.client() as first, pids.client() as second:
        eventually(lambda: shares([first, second]) == [1, 1])
        counters = pids.metrics()
        families = {family.name: family for family in ReplicasCollector(pids).collect()}
    answered = {
        (sample.labels["model"], sample.labels["replica"]): sample.value
        for sample in families["grpc_batcher_requests"].samples
        if sample.labels["code"] == "OK"
    }
    assert answered == {("repr", number): metrics.requests["OK"] for number, metrics in counters.items()}
    assert set(counters) == {"0", "1"}
    assert [sample.value for sample in families["grpc_batcher_ready"].samples] == [1.0, 1.0]


def test_after_shutdown_a_registered_collector_gives_no_samples(caplog: pytest.LogCaptureFixture) -> None:
    registry = CollectorRegistry()
    with launched(make_pid_batcher, 1) as replicas:
        registry.register(ReplicasCollector(replicas))
        assert registry.get_sample_value("grpc_batcher_ready", {"model": "repr", "replica": "0"}) == 1

    def is_logged() -> bool:
        assert [sample for family in registry.collect() for sample in family.samples] == []
        return "cannot tell their metrics" in caplog.text

    with caplog.at_level("DEBUG", logger="grpc_batcher"):
        eventually(is_logged)  # the directory ends a moment after the replicas


def test_importing_the_package_does_not_import_ray(tmp_path: Path) -> None:
    assert run_program(tmp_path, "import sys, grpc_batcher, grpc_batcher.prometheus\nprint('ray' in sys.modules)") == [
        "False"
    ]
    assert not hasattr(grpc_batcher, "launch")
