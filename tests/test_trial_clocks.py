"""A wall clock that jumps by a day, forward or back, while requests wait: no duration depends on it.

The clock of this machine is left alone. A preloaded library tells the program another time.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from serving import run_program

SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <sys/time.h>
#include <time.h>

static volatile long offset_s;

void set_wall_clock_offset(long seconds) { offset_s = seconds; }

int clock_gettime(clockid_t clock, struct timespec *now)
{
    static int (*real)(clockid_t, struct timespec *);
    if (!real)
        real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int error = real(clock, now);
    if (!error && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        now->tv_sec += offset_s;
    return error;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone)
{
    struct timespec time;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &time);
    now->tv_sec = time.tv_sec;
    now->tv_usec = time.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *seconds)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (seconds)
        *seconds = now.tv_sec;
    return now.tv_sec;
}
"""

HEAD = """
    import ctypes
    import sys
    import threading
    import time

    from grpc_batcher import MukoeBatcherClient, RequestError, create_batcher

    def jump():
        before = time.time()
        ctypes.CDLL(None).set_wall_clock_offset(ctypes.c_long(int(sys.argv[1])))
        assert (time.time() - before) * int(sys.argv[1]) > 86000 ** 2, "the wall clock did not jump"

    def wait_until(holds):
        while not holds():
            time.sleep(0.001)

    def echo(requests):
        batches.append(requests)
        return [({"result": data}, 0) for data in requests]

    def ask(data, timeout_s=None):
        try:
            results[data] = client.send_request(data, timeout_s=timeout_s)
        except RequestError as error:
            results[data] = error.code().name

    def start(data, timeout_s=None):
        threads.append(threading.Thread(target=ask, args=(data, timeout_s)))
        threads[-1].start()

    batches, results, threads = [], {}, []
"""

LONG_WINDOW_PROGRAM = (
    HEAD
    + """
    with create_batcher("repr", 3, 1000.0, 0, batch_process_fn=echo, host="127.0.0.1") as batcher:
        with MukoeBatcherClient(f"127.0.0.1:{batcher.port}") as client:
            for number, data in enumerate((b"a", b"b", b"c"), start=1):
                start(data, timeout_s=1000)
                wait_until(lambda: batcher.metrics().waiting == number or batches)
                if number == 1:
                    jump()
            for thread in threads:
                thread.join()
            print(batches, results == {data: ({"result": data}, 0) for data in (b"a", b"b", b"c")})
"""
)

SHORT_WINDOW_PROGRAM = (
    HEAD
    + """
    with create_batcher("repr", 3, 0.3, 0, batch_process_fn=echo, host="127.0.0.1") as batcher:
        with MukoeBatcherClient(f"127.0.0.1:{batcher.port}") as client:
            start(b"a")
            wait_until(lambda: batcher.metrics().waiting == 1 or batches)
            jump()
            threads[0].join()
            print(batches, results[b"a"])
"""
)

TIME_LIMIT_PROGRAM = (
    HEAD
    + """
    with create_batcher("repr", 3, 1000.0, 0, batch_process_fn=echo, host="127.0.0.1") as batcher:
        with MukoeBatcherClient(f"127.0.0.1:{batcher.port}") as client:
            start(b"a", timeout_s=0.5)
            wait_until(lambda: batcher.metrics().waiting == 1 or results)
            jump()
            threads[0].join()
            wait_until(lambda: batcher.metrics().waiting == 0)
            print(batches, results[b"a"])
"""
)

DAY_S = 86400

either_way = pytest.mark.parametrize("offset_s", [DAY_S, -DAY_S], ids=["forward", "back"])


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> str:
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("there is no C compiler here to build the library that changes the time")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    subprocess.run(
        (compiler, "-O1", "-shared", "-fPIC", "-o", folder / "shim.so", folder / "shim.c", "-ldl"), check=True
    )
    return str(folder / "shim.so")


@either_way
def test_a_window_continues_when_the_wall_clock_jumps(offset_s: int, shim: str, tmp_path: Path) -> None:
    output = run_program(tmp_path, LONG_WINDOW_PROGRAM, str(offset_s), environment={"LD_PRELOAD": shim})
    assert output == ["[[b'a', b'b', b'c']] True"]


@either_way
def test_a_window_ends_when_the_wall_clock_jumps(offset_s: int, shim: str, tmp_path: Path) -> None:
    output = run_program(tmp_path, SHORT_WINDOW_PROGRAM, str(offset_s), environment={"LD_PRELOAD": shim})
    assert output == ["[[b'a']] ({'result': b'a'}, 0)"]


@either_way
def test_a_time_limit_passes_when_the_wall_clock_jumps(offset_s: int, shim: str, tmp_path: Path) -> None:
    output = run_program(tmp_path, TIME_LIMIT_PROGRAM, str(offset_s), environment={"LD_PRELOAD": shim})
    assert output == ["[] DEADLINE_EXCEEDED"]
