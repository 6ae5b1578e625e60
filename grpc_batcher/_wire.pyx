# cython: autotestdict=False, auto_pickle=False
"""Reads and writes the contract's messages with one copy of each payload; protobuf makes two or three.

Only messages of the plain shape that writers produce are read here: each known field at most once and in order,
nothing unknown. For any other the readers return None, and protobuf is to be asked, which also says what is wrong with
a broken one. The encoding is described at https://protobuf.dev/programming-guides/encoding/.
"""
cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.number cimport PyNumber_Index
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdint cimport INT32_MAX, INT32_MIN, int32_t, int64_t, uint32_t, uint64_t
from libc.string cimport memcpy

cdef extern from "Python.h":
    const char *PyUnicode_AsUTF8AndSize(object text, Py_ssize_t *size) except NULL

ctypedef const unsigned char *reader_t

# Wire types, the lower three bits of a tag.
cdef enum:
    VARINT = 0
    LENGTH_PREFIXED = 2
    MAX_ONE_BYTE_NUMBER = 15  # field numbers whose tag takes one byte
    MAX_FIELDS = 8

# A copy of so many bytes is worth letting other threads run meanwhile.
cdef Py_ssize_t NOGIL_COPY_BYTES = 1 << 16

# gRPC and protobuf count a message's bytes in an int32; leave room for the tags and lengths.
cdef Py_ssize_t MAX_BYTES = INT32_MAX - 256


cdef bint read_varint(reader_t *at, reader_t end, uint64_t *value) noexcept:
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


cdef bint read_length(reader_t *at, reader_t end, Py_ssize_t *length) noexcept:
    """A length, of bytes that are there."""
    cdef uint64_t value
    if not read_varint(at, end, &value) or value > <uint64_t>(end - at[0]):
        return False
    length[0] = <Py_ssize_t>value
    return True


cdef Py_ssize_t varint_size(uint64_t value) noexcept:
    cdef Py_ssize_t size = 1
    while value >= 0x80:
        value >>= 7
        size += 1
    return size


cdef unsigned char *write_varint(unsigned char *at, uint64_t value) noexcept:
    while value >= 0x80:
        at[0] = <unsigned char>(value & 0x7F) | 0x80
        value >>= 7
        at += 1
    at[0] = <unsigned char>value
    return at + 1


cdef unsigned char *write_payload(unsigned char *at, unsigned char tag, const void *payload, Py_ssize_t size) noexcept:
    at[0] = tag
    at = write_varint(at + 1, <uint64_t>size)
    if size >= NOGIL_COPY_BYTES:
        with nogil:
            memcpy(at, payload, size)
    else:
        memcpy(at, payload, size)
    return at + size


cdef uint64_t sign_extended(int32_t value) noexcept:
    """Negative int32 travel as ten bytes."""
    return <uint64_t><int64_t>value


@cython.final
cdef class RequestCodec:
    """Reads and writes a MukoeRequest that holds one kind of message, of `bytes` and `int32` fields.

    number: of the message's field in the request.
    fields: the message's fields, as (number, is_bytes), ascending.

    Raises ValueError where a number is over 15, or there are more than eight fields.
    """
    cdef unsigned char _tag
    cdef int _count
    cdef unsigned char[MAX_FIELDS] _tags
    cdef bint[MAX_FIELDS] _is_bytes

    def __init__(self, number, fields):
        numbers = [each for each, _ in fields]
        if len(fields) > MAX_FIELDS or max(numbers + [number]) > MAX_ONE_BYTE_NUMBER or numbers != sorted(numbers):
            raise ValueError(f"no codec for field {number} with {fields}")
        self._tag = number << 3 | LENGTH_PREFIXED
        self._count = len(fields)
        for i, (field, is_bytes) in enumerate(fields):
            self._tags[i] = field << 3 | (LENGTH_PREFIXED if is_bytes else VARINT)
            self._is_bytes[i] = is_bytes

    def read(self, bytes message not None):
        """Return the tuple of the fields' values, or None if protobuf must be asked."""
        cdef reader_t at = <reader_t>PyBytes_AS_STRING(message)
        cdef reader_t end = at + PyBytes_GET_SIZE(message)
        cdef Py_ssize_t length
        cdef uint64_t number
        cdef int i
        if at == end or at[0] != self._tag:
            return None
        at += 1
        if not read_length(&at, end, &length) or length != end - at:
            return None
        values = []
        for i in range(self._count):
            if at == end or at[0] != self._tags[i]:
                values.append(b"" if self._is_bytes[i] else 0)
                continue
            at += 1
            if self._is_bytes[i]:
                if not read_length(&at, end, &length):
                    return None
                values.append(PyBytes_FromStringAndSize(<const char *>at, length))
                at += length
            else:
                if not read_varint(&at, end, &number):
                    return None
                values.append(<int32_t><uint32_t>number)
        return tuple(values) if at == end else None

    def write(self, values):
        """Return the message that holds these values: objects with a C-contiguous buffer, and integers.

        Raises TypeError, BufferError or OverflowError for those that are neither, or not of that range.
        """
        cdef Py_buffer[MAX_FIELDS] buffers
        cdef int32_t[MAX_FIELDS] numbers
        cdef Py_ssize_t size = 0
        cdef int held = 0
        cdef int i
        cdef bytes message
        cdef unsigned char *at
        if len(values) != self._count:
            raise TypeError(f"{len(values)} values for {self._count} fields")
        try:
            for i in range(self._count):
                if self._is_bytes[i]:
                    PyObject_GetBuffer(values[i], &buffers[i], PyBUF_SIMPLE)
                    held = i + 1
                    if buffers[i].len > MAX_BYTES - size:
                        raise OverflowError(f"{buffers[i].len} bytes; a message holds at most {MAX_BYTES}")
                    if buffers[i].len:
                        size += 1 + varint_size(<uint64_t>buffers[i].len) + buffers[i].len
                else:
                    numbers[i] = to_int32(values[i])
                    if numbers[i]:
                        size += 1 + varint_size(sign_extended(numbers[i]))
            message = PyBytes_FromStringAndSize(NULL, 1 + varint_size(<uint64_t>size) + size)
            at = <unsigned char *>PyBytes_AS_STRING(message)
            at[0] = self._tag
            at = write_varint(at + 1, <uint64_t>size)
            for i in range(self._count):
                if self._is_bytes[i]:
                    if buffers[i].len:
                        at = write_payload(at, self._tags[i], buffers[i].buf, buffers[i].len)
                elif numbers[i]:
                    at[0] = self._tags[i]
                    at = write_varint(at + 1, sign_extended(numbers[i]))
            return message
        finally:
            for i in range(held):
                if self._is_bytes[i]:
                    PyBuffer_Release(&buffers[i])


