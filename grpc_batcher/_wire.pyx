# cython: autotestdict=False, auto_pickle=False
"""Reads and writes the contract's messages with one copy of each payload; protobuf makes two or three.

The readers accept only messages of the plain shape that writers produce: each known field at most once and in order,
and nothing unknown. For anything else they return None, and the caller asks protobuf, which also reports what is wrong
with a malformed message. The encoding is described at https://protobuf.dev/programming-guides/encoding/.
"""
cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdint cimport int32_t, uint32_t, uint64_t

cdef enum:
    MAX_FIELDS = 8


cdef Py_ssize_t payload_size(Py_ssize_t size) noexcept:
    """Return the size of a length-prefixed field; an empty one is omitted."""
    return prefixed_size(size) if size else 0


cdef unsigned char *write_payload(unsigned char *at, unsigned char tag, const void *payload, Py_ssize_t size) noexcept:
    """Write a length-prefixed field; an empty one is omitted."""
    return copy_bytes(write_prefix(at, tag, size), payload, size) if size else at


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
                    size += payload_size(buffers[i].len)
                else:
                    numbers[i] = to_int32(values[i])
                    if numbers[i]:
                        size += 1 + varint_size(sign_extended(numbers[i]))
            message = PyBytes_FromStringAndSize(NULL, prefixed_size(size))
            at = write_prefix(<unsigned char *>PyBytes_AS_STRING(message), self._tag, size)
            for i in range(self._count):
                if self._is_bytes[i]:
                    at = write_payload(at, self._tags[i], buffers[i].buf, buffers[i].len)
                elif numbers[i]:
                    at[0] = self._tags[i]
                    at = write_varint(at + 1, sign_extended(numbers[i]))
            return message
        finally:
            for i in range(held):
                if self._is_bytes[i]:
                    PyBuffer_Release(&buffers[i])


def write_answer(dict dictionary not None, int32_t step):
    """Return the MukoeResponse that holds a dictionary of str to bytes, and a step.

    Raises TypeError for other keys or values, UnicodeEncodeError for a key that UTF-8 cannot express, and
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
        total += prefixed_size(pair)
        if total > MAX_BYTES:
            raise OverflowError(f"an answer of over {MAX_BYTES} bytes")
    if step:
        total += 1 + varint_size(sign_extended(step))
    cdef bytes message = PyBytes_FromStringAndSize(NULL, prefixed_size(total))
    cdef unsigned char *at = write_prefix(<unsigned char *>PyBytes_AS_STRING(message), RESULT, total)
    for key, value in dictionary.items():
        key_text = PyUnicode_AsUTF8AndSize(key, &key_size)
        pair = payload_size(key_size) + payload_size(PyBytes_GET_SIZE(value))
        at = write_prefix(at, PAIR, pair)
        at = write_payload(at, KEY, key_text, key_size)
        at = write_payload(at, VALUE, PyBytes_AS_STRING(value), PyBytes_GET_SIZE(value))
    if step:
        at[0] = STEP
        write_varint(at + 1, sign_extended(step))
    return message


def read_answer(bytes message not None):
    """Return (dictionary, step) of a MukoeResponse, or None if protobuf must be asked."""
    cdef reader_t at = <reader_t>PyBytes_AS_STRING(message)
    cdef reader_t end = at + PyBytes_GET_SIZE(message)
    cdef span_t key, value
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
        if not read_pair(&at, end, &key, &value):
            return None
        try:
            text = PyUnicode_DecodeUTF8(<const char *>key.start, key.size, NULL)
        except UnicodeDecodeError:
            return None
        dictionary[text] = PyBytes_FromStringAndSize(<const char *>value.start, value.size)
    if at < end and at[0] == STEP:
        at += 1
        if not read_varint(&at, end, &step):
            return None
    return (dictionary, <int32_t><uint32_t>step) if at == end else None
