"""The native modules, in a process of their own: thousands of rounds of everything they do leak no memory."""

from __future__ import annotations

from pathlib import Path

import pytest
from serving import run_program

# Python's allocator counts its blocks. Anything above 512 bytes comes from malloc and shows up in the process's memory.
HEAD = """
import gc, re, sys
from pathlib import Path

def used():
    gc.collect()
    memory_kib = re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]
    return sys.getallocatedblocks(), int(memory_kib) << 10

def repeat(one_round):
    for _ in range(200):
        one_round()
    before = used()
    for _ in range(ROUNDS):
        one_round()
    blocks, memory_bytes = (after - first for after, first in zip(used(), before))
    # Leaking one block per round would add ROUNDS blocks; leaking one payload per round would add 200 MB.
    assert blocks < ROUNDS / 10, f"{blocks} blocks more after {ROUNDS} rounds"
    assert memory_bytes < 50_000_000, f"{memory_bytes} bytes more after {ROUNDS} rounds"

ROUNDS = 2000
PAYLOAD = bytes(100_000)
"""

CORE = """
sys.path.insert(0, sys.argv[1])
from test_core_threads import ENDINGS, small_room
from grpc_batcher._core import ManualClock, WaitingRoom

class Large:
    def __init__(self):
        self.payload = bytearray(100_000)

def end_all_ways():
    for end in ENDINGS:
        clock = ManualClock(1)
        end(small_room(clock), clock, Large(), Large())
    WaitingRoom(1, 0, 100_000)  # a large ring

repeat(end_all_ways)
print("ok")
"""

WIRE = """
from grpc_batcher import _wire

codec = _wire.RequestCodec(2, [(1, True), (2, False)])
buffer = bytearray(PAYLOAD)
key = "key" * 100
ANSWER = _wire.write_answer({key: PAYLOAD, "other": b"value"}, -1)
REQUEST = codec.write([PAYLOAD, -1])

def raises(error, function, *arguments):
    try:
        function(*arguments)
    except error:
        return
    raise AssertionError(f"{function} did not raise {error}")

def read_and_write():
    assert codec.read(codec.write([buffer, 5])) == (PAYLOAD, 5)
    raises(TypeError, codec.write, [buffer, None])
    raises(TypeError, codec.write, [None, 5])
    raises(TypeError, codec.write, [buffer])
    raises(OverflowError, codec.write, [buffer, 2**31])
    raises(BufferError, codec.write, [memoryview(buffer)[::2], 5])
    raises(ValueError, _wire.RequestCodec, 16, [(1, True)])
    assert codec.read(REQUEST[:-1]) is None  # broken after a payload that was read
    assert codec.read(REQUEST[:-1] + b"\\x80") is None
    assert _wire.read_answer(ANSWER) == ({key: PAYLOAD, "other": b"value"}, -1)
    assert _wire.read_answer(ANSWER[:-1] + b"\\x80") is None
    assert _wire.read_answer(b"\\x0a\\x05\\x0a\\x03\\x0a\\x01\\xff") is None
    raises(TypeError, _wire.write_answer, {key: None}, 1)
    raises(TypeError, _wire.write_answer, {key: PAYLOAD, 1: b""}, 1)
    raises(UnicodeEncodeError, _wire.write_answer, {"\\ud800": PAYLOAD}, 1)

watched = buffer, key, PAYLOAD, ANSWER, REQUEST, codec
read_and_write()
before = [sys.getrefcount(each) for each in watched]
repeat(read_and_write)
assert [sys.getrefcount(each) for each in watched] == before
buffer.append(1)  # raises if an export of the buffer is still held
print("ok")
"""

