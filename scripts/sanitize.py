"""Run the core's tests in a build with a sanitizer, then plant faults and check that the sanitizer finds them.

Only the native modules are instrumented. The sanitizer does not see what the interpreter does between them, but it does
see its locks: the preloaded runtime takes part in every pthread call and every malloc of the process.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RUNTIMES = {"thread": ["libtsan.so"], "address": ["libasan.so", "libubsan.so"]}
TESTS = ["test_core.py", "test_core_threads.py", "test_core_machine.py", "test_wire.py", "test_array_codec.py"]

ENVIRONMENT = {
    # One test asks for more memory than there is, of both. Forked children are replaced by another program at once.
    "TSAN_OPTIONS": "halt_on_error=1:die_after_fork=0:allocator_may_return_null=1",
    # Python leaves much allocated when it ends. Other tests look for leaks of ours.
    "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:strict_string_checks=1:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}
# Python's own allocator puts several objects into one block, which AddressSanitizer takes for one piece of memory.
MALLOC = {"thread": "pymalloc", "address": "malloc"}


class Plant(NamedTuple):
    """A fault: a line of a module, its replacement, a test that reaches it, and what the sanitizer reports."""

    module: str
    line: str
    instead: str
    test: str
    report: str


PLANTS = {
    "thread": [
        Plant(  # a counter is read without the mutex
            "_core.pyx",
            "        self._lock()\n        cdef int64_t value = field[0]\n        self._unlock()\n",
            "        cdef int64_t value = field[0]\n",
            "test_core_threads.py::test_a_taker_wakes_when_the_batch_is_full",
            "ThreadSanitizer: data race",
        ),
    ],
    "address": [
        Plant(  # the ring is one slot short
            "_core.pyx",
            "PyMem_Malloc(size * sizeof(ticket_t *))",
            "PyMem_Malloc((size - 1) * sizeof(ticket_t *))",
            "test_core.py::test_requests_that_leave_free_their_places_even_behind_an_old_one",
            "AddressSanitizer: heap-buffer-overflow",
        ),
        Plant(  # a list is freed too early
            "_core.pyx",
            "            # Without the mutex, or every thread that wakes would have to wait for it.\n",
            "            PyMem_Free(settled)\n",
            "test_core.py::test_each_ticket_gets_its_own_outcome",
            "AddressSanitizer: heap-use-after-free",
        ),
        Plant(  # a length is trusted
            "_wire.pxd",
            " or value > <uint64_t>(end - at[0])",
            " or value > <uint64_t>(end - at[0] + 64)",
            "test_wire.py::test_any_request_is_read_as_protobuf_reads_it",
            "AddressSanitizer: heap-buffer-overflow",
        ),
        Plant(  # more fields are accepted than there is room for
            "_wire.pyx",
            "len(fields) > MAX_FIELDS",
            "len(fields) > 2 * MAX_FIELDS",
            "test_wire.py::test_a_codec_refuses_fields_it_does_not_support",
            "runtime error: index 8 out of bounds",
        ),
        Plant(  # the size of an array's data is believed
            "_arrays.pyx",
            " or size > <uint64_t>(end - at[0])",
            " or size > <uint64_t>(end - at[0] + 64)",
            "test_array_codec.py::test_an_array_that_is_cut_anywhere_says_so",
            "AddressSanitizer: heap-buffer-overflow",
        ),
        Plant(  # the list of copies has no room for the padding
            "_arrays.pyx",
            "PyMem_Malloc((len(given) + size - rows) * sizeof(copy_t))",
            "PyMem_Malloc(len(given) * sizeof(copy_t))",
            "test_array_codec.py::test_rows_are_gathered_in_order_and_padded_with_the_first",
            "AddressSanitizer: heap-buffer-overflow",
        ),
        Plant(  # rows are copied that the callback's array does not have
            "_arrays.pyx",
            "if source.row_bytes and rows > source",
            "if source.row_bytes and rows > 2 + source",
            "test_array_codec.py::test_an_output_that_cannot_be_sent_is_refused",
            "AddressSanitizer: heap-buffer-overflow",
        ),
    ],
}


def build(source: Path, sanitizer: str, target: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", target, source],
        env={**os.environ, "GRPC_BATCHER_SANITIZE": sanitizer},
        check=True,
    )


def run_tests(package: Path, sanitizer: str, tests: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    runtimes = [
        subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in RUNTIMES[sanitizer]
    ]
    # -s: the sanitizer ends the process, and a captured report would be lost.
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "-o", "timeout=300", *tests]
    return subprocess.run(
        command,
        cwd=ROOT / "tests",
        env={
            **os.environ,
            **ENVIRONMENT,
            "LD_PRELOAD": ":".join(runtimes),
            "PYTHONMALLOC": MALLOC[sanitizer],
            "PYTHONPATH": str(package),
        },
        text=True,
        check=False,
        **options,  # type: ignore[call-overload]
    )


def finds(plant: Plant, sanitizer: str) -> bool:
    """Whether the sanitizer reports a planted fault."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.so", "*.c", "tests"))
        module = source / "grpc_batcher" / plant.module
        text = module.read_text()
        if text.count(plant.line) != 1:
            raise ValueError(f"{plant.module} has {plant.line!r} {text.count(plant.line)} times; it must be there once")
        module.write_text(text.replace(plant.line, plant.instead))
        build(source, sanitizer, Path(folder) / "package")
        ran = run_tests(
            Path(folder) / "package", sanitizer, [plant.test], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    found = ran.returncode != 0 and plant.report in ran.stdout
    print(f"{'found' if found else 'NOT FOUND'}: {plant.instead.strip()!r} in {plant.module}", flush=True)
    if not found:
        print(ran.stdout)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sanitizer", choices=tuple(RUNTIMES))
    sanitizer = parser.parse_args().sanitizer
    package = ROOT / "build" / sanitizer / "package"
    build(ROOT, sanitizer, package)
    status = run_tests(package, sanitizer, TESTS).returncode
    missed = [plant for plant in PLANTS[sanitizer] if not finds(plant, sanitizer)]
    return status or len(missed)


if __name__ == "__main__":
    sys.exit(main())
