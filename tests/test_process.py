"""What a process chooses for gRPC and glibc: that it takes effect, can be turned off, and is what `info` says."""

from __future__ import annotations

import ctypes.util
import importlib.metadata
import os
import re
from pathlib import Path

import grpc_batcher
from grpc_batcher._process import _FIRST_WITH_EVENT_ENGINE, NEWEST_TESTED_GRPCIO, libc

import grpc
import pytest
from serving import echo, run_program, serving

GRPCIO = tuple(int(number) for number in grpc.__version__.split(".")[:2])
HAS_CHOICE_OF_POLLER = _FIRST_WITH_EVENT_ENGINE <= GRPCIO <= NEWEST_TESTED_GRPCIO
needs_choice_of_poller = pytest.mark.skipif(not HAS_CHOICE_OF_POLLER, reason="this grpcio has no choice of poller")
needs_glibc = pytest.mark.skipif(not libc().startswith("glibc"), reason="for glibc")


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in tuple(os.environ):
        if name.startswith(("GRPC_BATCHER_TUNE_", "GRPC_EXPERIMENTS", "MALLOC_", "GLIBC_TUNABLES")):
            monkeypatch.delenv(name)


# ---- gRPC's poller ----

SWITCHES_PER_REQUEST = """
    import resource
    {before}
    from grpc_batcher import MukoeBatcherClient, create_batcher, info

    def switches():
        return resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw

    def echo(requests):
        return [({{"result": data}}, 0) for data in requests]

    with create_batcher("repr", 1, 0.0, 0, batch_process_fn=echo, host="127.0.0.1") as batcher:
        with MukoeBatcherClient(f"127.0.0.1:{{batcher.port}}") as client:
            for count in (100, 500):
                before = switches()
                for _ in range(count):
                    client.send_request(b"x")
    print((switches() - before) / 500)
    print(info()["poller"])
"""


def switches_per_request(folder: Path, before: str = "", **environment: str) -> tuple[float, str]:
    """How often the threads of a client and its server wait for each other, per request; and what `info` says."""
    environment.setdefault("GRPC_BATCHER_TRANSPORT", "direct")
    switches, said = run_program(folder, SWITCHES_PER_REQUEST.format(before=before), environment=environment)
    return float(switches), said


@needs_choice_of_poller
@pytest.mark.parametrize(
    ("before", "environment", "said"),
    [
        ("", {"GRPC_BATCHER_TUNE_GRPC": "0"}, "GRPC_BATCHER_TUNE_GRPC is 0"),
        ("", {"GRPC_EXPERIMENTS": "event_engine_client"}, "GRPC_EXPERIMENTS is 'event_engine_client' already"),
        ("import grpc", {}, "grpc was imported before grpc_batcher, which is too late to choose"),
    ],
)
def test_grpc_polls_with_far_fewer_thread_switches_unless_that_is_prevented(
    before: str, environment: dict[str, str], said: str, tmp_path: Path
) -> None:
    left_alone, why = switches_per_request(tmp_path, before, **environment)
    assert why == f"left alone: {said}"
    tuned, why = switches_per_request(tmp_path)
    assert why.startswith("tuned: ")
    assert tuned < 0.8 * left_alone


def test_no_child_process_inherits_the_choice_of_poller(tmp_path: Path) -> None:
    program = """
        import os, subprocess
        import grpc_batcher
        print(os.environ.get("GRPC_EXPERIMENTS"))
        print(subprocess.run(["printenv", "GRPC_EXPERIMENTS"], capture_output=True, text=True).stdout)
    """
    assert run_program(tmp_path, program) == ["None", ""]


def test_a_grpcio_newer_than_any_tried_is_left_alone(tmp_path: Path) -> None:
    program = """
        import importlib.metadata
        version = importlib.metadata.version
        importlib.metadata.version = lambda name: "9.1.0" if name == "grpcio" else version(name)
        import grpc_batcher
        print(grpc_batcher.info()["poller"])
    """
    assert run_program(tmp_path, program) == ["left alone: polling is untested with grpcio 9.1.0"]


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_processes_that_multiprocessing_starts_choose_for_themselves(method: str, tmp_path: Path) -> None:
    program = """
        import multiprocessing, sys
        import grpc_batcher

        def ask(address, pipe):
            with grpc_batcher.MukoeBatcherClient(address) as client:
                pipe.send((client.send_request(b"hi"), grpc_batcher.info()["poller"], grpc_batcher.info()["memory"]))

        if __name__ == "__main__":
            context = multiprocessing.get_context(sys.argv[2])
            ours, theirs = context.Pipe()
            child = context.Process(target=ask, args=(sys.argv[1], theirs))
            child.start()
            answer, poller, memory = ours.recv()
            child.join()
            print(answer, poller == grpc_batcher.info()["poller"], memory)
    """
    with serving(echo) as batcher:
        (line,) = run_program(tmp_path, program, f"127.0.0.1:{batcher.port}", method)
    memory = "tuned: freed memory is kept for the next message"
    assert line.startswith("({'result': b'hi'}, 0) True ")
    assert not libc().startswith("glibc") or line.endswith(memory)


