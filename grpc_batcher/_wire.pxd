# What _wire.pyx and _arrays.pyx share: protobuf's encoding, see https://protobuf.dev/programming-guides/encoding/.
from cpython.number cimport PyNumber_Index
from libc.stdint cimport INT32_MAX, INT32_MIN, int32_t, int64_t, uint64_t
from libc.string cimport memcpy

cdef extern from "Python.h":
    const char *PyUnicode_AsUTF8AndSize(object text, Py_ssize_t *size) except NULL

cdef extern from "<assert.h>" nogil:
    void invariant "assert"(bint)

ctypedef const unsigned char *reader_t

cdef struct span_t:
    reader_t start
    Py_ssize_t size

cdef enum:
    # Wire types, the lower three bits of a tag.
    VARINT = 0
    LENGTH_PREFIXED = 2
    MAX_ONE_BYTE_NUMBER = 15  # field numbers whose tag takes one byte

    # Copies of this size or more release the GIL.
    NOGIL_COPY_BYTES = 1 << 16

    # gRPC and protobuf count a message's bytes in an int32; leave room for the tags and lengths.
    MAX_BYTES = 0x7FFFFFFF - 256

# A MukoeResponse: result = 1 { dictionary = 1 { key = 1, values = 2 } repeated, step = 2 }.
cdef enum:
    RESULT = 1 << 3 | LENGTH_PREFIXED
    PAIR = 1 << 3 | LENGTH_PREFIXED
    KEY = 1 << 3 | LENGTH_PREFIXED
    VALUE = 2 << 3 | LENGTH_PREFIXED
    STEP = 2 << 3 | VARINT


cdef inline bint read_varint(reader_t *at, reader_t end, uint64_t *value) noexcept:
    cdef int shift = 0
    cdef uint64_t byte
    value[0] = 0
    while at[0] < end and shift < 64:
        byte = at[0][0]
        at[0] += 1
        if shift == 63 and byte > 1:
            return False
        value[0] |= (byte & 0x7F) << shift
        if byte < 0x80:
            return True
        shift += 7
    return False


cdef inline bint read_length(reader_t *at, reader_t end, Py_ssize_t *length) noexcept:
    """Read a length; fail if it exceeds the bytes that are left."""
    cdef uint64_t value
    if not read_varint(at, end, &value) or value > <uint64_t>(end - at[0]):
        return False
    length[0] = <Py_ssize_t>value
    return True


cdef inline bint read_payload(reader_t *at, reader_t end, span_t *payload) noexcept:
    """What follows the tag of a length-prefixed field."""
    if not read_length(at, end, &payload.size):
        return False
    payload.start = at[0]
    at[0] += payload.size
    return True


cdef inline bint read_pair(reader_t *at, reader_t end, span_t *key, span_t *value) noexcept:
    """What follows the tag of a KeyValue."""
    cdef span_t pair
    if not read_payload(at, end, &pair):
        return False
    cdef reader_t inner = pair.start
    key.start = value.start = inner
    key.size = value.size = 0
    if inner < at[0] and inner[0] == KEY:
        inner += 1
        if not read_payload(&inner, at[0], key):
            return False
    if inner < at[0] and inner[0] == VALUE:
        inner += 1
        if not read_payload(&inner, at[0], value):
            return False
    return inner == at[0]


cdef inline Py_ssize_t varint_size(uint64_t value) noexcept:
    cdef Py_ssize_t size = 1
    while value >= 0x80:
        value >>= 7
        size += 1
    return size


cdef inline Py_ssize_t prefixed_size(Py_ssize_t size) noexcept:
    """Bytes of a length-prefixed field."""
    return 1 + varint_size(<uint64_t>size) + size


cdef inline unsigned char *write_varint(unsigned char *at, uint64_t value) noexcept:
    while value >= 0x80:
        at[0] = <unsigned char>(value & 0x7F) | 0x80
        value >>= 7
        at += 1
    at[0] = <unsigned char>value
    return at + 1


cdef inline unsigned char *write_prefix(unsigned char *at, unsigned char tag, Py_ssize_t size) noexcept:
    """The tag and the length of a field."""
    at[0] = tag
    return write_varint(at + 1, <uint64_t>size)


cdef inline unsigned char *copy_bytes(unsigned char *at, const void *source, Py_ssize_t size) noexcept:
    if size >= NOGIL_COPY_BYTES:
        with nogil:
            memcpy(at, source, size)
    elif size:
        memcpy(at, source, size)
    return at + size


cdef inline uint64_t sign_extended(int32_t value) noexcept:
    """Negative int32 travel as ten bytes."""
    return <uint64_t><int64_t>value


cdef inline int32_t to_int32(value) except? -1:
    cdef int64_t number = PyNumber_Index(value)
    if not INT32_MIN <= number <= INT32_MAX:
        raise OverflowError(f"{number} does not fit an int32")
    return <int32_t>number