cdef int32_t to_int32(value) except? -1:
    cdef int64_t number = PyNumber_Index(value)
    if not INT32_MIN <= number <= INT32_MAX:
        raise OverflowError(f"{number} is no int32")
    return <int32_t>number


# A MukoeResponse: result = 1 { dictionary = 1 { key = 1, values = 2 } repeated, step = 2 }.
cdef enum:
    RESULT = 1 << 3 | LENGTH_PREFIXED
    PAIR = 1 << 3 | LENGTH_PREFIXED
    KEY = 1 << 3 | LENGTH_PREFIXED
    VALUE = 2 << 3 | LENGTH_PREFIXED
    STEP = 2 << 3 | VARINT


cdef Py_ssize_t payload_size(Py_ssize_t size) noexcept:
    """Bytes of a length-prefixed field; an empty one is left out."""
    return 1 + varint_size(<uint64_t>size) + size if size else 0


def write_answer(dict dictionary not None, int32_t step):
    """Return the MukoeResponse that holds a dictionary of str to bytes, and a step.

    Raises TypeError for other keys or values, UnicodeEncodeError for a key that UTF-8 can not express, and
    OverflowError for more bytes than a message holds.
    """
    cdef Py_ssize_t total = 0
    cdef Py_ssize_t pair, key_size
    cdef const char *key_text
    cdef str key
    cdef bytes value
    for key, value in dictionary.items():
        if key is None or value is None:
            raise TypeError("a dictionary of str to bytes has no None")
        PyUnicode_AsUTF8AndSize(key, &key_size)
        pair = payload_size(key_size) + payload_size(PyBytes_GET_SIZE(value))
        total += 1 + varint_size(<uint64_t>pair) + pair
        if total > MAX_BYTES:
            raise OverflowError(f"an answer of over {MAX_BYTES} bytes")
    if step:
        total += 1 + varint_size(sign_extended(step))
    cdef bytes message = PyBytes_FromStringAndSize(NULL, 1 + varint_size(<uint64_t>total) + total)
    cdef unsigned char *at = <unsigned char *>PyBytes_AS_STRING(message)
    at[0] = RESULT
    at = write_varint(at + 1, <uint64_t>total)
    for key, value in dictionary.items():
        key_text = PyUnicode_AsUTF8AndSize(key, &key_size)
        at[0] = PAIR
        pair = payload_size(key_size) + payload_size(PyBytes_GET_SIZE(value))
        at = write_varint(at + 1, <uint64_t>pair)
        if key_size:
            at = write_payload(at, KEY, key_text, key_size)
        if PyBytes_GET_SIZE(value):
            at = write_payload(at, VALUE, PyBytes_AS_STRING(value), PyBytes_GET_SIZE(value))
    if step:
        at[0] = STEP
        write_varint(at + 1, sign_extended(step))
    return message


def read_answer(bytes message not None):
    """Return (dictionary, step) of a MukoeResponse, or None if protobuf must be asked."""
    cdef reader_t at = <reader_t>PyBytes_AS_STRING(message)
    cdef reader_t end = at + PyBytes_GET_SIZE(message)
    cdef reader_t pair_end
    cdef Py_ssize_t length
    cdef uint64_t step = 0
    if at == end or at[0] != RESULT:
        return None
    at += 1
    if not read_length(&at, end, &length) or length != end - at:
        return None
    dictionary = {}
    while at < end and at[0] == PAIR:
        at += 1
        if not read_length(&at, end, &length):
            return None
        pair_end = at + length
        key = ""
        value = b""
        if at < pair_end and at[0] == KEY:
            at += 1
            if not read_length(&at, pair_end, &length):
                return None
            try:
                key = PyUnicode_DecodeUTF8(<char *>at, length, NULL)
            except UnicodeDecodeError:
                return None
            at += length
        if at < pair_end and at[0] == VALUE:
            at += 1
            if not read_length(&at, pair_end, &length):
                return None
            value = PyBytes_FromStringAndSize(<const char *>at, length)
            at += length
        if at != pair_end:
            return None
        dictionary[key] = value
    if at < end and at[0] == STEP:
        at += 1
        if not read_varint(&at, end, &step):
            return None
    return (dictionary, <int32_t><uint32_t>step) if at == end else None