# ---- glibc's memory ----

FAULTS_PER_REQUEST = """
    import resource, threading
    from grpc_batcher import MukoeBatcherClient, create_batcher, info

    payload = bytes(600_000)

    def echo(requests):
        return [({"result": data}, 0) for data in requests]

    def send(count):
        for _ in range(count):
            client.send_request(payload)

    def send_all(count):
        threads = [threading.Thread(target=send, args=(count,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    with create_batcher("repr", 4, 0.005, 0, batch_process_fn=echo, host="127.0.0.1") as batcher:
        with MukoeBatcherClient(f"127.0.0.1:{batcher.port}") as client:
            send_all(100)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            send_all(100)
            print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 400)
    print(info()["memory"])
"""


@needs_glibc
@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"GRPC_BATCHER_TUNE_MALLOC": "0"}, "GRPC_BATCHER_TUNE_MALLOC is 0"),
        ({"MALLOC_TRIM_THRESHOLD_": "131072"}, "MALLOC_TRIM_THRESHOLD_ is set"),
        ({"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"}, "GLIBC_TUNABLES sets glibc.malloc.mmap_threshold"),
    ],
)
def test_freed_memory_is_kept_for_the_next_message_unless_that_is_prevented(
    environment: dict[str, str], said: str, tmp_path: Path
) -> None:
    faults, why = run_program(tmp_path, FAULTS_PER_REQUEST, environment=environment)
    assert why == f"left alone: {said}"
    tuned_faults, why = run_program(tmp_path, FAULTS_PER_REQUEST)
    assert why == "tuned: freed memory is kept for the next message"
    assert float(tuned_faults) < 0.5 * float(faults)


@needs_glibc
def test_nothing_is_done_to_glibcs_memory_before_something_is_sent_or_served(tmp_path: Path) -> None:
    program = """
        import grpc_batcher
        client = grpc_batcher.MukoeBatcherClient("127.0.0.1:1")
        print(grpc_batcher.info()["memory"])
    """
    assert run_program(tmp_path, program) == ["left alone: this process has neither sent nor served a request"]


TELL_MEMORY = """
    import grpc_batcher
    {before}
    grpc_batcher._process.prepare_to_use_grpc()
    print(grpc_batcher.info()["memory"])
"""


@needs_glibc
def test_a_program_that_has_freed_a_large_array_is_recognised_as_glibcs(tmp_path: Path) -> None:
    """Its next large block comes from the heap, instead of being mapped on its own."""
    program = TELL_MEMORY.format(before="bytearray(31 * 2**20)")
    assert run_program(tmp_path, program) == ["tuned: freed memory is kept for the next message"]


ALLOCATORS = ("jemalloc", "tcmalloc", "tcmalloc_minimal", "mimalloc")


@needs_glibc
@pytest.mark.parametrize("name", ALLOCATORS)
def test_another_allocator_in_glibcs_place_is_left_alone(tmp_path: Path, name: str) -> None:
    library = ctypes.util.find_library(name)
    if library is None:
        pytest.skip(f"{name} is not installed here")
    program = TELL_MEMORY.format(before="")
    assert run_program(tmp_path, program, environment={"LD_PRELOAD": library}) == [
        "left alone: another allocator replaces glibc's"
    ]


# ---- info ----


def test_info_tells_versions_and_choices() -> None:
    info = grpc_batcher.info()
    assert info["grpc_batcher"] == grpc_batcher.__version__
    assert info["grpcio"] == grpc.__version__
    assert info["protobuf"] == importlib.metadata.version("protobuf")
    assert info["numpy"] == importlib.metadata.version("numpy")
    assert re.match(r"3\.\d+\.\d+\S* *, cpython, (optimised build|configured without --enable-)", info["python"])
    assert info["kernel"].startswith("Linux ")
    assert info["libc"] == libc()
    for end in ("server_transport", "client_transport"):
        assert re.match("(direct|public): .+", info[end])
    for tuning in ("poller", "memory"):
        assert re.match("(tuned|left alone): .+", info[tuning])