ARRAYS = """
from grpc_batcher import _arrays

def raises(error, function, *arguments, **options):
    try:
        function(*arguments, **options)
    except error:
        return
    raise AssertionError(f"{function} did not raise {error}")

def packed(size):
    return _arrays.pack_header((size,), DTYPE, size)

NAME, DTYPE = "name" * 100, "uint8"
OTHER = _arrays.Field("other", (), "int16", 2)
FIELDS = [_arrays.Field(NAME, (len(PAYLOAD),), DTYPE, 1), OTHER]
reader = _arrays.RequestReader(3, FIELDS, max_rows=2)
buffer = bytearray(PAYLOAD)
small = memoryview(bytes(2)).cast("h")
arrays = [(NAME, buffer, (len(PAYLOAD),), DTYPE), ("other", small, (), "int16")]
REQUEST = _arrays.write_request(3, arrays)
[ANSWER] = _arrays.encode_answers([reader.read(REQUEST)], arrays, -1)
PACKED = packed(len(PAYLOAD)) + PAYLOAD
SMALL = _arrays.pack_header((), "int16", 2) + bytes(2)
target = bytearray(2 * len(PAYLOAD))

def use():
    assert _arrays.write_request(3, arrays) == REQUEST
    raises(ValueError, _arrays.write_request, 3, [*arrays, ("x", buffer, (1,), DTYPE)])
    raises(BufferError, _arrays.write_request, 3, [*arrays, ("x", memoryview(buffer)[::2], (1,), DTYPE)])
    raises(ValueError, _arrays.write_request, 3, [*arrays, ("x", buffer, (-1,), DTYPE)])
    raises(ValueError, _arrays.write_request, 3, [*arrays, ("x",)])
    raises(ValueError, _arrays.write_request, 15, arrays)
    raises(OverflowError, _arrays.write_request, 3, arrays, action=2**31)
    request = reader.read(REQUEST)
    parsed = reader.of_payloads(((name, payload) for name, payload in [("other", SMALL), (NAME, PACKED)]))
    for size in 10, len(REQUEST) - 1:
        assert reader.read(REQUEST[:size]) is None
    raises(_arrays.ArrayError, reader.of_payloads, [(NAME, PACKED)])
    raises(_arrays.ArrayError, reader.of_payloads, [(NAME, PACKED), (NAME, PACKED)])
    raises(_arrays.ArrayError, reader.of_payloads, [(NAME, PACKED), ("unknown", PACKED)])
    raises(_arrays.ArrayError, reader.of_payloads, [(NAME, PACKED[:-1])])
    raises(TypeError, reader.of_payloads, [(NAME, PACKED), ("other", 5)])
    raises(ValueError, _arrays.RequestReader, 3, FIELDS * 2, max_rows=2)
    raises(ValueError, _arrays.Field, NAME, (0,), DTYPE, 1)
    assert _arrays.gather([request], 0, target, 2) == 1
    assert _arrays.gather([request, parsed], 0, target, 2) == 2
    raises(ValueError, _arrays.gather, [request, parsed], 0, buffer, 1)
    raises(ValueError, _arrays.gather, [request, parsed], 0, buffer, 2)
    raises(BufferError, _arrays.gather, [request, parsed], 0, PAYLOAD, 2)
    assert _arrays.gather_actions([request], bytearray(8), 2) == 1
    raises(ValueError, _arrays.gather_actions, [request], buffer, 2)
    assert _arrays.encode_answers([request], arrays, -1) == [ANSWER]
    raises(ValueError, _arrays.encode_answers, [request, parsed], arrays, -1)
    raises(TypeError, _arrays.encode_answers, [request, None], arrays, -1)
    raises(OverflowError, _arrays.encode_answers, [request], arrays, 2**31)
    raises(OverflowError, _arrays.encode_answers, [request], [*arrays, ("x", buffer, (2**40, 2**40), DTYPE)], 0)
    arena = _arrays.Arena(2 * len(PAYLOAD))
    assert _arrays.gather([request], 0, arena, 2) == 1
    view = memoryview(arena)[1:]
    assert not arena.is_free
    del view
    assert arena.is_free
    raises(ValueError, _arrays.gather, [request], 0, arena, 1)
    raises(ValueError, _arrays.Arena, 0)
    assert len(_arrays.read_answer(ANSWER)[0]) == 2
    assert _arrays.read_answer(ANSWER[:-1] + b"\\x80") is None
    assert _arrays.unpack(PACKED)[3] == len(PAYLOAD)
    raises(_arrays.ArrayError, _arrays.unpack, PACKED + b"x")

watched = buffer, target, small, NAME, DTYPE, PAYLOAD, REQUEST, ANSWER, PACKED, SMALL, reader, OTHER, FIELDS[0]
use()
before = [sys.getrefcount(each) for each in watched]
repeat(use)
assert [sys.getrefcount(each) for each in watched] == before
buffer.append(1)  # raises if an export of the buffer is still held
target.append(1)
print("ok")
"""


@pytest.mark.timeout(180)
@pytest.mark.parametrize("script", [CORE, WIRE, ARRAYS], ids=["core", "wire", "arrays"])
def test_thousands_of_rounds_leak_no_memory(script: str, tmp_path: Path) -> None:
    assert run_program(tmp_path, HEAD + script, str(Path(__file__).parent)) == ["ok"]
