# cython: autotestdict=False, auto_pickle=False
"""Packed arrays: reads requests that hold them, gathers their rows, and writes answers, with one copy of the data each.

A packed array is a msgpack array of three: the shape, the name of the dtype, and the bytes in C order. Readers accept
every form that msgpack allows; writers choose the shortest.

Nothing here knows numpy. Data comes as buffers, and a dtype is a name with an item size.

As in `_wire.pyx`, the readers accept only messages of the plain shape that writers produce. For anything else they
return None, and the caller asks protobuf. The encodings are described at
https://github.com/msgpack/msgpack/blob/master/spec.md
and https://protobuf.dev/programming-guides/encoding/.
"""
cimport cython
from cpython.buffer cimport PyBUF_ND, PyBUF_WRITABLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_Calloc, PyMem_Free, PyMem_Malloc
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdint cimport UINT32_MAX, int32_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcmp, memcpy
from posix.stdlib cimport posix_memalign

from ._wire cimport (
    KEY,
    LENGTH_PREFIXED,
    MAX_BYTES,
    MAX_ONE_BYTE_NUMBER,
    NOGIL_COPY_BYTES,
    PAIR,
    RESULT,
    STEP,
    VALUE,
    VARINT,
    PyUnicode_AsUTF8AndSize,
    copy_bytes,
    invariant,
    prefixed_size,
    read_pair,
    read_payload,
    read_varint,
    reader_t,
    sign_extended,
    span_t,
    to_int32,
    varint_size,
    write_prefix,
    write_varint,
)

cdef extern from "Python.h":
    Py_ssize_t PY_SSIZE_T_MAX

cdef enum:
    MAX_DIMENSIONS = 32
    MAX_DTYPE_BYTES = 64  # of a dtype name that we write
    MAX_HEADER_BYTES = 512  # over what MAX_DIMENSIONS lengths of 9 bytes and a dtype name take
    KEEP_ROWS_AXIS = 15  # its number in a MukoeRequest


class ArrayError(ValueError):
    """Bytes that are not the array they should be. The text says what came, and what was expected."""


# Reading what is packed.

cdef struct packed_t:
    int dimensions
    Py_ssize_t[MAX_DIMENSIONS] shape
    span_t dtype
    span_t data


cdef enum status_t:
    FINE
    ENDS_EARLY
    OTHER_TYPE


cdef status_t read_big_endian(reader_t *at, reader_t end, int width, uint64_t *value) noexcept:
    cdef int i
    value[0] = 0
    if end - at[0] < width:
        return ENDS_EARLY
    for i in range(width):
        value[0] = value[0] << 8 | at[0][i]
    at[0] += width
    return FINE


cdef status_t read_natural(reader_t *at, reader_t end, uint64_t *value) noexcept:
    """An integer of any width, from 0."""
    cdef unsigned char first
    cdef status_t status
    if at[0] == end:
        return ENDS_EARLY
    first = at[0][0]
    at[0] += 1
    if first <= 0x7F:
        value[0] = first
        return FINE
    if 0xCC <= first <= 0xCF:  # unsigned
        return read_big_endian(at, end, 1 << (first - 0xCC), value)
    if 0xD0 <= first <= 0xD3:  # signed
        status = read_big_endian(at, end, 1 << (first - 0xD0), value)
        return OTHER_TYPE if status == FINE and value[0] >> ((8 << (first - 0xD0)) - 1) else status
    return OTHER_TYPE


cdef status_t read_array(reader_t *at, reader_t end, uint64_t *count) noexcept:
    """The beginning of an array: how many elements follow."""
    cdef unsigned char first
    if at[0] == end:
        return ENDS_EARLY
    first = at[0][0]
    at[0] += 1
    if 0x90 <= first <= 0x9F:
        count[0] = first & 0x0F
        return FINE
    if 0xDC <= first <= 0xDD:
        return read_big_endian(at, end, 2 << (first - 0xDC), count)
    return OTHER_TYPE


cdef status_t read_bytes(reader_t *at, reader_t end, span_t *content) noexcept:
    """A str or a bin: writers that know no bin, or are told not to use it, send bytes as str."""
    cdef unsigned char first
    cdef uint64_t size
    cdef status_t status = FINE
    if at[0] == end:
        return ENDS_EARLY
    first = at[0][0]
    at[0] += 1
    if 0xA0 <= first <= 0xBF:
        size = first & 0x1F
    elif 0xC4 <= first <= 0xC6:  # bin
        status = read_big_endian(at, end, 1 << (first - 0xC4), &size)
    elif 0xD9 <= first <= 0xDB:  # str
        status = read_big_endian(at, end, 1 << (first - 0xD9), &size)
    else:
        return OTHER_TYPE
    if status != FINE or size > <uint64_t>(end - at[0]):
        return ENDS_EARLY
    content.start = at[0]
    content.size = <Py_ssize_t>size
    at[0] += content.size
    return FINE


cdef const char *fault_of(status_t status, const char *text) noexcept:
    if status == ENDS_EARLY:
        return "it ends early"
    return text


cdef const char *read_packed(reader_t at, reader_t end, packed_t *packed) noexcept:
    """Return NULL, or what is wrong. Whether data and shape are of one size is left to the caller."""
    cdef uint64_t number
    cdef status_t status
    cdef int i
    packed.dimensions = 0
    status = read_array(&at, end, &number)
    if status != FINE or number != 3:
        return fault_of(status, "it is not a msgpack array of 3 elements")
    status = read_array(&at, end, &number)
    if status != FINE:
        return fault_of(status, "its shape is not an array")
    if number > MAX_DIMENSIONS:
        return "its shape has over 32 dimensions"
    for i in range(<int>number):
        status = read_natural(&at, end, &number)
        if status != FINE:
            return fault_of(status, "its shape is not of integers from 0")
        if number > <uint64_t>PY_SSIZE_T_MAX:
            return "its shape overflows"
        packed.shape[i] = <Py_ssize_t>number
        packed.dimensions = i + 1
    status = read_bytes(&at, end, &packed.dtype)
    if status != FINE:
        return fault_of(status, "its dtype is not a str")
    status = read_bytes(&at, end, &packed.data)
    if status != FINE:
        return fault_of(status, "its data is not a bin")
    if at != end:
        return "bytes follow its data"
    return NULL


cdef Py_ssize_t size_of(const Py_ssize_t *shape, int dimensions, Py_ssize_t itemsize) noexcept:
    """Bytes of an array, or -1 if that overflows. Without its zeros, as in numpy, for which the order plays no part."""
    cdef Py_ssize_t size = itemsize
    cdef bint is_empty = False
    cdef int i
    for i in range(dimensions):
        if shape[i] == 0:
            is_empty = True
        elif size > PY_SSIZE_T_MAX // shape[i]:
            return -1
        else:
            size *= shape[i]
    return 0 if is_empty else size


cdef tuple as_tuple(const Py_ssize_t *shape, int dimensions):
    return tuple([shape[i] for i in range(dimensions)])


cdef describe(packed_t *packed):
    """What came, for the text of an error."""
    dtype = packed.dtype.start[:packed.dtype.size].decode("utf-8", "replace")
    if len(dtype) > MAX_DTYPE_BYTES or not dtype.isprintable() or not dtype:
        dtype = f"{dtype!r:.64}"
    return f"{dtype} {list(as_tuple(packed.shape, packed.dimensions))}"


cdef not_packed(name, span_t payload, const char *fault):
    return (
        f"{name} is {payload.size} bytes that are not a packed array, which is msgpack's (shape, dtype name, bytes): "
        f"{fault.decode()}"
    )


cdef tuple checked(name, span_t payload, packed_t *packed):
    """(shape, dtype name) of a packed array of any kind. Raises ArrayError."""
    cdef const char *fault = read_packed(payload.start, payload.start + payload.size, packed)
    if fault != NULL:
        raise ArrayError(not_packed(name, payload, fault))
    cdef Py_ssize_t items = size_of(packed.shape, packed.dimensions, 1)
    if items < 0 or (packed.data.size % items or packed.data.size < items if items else packed.data.size):
        raise ArrayError(f"{name} is {describe(packed)} with {packed.data.size} bytes, which does not fit that shape")
    try:
        dtype = PyUnicode_DecodeUTF8(<const char *>packed.dtype.start, packed.dtype.size, NULL)
    except UnicodeDecodeError:
        raise ArrayError(not_packed(name, payload, "its dtype is not UTF-8")) from None
    return as_tuple(packed.shape, packed.dimensions), dtype


def unpack(bytes payload not None):
    """Return (shape, dtype name, offset of the data, its size in bytes) of a packed array.

    The size of the data is a multiple of the shape's number of items; whether by the dtype's item size, is not known
    here. Raises ArrayError for anything else.
    """
    cdef span_t span
    cdef packed_t packed
    span.start = <reader_t>PyBytes_AS_STRING(payload)
    span.size = PyBytes_GET_SIZE(payload)
    shape, dtype = checked("the payload", span, &packed)
    return shape, dtype, packed.data.start - span.start, packed.data.size


cdef list read_pairs(reader_t start, reader_t *at, reader_t end):
    """(key, offset of the value from `start`, its size) of all pairs up to another field; None to ask protobuf.

    All of them before any value is looked at: an error in one must not hide that protobuf would refuse the message, or
    read it otherwise.
    """
    cdef list pairs = []
    cdef span_t key, value
    while at[0] < end and at[0][0] == PAIR:
        at[0] += 1
        if not read_pair(at, end, &key, &value):
            return None
        try:
            name = PyUnicode_DecodeUTF8(<const char *>key.start, key.size, NULL)
        except UnicodeDecodeError:
            return None
        pairs.append((name, value.start - start, value.size))
    return pairs


# Writing.

cdef unsigned char *write_big_endian(unsigned char *at, unsigned char first, uint64_t value, int width) noexcept:
    cdef int i
    at[0] = first
    for i in range(width):
        at[1 + i] = <unsigned char>(value >> 8 * (width - 1 - i) & 0xFF)
    return at + 1 + width


cdef unsigned char *write_natural(unsigned char *at, uint64_t value) noexcept:
    if value <= 0x7F:
        return write_big_endian(at, <unsigned char>value, 0, 0)
    if value <= 0xFF:
        return write_big_endian(at, 0xCC, value, 1)
    if value <= 0xFFFF:
        return write_big_endian(at, 0xCD, value, 2)
    if value <= UINT32_MAX:
        return write_big_endian(at, 0xCE, value, 4)
    return write_big_endian(at, 0xCF, value, 8)


cdef int write_header(
    unsigned char *target, const Py_ssize_t *shape, int dimensions, span_t dtype, Py_ssize_t data_bytes
) noexcept:
    """What precedes the data, in at most MAX_HEADER_BYTES. Returns its size."""
    cdef unsigned char *at = target
    cdef int i
    invariant(dimensions <= MAX_DIMENSIONS and dtype.size <= MAX_DTYPE_BYTES and data_bytes <= UINT32_MAX)
    at = write_big_endian(at, 0x93, 0, 0)
    if dimensions <= 0x0F:
        at = write_big_endian(at, 0x90 | <unsigned char>dimensions, 0, 0)
    else:
        at = write_big_endian(at, 0xDC, dimensions, 2)
    for i in range(dimensions):
        at = write_natural(at, shape[i])
    if dtype.size <= 0x1F:
        at = write_big_endian(at, 0xA0 | <unsigned char>dtype.size, 0, 0)
    else:
        at = write_big_endian(at, 0xD9, dtype.size, 1)
    memcpy(at, dtype.start, dtype.size)
    at += dtype.size
    if data_bytes <= 0xFF:
        at = write_big_endian(at, 0xC4, data_bytes, 1)
    elif data_bytes <= 0xFFFF:
        at = write_big_endian(at, 0xC5, data_bytes, 2)
    else:
        at = write_big_endian(at, 0xC6, data_bytes, 4)
    return <int>(at - target)


cdef int to_shape(values, Py_ssize_t *shape, int most) except -1:
    """Returns the number of dimensions."""
    cdef int count = 0
    cdef Py_ssize_t length
    for value in values:
        length = value
        if count == most:
            raise ValueError(f"a shape of over {most} dimensions")
        if length < 0:
            raise ValueError(f"a shape with the negative length {length}")
        shape[count] = length
        count += 1
    return count


cdef int to_dtype(dtype, span_t *span) except -1:
    """Points to the name, which must be kept alive."""
    if not isinstance(dtype, str):
        raise TypeError(f"a dtype name must be a str; it is a {type(dtype).__name__}")
    span.start = <reader_t>PyUnicode_AsUTF8AndSize(dtype, &span.size)
    if not 1 <= span.size <= MAX_DTYPE_BYTES:
        raise ValueError(f"the dtype name {dtype!r:.100}; it must have 1 to {MAX_DTYPE_BYTES} bytes")
    return 0


def pack_header(shape, dtype, Py_ssize_t data_bytes):
    """Return what precedes the data of a packed array, as msgpack's `packb((shape, dtype, data))` writes it.

    Raises TypeError, ValueError or OverflowError for what such an array cannot have.
    """
    cdef Py_ssize_t[MAX_DIMENSIONS] lengths
    cdef unsigned char[MAX_HEADER_BYTES] header
    cdef span_t name
    cdef int dimensions = to_shape(shape, lengths, MAX_DIMENSIONS)
    to_dtype(dtype, &name)
    if not 0 <= data_bytes <= UINT32_MAX:
        raise OverflowError(f"{data_bytes} bytes of data; a packed array has from 0 to {UINT32_MAX}")
    return PyBytes_FromStringAndSize(
        <const char *>header, write_header(header, lengths, dimensions, name, data_bytes)
    )


cdef struct source_t:
    span_t name
    span_t dtype
    int dimensions  # of a row
    Py_ssize_t[MAX_DIMENSIONS] shape  # the number of rows first
    Py_ssize_t row_bytes
    Py_buffer buffer
    # How it is written next, by `frame`.
    int header_size
    unsigned char[MAX_HEADER_BYTES] header
    Py_ssize_t data_bytes
    Py_ssize_t packed_bytes
    Py_ssize_t pair_bytes


@cython.internal
@cython.final
cdef class Sources:
    """Arrays to write, from tuples (name, buffer, shape of a row, dtype name); keeps their buffers."""
    cdef source_t *at
    cdef Py_ssize_t count
    cdef list _kept

    def __cinit__(self, arrays):
        cdef tuple given = tuple(arrays)
        cdef source_t *source
        self._kept = []
        self.at = <source_t *>PyMem_Calloc(len(given) + 1, sizeof(source_t))
        if self.at == NULL:
            raise MemoryError
        for name, data, shape, dtype in given:
            source = &self.at[self.count]
            if not isinstance(name, str):
                raise TypeError(f"the name of an array must be a str; it is {name!r:.100}")
            self._kept.append((name, dtype))
            source.name.start = <reader_t>PyUnicode_AsUTF8AndSize(name, &source.name.size)
            to_dtype(dtype, &source.dtype)
            # One less, as the axis of rows comes first.
            source.dimensions = to_shape(shape, &source.shape[1], MAX_DIMENSIONS - 1)
            # Not PyBUF_FORMAT: numpy has no format for some dtypes.
            PyObject_GetBuffer(data, &source.buffer, PyBUF_ND)
            self.count += 1  # from here on it is released
            source.row_bytes = size_of(&source.shape[1], source.dimensions, source.buffer.itemsize)
            if source.row_bytes < 0:
                raise OverflowError(f"{name} has rows of the shape {shape}, which overflows")

    def __dealloc__(self):
        cdef Py_ssize_t i
        for i in range(self.count):
            PyBuffer_Release(&self.at[i].buffer)
        PyMem_Free(self.at)

    cdef object name(self, Py_ssize_t index):
        return self._kept[index][0]

    cdef Py_ssize_t frame(self, Py_ssize_t rows, bint keeps_axis) except -1:
        """Prepare each array to be written with that many rows. Returns the bytes of all of them as pairs."""
        cdef source_t *source
        cdef Py_ssize_t total = 0
        cdef Py_ssize_t i
        for i in range(self.count):
            source = &self.at[i]
            if source.row_bytes and rows > (MAX_BYTES - total) // source.row_bytes:
                raise OverflowError(
                    f"{rows} rows of {source.row_bytes} bytes for {self.name(i)}; a message holds at most {MAX_BYTES}"
                )
            source.data_bytes = rows * source.row_bytes
            source.shape[0] = rows
            source.header_size = write_header(
                source.header,
                &source.shape[0 if keeps_axis else 1],
                source.dimensions + keeps_axis,
                source.dtype,
                source.data_bytes,
            )
            source.packed_bytes = source.header_size + source.data_bytes
            source.pair_bytes = prefixed_size(source.packed_bytes)
            if source.name.size:
                source.pair_bytes += prefixed_size(source.name.size)
            total += prefixed_size(source.pair_bytes)
            if total > MAX_BYTES:
                raise OverflowError(f"a message of over {MAX_BYTES} bytes")
        return total


cdef unsigned char *write_packed(unsigned char *at, unsigned char tag, source_t *source) noexcept:
    """A packed array as a field, up to its data."""
    at = write_prefix(at, tag, source.packed_bytes)
    memcpy(at, source.header, source.header_size)
    return at + source.header_size


cdef unsigned char *write_pair(unsigned char *at, source_t *source) noexcept:
    """A name with its packed array, up to the data."""
    at = write_prefix(at, PAIR, source.pair_bytes)
    if source.name.size:
        at = copy_bytes(write_prefix(at, KEY, source.name.size), source.name.start, source.name.size)
    return write_packed(at, VALUE, source)


# Requests.

@cython.final
cdef class Field:
    """A declared array.

    name: its name in a request of the kind `arrays`, and in errors.
    shape: of one row, each length at least 1.
    dtype: its name, which requests must have too.
    itemsize: bytes of an item.

    Raises TypeError, ValueError or OverflowError for others.
    """
    cdef readonly str name
    cdef readonly tuple shape
    cdef readonly str dtype
    cdef readonly Py_ssize_t row_bytes
    cdef int _dimensions
    cdef Py_ssize_t[MAX_DIMENSIONS] _shape
    cdef span_t _dtype  # which `dtype` keeps alive

    def __cinit__(self, str name not None, shape, str dtype not None, Py_ssize_t itemsize):
        self._dimensions = to_shape(shape, self._shape, MAX_DIMENSIONS - 1)
        self.name = name
        self.shape = as_tuple(self._shape, self._dimensions)
        self.dtype = dtype
        to_dtype(dtype, &self._dtype)
        if itemsize < 1:
            raise ValueError(f"{name} has items of {itemsize} bytes")
        self.row_bytes = size_of(self._shape, self._dimensions, itemsize)
        if self.row_bytes < 0:
            raise OverflowError(f"{name} has the shape {list(self.shape)}, which overflows")
        if self.row_bytes == 0:
            raise ValueError(f"{name} has the shape {list(self.shape)}; each length must be at least 1")


@cython.final
cdef class RequestReader:
    """Reads MukoeRequests of one kind.

    number: of the kind's message in the request.
    fields: the declared arrays; one of them if there is a data_number.
    data_number: of the bytes field that holds the packed array; None for a message that is `Arrays`.
    action_number: of the int32 field, greater than data_number; None if there is none.
    max_rows: most rows per request.

    Raises ValueError for other numbers, and for names that are not unique.
    """
    cdef tuple _fields
    cdef dict _indices  # of a field, by its name
    cdef Py_ssize_t _max_rows
    cdef int _tag, _data_tag, _action_tag  # 0 for none

    def __cinit__(self, int number, fields, *, data_number=None, action_number=None, Py_ssize_t max_rows):
        cdef Field field
        self._fields = tuple(fields)
        self._indices = {(<Field?>each).name: index for index, each in enumerate(self._fields)}
        numbers = [each for each in (data_number, action_number) if each is not None]
        if (
            not 1 <= number < KEEP_ROWS_AXIS
            or any([not 1 <= each <= MAX_ONE_BYTE_NUMBER for each in numbers])
            or numbers != sorted(set(numbers))
            or (action_number is not None and data_number is None)
        ):
            raise ValueError(f"no reader for field {number} with data_number={data_number}, {action_number=}")
        if len(self._indices) != len(self._fields) or not self._fields:
            raise ValueError(f"the names {[field.name for field in self._fields]}; there must be some, all different")
        if data_number is not None and len(self._fields) != 1:
            raise ValueError(f"{len(self._fields)} fields for a message that holds one")
        if max_rows < 1:
            raise ValueError(f"max_rows is {max_rows}; it must be at least 1")
        for field in self._fields:
            if max_rows > PY_SSIZE_T_MAX // field.row_bytes:
                raise OverflowError(f"{max_rows} rows of {field.row_bytes} bytes for {field.name}")
        self._max_rows = max_rows
        self._tag = number << 3 | LENGTH_PREFIXED
        self._data_tag = 0 if data_number is None else <int>data_number << 3 | LENGTH_PREFIXED
        self._action_tag = 0 if action_number is None else <int>action_number << 3 | VARINT

    def read(self, bytes message not None):
        """Return the ArrayRequest, which keeps the message, or None if protobuf must be asked.

        Raises ArrayError unless it holds exactly the declared arrays: each of the declared shape, which is one row, or
        of 1 to `max_rows` such rows, the same number in each.
        """
        cdef reader_t at = <reader_t>PyBytes_AS_STRING(message)
        cdef reader_t end = at + PyBytes_GET_SIZE(message)
        cdef span_t body, payload
        cdef uint64_t keeps_axis = 0
        cdef uint64_t action = 0
        cdef ArrayRequest request
        if at == end or at[0] != self._tag:
            return None
        at += 1
        if not read_payload(&at, end, &body):
            return None
        if at < end and at[0] == (KEEP_ROWS_AXIS << 3 | VARINT):
            at += 1
            if not read_varint(&at, end, &keeps_axis):
                return None
        if at != end:
            return None
        # An ArrayError before the whole message is known to be of the plain shape could be one that protobuf does not
        # find, as with a field that comes twice.
        at = body.start
        end = at + body.size
        if self._data_tag:
            payload.start = at
            payload.size = 0
            if at < end and at[0] == self._data_tag:
                at += 1
                if not read_payload(&at, end, &payload):
                    return None
            if self._action_tag and at < end and at[0] == self._action_tag:
                at += 1
                if not read_varint(&at, end, &action):
                    return None
            if at != end:
                return None
            request = self._begin(message, PyBytes_GET_SIZE(message), <int32_t><uint32_t>action, keeps_axis != 0)
            self._add(request, 0, payload)
            return self._complete(request)
        pairs = read_pairs(body.start, &at, end)
        if pairs is None or at != end:
            return None
        request = self._begin(message, PyBytes_GET_SIZE(message), 0, keeps_axis != 0)
        for name, offset, size in pairs:
            payload.start = body.start + <Py_ssize_t>offset
            payload.size = size
            self._add(request, self._index_of(name), payload)
        return self._complete(request)

    def of_payloads(self, payloads, action=0, bint keep_rows_axis=False):
        """Return the ArrayRequest of pairs (name, bytes), which protobuf has read. Raises ArrayError as `read` does.

        The names are those of the fields, also where `read` finds no name in the message.
        """
        cdef ArrayRequest request
        cdef span_t payload
        cdef bytes content
        cdef list pairs = list(payloads)
        cdef tuple kept = tuple([content for _, content in pairs])
        request = self._begin(kept, sum([len(content) for content in kept]), to_int32(action), keep_rows_axis)
        for (name, _), content in zip(pairs, kept):
            payload.start = <reader_t>PyBytes_AS_STRING(content)
            payload.size = PyBytes_GET_SIZE(content)
            self._add(request, self._index_of(name), payload)
        return self._complete(request)

    def of_rows(self, columns, Py_ssize_t rows, bytes actions=None):
        """Return the ArrayRequest of each field's rows, which it keeps: `bytes`, in the order of the fields.

        actions: an int32 in native byte order per row; None for kinds that have none.

        Raises ArrayError for a wrong number of rows or bytes.
        """
        cdef tuple kept = tuple(columns)
        cdef ArrayRequest request
        cdef Field field
        cdef bytes content
        if not 1 <= rows <= self._max_rows:
            raise ArrayError(f"the request has {rows} rows; this batcher takes from 1 to {self._max_rows}")
        if len(kept) != len(self._fields):
            raise ArrayError(f"the request has {len(kept)} arrays; this batcher takes {self._names()}")
        if (actions is not None) != (self._action_tag != 0):
            raise ArrayError("the request has actions" if actions is not None else "the request has no actions")
        if actions is not None and len(actions) != rows * <Py_ssize_t>sizeof(int32_t):
            raise ArrayError(f"the actions have {len(actions)} bytes; {rows} rows have {rows * sizeof(int32_t)}")
        request = self._begin((kept, actions), sum([len(content) for content in kept]), 0, True)
        request.rows = rows
        if actions is not None:
            request._actions = <const unsigned char *>PyBytes_AS_STRING(actions)
        for i in range(len(kept)):
            field = self._fields[i]
            content = kept[i]
            if PyBytes_GET_SIZE(content) != rows * field.row_bytes:
                raise ArrayError(
                    f"{field.name} has {len(content)} bytes; {rows} rows of {field.dtype} {list(field.shape)} have "
                    f"{rows * field.row_bytes}"
                )
            request._data[i] = <reader_t>PyBytes_AS_STRING(content)
        return self._complete(request)

    cdef ArrayRequest _begin(self, kept, Py_ssize_t size_bytes, int32_t action, bint keep_rows_axis):
        cdef ArrayRequest request = ArrayRequest.__new__(ArrayRequest)
        request._data = <reader_t *>PyMem_Calloc(len(self._fields), sizeof(reader_t))
        if request._data == NULL:
            raise MemoryError
        request._kept = kept
        request.size_bytes = size_bytes
        request.action = action
        request.keeps_axis = keep_rows_axis
        return request

    cdef Py_ssize_t _index_of(self, name) except -1:
        index = self._indices.get(name)
        if index is None:
            raise ArrayError(f"the request has an array {name!r:.100}; this batcher takes {self._names()}")
        return index

    cdef int _add(self, ArrayRequest request, Py_ssize_t index, span_t payload) except -1:
        """Check an array, and note where its data lies."""
        cdef Field field = self._fields[index]
        cdef packed_t packed
        cdef Py_ssize_t rows
        cdef int axes  # before those of a row
        cdef const char *fault
        if request._data[index] != NULL:
            raise ArrayError(f"the request has {field.name} twice")
        fault = read_packed(payload.start, payload.start + payload.size, &packed)
        if fault != NULL:
            raise ArrayError(f"{not_packed(field.name, payload, fault)}; {self._expected(field, request)}")
        axes = packed.dimensions - field._dimensions
        rows = 1 if axes == 0 else packed.shape[0]
        if (
            not request.keeps_axis <= axes <= 1
            or not 1 <= rows <= self._max_rows
            or memcmp(&packed.shape[axes], field._shape, field._dimensions * sizeof(Py_ssize_t)) != 0
            or packed.dtype.size != field._dtype.size
            or memcmp(packed.dtype.start, field._dtype.start, field._dtype.size) != 0
        ):
            raise ArrayError(f"{field.name} is {describe(&packed)}; {self._expected(field, request)}")
        if packed.data.size != rows * field.row_bytes:
            raise ArrayError(
                f"{field.name} is {describe(&packed)} with {packed.data.size} bytes of data; "
                f"it must have {rows * field.row_bytes}"
            )
        if request.rows == 0:
            request.rows = rows
        elif request.rows != rows:
            raise ArrayError(
                f"the arrays of a request must have the same number of rows; {self._first_of(request)} has "
                f"{request.rows}, {field.name} has {rows}"
            )
        request._data[index] = packed.data.start
        return 0

    cdef ArrayRequest _complete(self, ArrayRequest request):
        cdef Py_ssize_t i
        for i in range(len(self._fields)):
            if request._data[i] == NULL:
                raise ArrayError(
                    f"the request has no array {(<Field>self._fields[i]).name!r}; this batcher takes {self._names()}"
                )
        request._reader = self
        request.keeps_axis = request.keeps_axis or request.rows > 1
        return request

    cdef object _first_of(self, ArrayRequest request):
        """The name of an array that was added."""
        for i in range(len(self._fields)):
            if request._data[i] != NULL:
                return (<Field>self._fields[i]).name

    cdef object _names(self):
        return ", ".join([repr(name) for name in self._indices])

    cdef object _expected(self, Field field, ArrayRequest request):
        lengths = ", ".join([str(length) for length in field.shape])
        rows = f"[rows, {lengths}]" if lengths else "[rows]"
        most = "1 row" if self._max_rows == 1 else f"1 to {self._max_rows} rows"
        if request.keeps_axis:
            return f"with keep_rows_axis this batcher takes {field.dtype} {rows}, {most}"
        return f"this batcher takes {field.dtype} [{lengths}], or {most} of it as {rows}"


@cython.final
@cython.no_gc  # what it refers to never refers back
cdef class ArrayRequest:
    """A request's arrays, as they lie in its message. Created by RequestReader.

    rows: how many rows each array has, from 1.
    keeps_axis: whether the arrays of the answer have an axis of rows.
    action: of every row; 0 where the kind has none, and where each row has its own.
    size_bytes: bytes of the message that it keeps.
    """
    cdef readonly Py_ssize_t rows
    cdef readonly bint keeps_axis
    cdef readonly int32_t action
    cdef readonly Py_ssize_t size_bytes
    cdef RequestReader _reader
    cdef object _kept
    cdef reader_t *_data  # of each field, in `_kept`
    cdef const unsigned char *_actions  # of each row, in `_kept`; NULL where they are all `action`

    def __dealloc__(self):
        PyMem_Free(self._data)


# Batches.

cdef enum:
    ALIGNMENT_BYTES = 64  # from which JAX uses memory in place, and which vector instructions like


@cython.final
@cython.no_gc
cdef class Arena:
    """Memory for the arrays of one batch after another, aligned to 64 bytes. It is a writable buffer of bytes.

    size_bytes: at least 1.

    Raises MemoryError.
    """
    cdef void *_memory
    cdef readonly Py_ssize_t size_bytes
    cdef Py_ssize_t _views

    def __cinit__(self, Py_ssize_t size_bytes):
        if size_bytes < 1:
            raise ValueError(f"size_bytes is {size_bytes}; it must be at least 1")
        if posix_memalign(&self._memory, ALIGNMENT_BYTES, size_bytes) != 0:
            raise MemoryError(f"{size_bytes} bytes for the arrays of a batch")
        self.size_bytes = size_bytes

    def __dealloc__(self):
        free(self._memory)

    @property
    def is_free(self):
        """Whether nobody holds a view of it: no array, no tensor, no other view of any of these."""
        return self._views == 0

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self._memory, self.size_bytes, 0, flags)
        self._views += 1

    def __releasebuffer__(self, Py_buffer *view):
        self._views -= 1


cdef struct copy_t:
    unsigned char *target
    const void *source
    Py_ssize_t size


cdef void copy_all(const copy_t *copies, Py_ssize_t count) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(count):
        if copies[i].size:
            memcpy(copies[i].target, copies[i].source, copies[i].size)


cdef Py_ssize_t count_rows(tuple requests) except -1:
    """Rows of requests of one reader, of which there must be some."""
    cdef Py_ssize_t rows = 0
    cdef RequestReader reader = None
    for each in requests:
        request = <ArrayRequest?>each
        if request._reader is None:
            raise TypeError("use RequestReader.read to create an ArrayRequest")
        if reader is not None and request._reader is not reader:
            raise ValueError("the requests are of different readers")
        reader = request._reader
        rows += request.rows
    if rows == 0:
        raise ValueError("no requests")
    return rows


cdef int check_target(Py_buffer *target, Py_ssize_t rows, Py_ssize_t size, Py_ssize_t row_bytes) except -1:
    if rows > size:
        raise ValueError(f"{rows} rows for a size of {size}")
    if target.len % row_bytes or target.len // row_bytes != size:
        raise ValueError(f"a target of {target.len} bytes for {size} rows of {row_bytes} bytes")
    return 0


def gather(requests, Py_ssize_t field, target, Py_ssize_t size):
    """Copy a field's rows of all requests, in order, into a buffer of `size` rows, and return how many they are.

    The rows that are left in the buffer repeat the first. Large copies are made without the GIL.

    target: a writable C-contiguous buffer of exactly `size` rows.

    Raises IndexError for a field that is not declared, ValueError for a wrong number of rows or bytes, and TypeError,
    BufferError or ValueError for a target without such a buffer.
    """
    cdef tuple given = tuple(requests)
    cdef Py_ssize_t rows = count_rows(given)
    cdef RequestReader reader = (<ArrayRequest>given[0])._reader
    cdef Py_ssize_t row_bytes
    cdef Py_ssize_t count = 0
    cdef ArrayRequest request
    cdef copy_t *copies
    cdef unsigned char *at
    cdef Py_buffer view
    if not 0 <= field < len(reader._fields):
        raise IndexError(f"field {field} of {len(reader._fields)}")
    row_bytes = (<Field>reader._fields[field]).row_bytes
    PyObject_GetBuffer(target, &view, PyBUF_WRITABLE)
    try:
        check_target(&view, rows, size, row_bytes)
        copies = <copy_t *>PyMem_Malloc((len(given) + size - rows) * sizeof(copy_t))
        if copies == NULL:
            raise MemoryError
        at = <unsigned char *>view.buf
        for each in given:
            request = <ArrayRequest>each
            copies[count] = copy_t(at, request._data[field], request.rows * row_bytes)
            at += copies[count].size
            count += 1
        while count < len(given) + size - rows:
            copies[count] = copy_t(at, copies[0].source, row_bytes)
            at += row_bytes
            count += 1
        invariant(at == <unsigned char *>view.buf + view.len)
        if view.len >= NOGIL_COPY_BYTES:
            with nogil:
                copy_all(copies, count)
        else:
            copy_all(copies, count)
        PyMem_Free(copies)
    finally:
        PyBuffer_Release(&view)
    return rows


cdef const void *action_of(ArrayRequest request, Py_ssize_t row) noexcept:
    if request._actions == NULL:
        return &request.action
    return request._actions + row * sizeof(int32_t)


def gather_actions(requests, target, Py_ssize_t size):
    """Write each row's action into a buffer of `size` int32, and return how many rows they are.

    What is left in the buffer repeats the first. Raises as `gather` does.
    """
    cdef tuple given = tuple(requests)
    cdef Py_ssize_t rows = count_rows(given)
    cdef ArrayRequest request
    cdef unsigned char *at
    cdef Py_ssize_t row, _row
    cdef Py_buffer view
    PyObject_GetBuffer(target, &view, PyBUF_WRITABLE)
    try:
        check_target(&view, rows, size, sizeof(int32_t))
        at = <unsigned char *>view.buf
        for each in given:
            request = <ArrayRequest>each
            for row in range(request.rows):
                memcpy(at, action_of(request, row), sizeof(int32_t))  # the target may be unaligned
                at += sizeof(int32_t)
        request = <ArrayRequest>given[0]
        for _row in range(size - rows):
            memcpy(at, action_of(request, 0), sizeof(int32_t))
            at += sizeof(int32_t)
        invariant(at == <unsigned char *>view.buf + view.len)
    finally:
        PyBuffer_Release(&view)
    return rows


def encode_answers(requests, outputs, int32_t step):
    """Return a serialized MukoeResponse per request, which holds the request's rows of each output.

    outputs: tuples (key, buffer, shape of a row, dtype name). The buffer is C-contiguous, its items are of the dtype's
        size, and it has the rows of all requests in order; what follows them is dropped.
    step: an int32.

    Each output is a packed array of the shape `(rows, *shape)`, or of `shape` for a request that does not keep the
    axis. Large copies are made without the GIL.

    Raises ValueError for a buffer with too few rows, OverflowError for an answer of more bytes than a message holds,
    and TypeError, ValueError or BufferError for other outputs.
    """
    cdef tuple given = tuple(requests)
    cdef Py_ssize_t rows = count_rows(given)
    cdef Sources sources = Sources(outputs)
    cdef Py_ssize_t step_size = 1 + varint_size(sign_extended(step)) if step else 0
    cdef Py_ssize_t pairs_size = 0
    cdef Py_ssize_t copied_bytes = 0
    cdef Py_ssize_t count = 0
    cdef Py_ssize_t row = 0
    cdef Py_ssize_t i
    cdef ArrayRequest request, last = None
    cdef source_t *source
    cdef copy_t *copies
    cdef unsigned char *at
    cdef bytes message
    cdef list answers = []
    for i in range(sources.count):
        source = &sources.at[i]
        if source.row_bytes and rows > source.buffer.len // source.row_bytes:
            raise ValueError(
                f"{sources.name(i)} has {source.buffer.len} bytes, too few for {rows} rows of {source.row_bytes}"
            )
    copies = <copy_t *>PyMem_Malloc((len(given) * sources.count + 1) * sizeof(copy_t))
    if copies == NULL:
        raise MemoryError
    try:
        for each in given:
            request = <ArrayRequest>each
            if last is None or request.rows != last.rows or request.keeps_axis != last.keeps_axis:
                pairs_size = sources.frame(request.rows, request.keeps_axis)
            last = request
            message = PyBytes_FromStringAndSize(NULL, prefixed_size(pairs_size + step_size))
            at = write_prefix(<unsigned char *>PyBytes_AS_STRING(message), RESULT, pairs_size + step_size)
            for i in range(sources.count):
                source = &sources.at[i]
                at = write_pair(at, source)
                copies[count] = copy_t(at, <char *>source.buffer.buf + row * source.row_bytes, source.data_bytes)
                count += 1
                copied_bytes += source.data_bytes
                at += source.data_bytes
            if step:
                at[0] = STEP
                at = write_varint(at + 1, sign_extended(step))
            invariant(at == <unsigned char *>PyBytes_AS_STRING(message) + PyBytes_GET_SIZE(message))
            answers.append(message)
            row += request.rows
        if copied_bytes >= NOGIL_COPY_BYTES:
            with nogil:
                copy_all(copies, count)
        else:
            copy_all(copies, count)
    finally:
        PyMem_Free(copies)
    return answers


# The client's side.

def write_request(int number, arrays, *, data_number=None, action_number=None, action=0, bint keep_rows_axis=False):
    """Return a serialized MukoeRequest, which RequestReader reads.

    arrays: tuples (name, buffer, shape, dtype name); with a data_number one, whose name is not sent. The buffer is
        C-contiguous and of exactly that shape, with items of the dtype's size.
    action: an int32, for kinds with an action_number.
    keep_rows_axis: whether the first axis is rows, and the answer must have it too.

    Raises ValueError for a buffer of another size, OverflowError for more bytes than a message holds, and TypeError,
    ValueError or BufferError for other arguments.
    """
    cdef Sources sources = Sources(arrays)
    cdef int data_tag = 0 if data_number is None else <int>data_number << 3 | LENGTH_PREFIXED
    cdef int action_tag = 0 if action_number is None else <int>action_number << 3 | VARINT
    cdef int32_t acted = to_int32(action)
    cdef Py_ssize_t size, i
    cdef source_t *source
    cdef unsigned char *at
    cdef bytes message
    if not 1 <= number < KEEP_ROWS_AXIS or not 0 <= data_tag < 128 or not 0 <= action_tag < 128:
        raise ValueError(f"no message of field {number} with {data_number=}, {action_number=}")
    if data_tag and sources.count != 1:
        raise ValueError(f"{sources.count} arrays for a message that holds one")
    for i in range(sources.count):
        source = &sources.at[i]
        if source.buffer.len != source.row_bytes:
            raise ValueError(
                f"{sources.name(i)} has {source.buffer.len} bytes, but {source.row_bytes} by its shape and item size"
            )
    size = sources.frame(1, False)
    if data_tag:
        size = prefixed_size(sources.at[0].packed_bytes)
    if action_tag and acted:
        size += 1 + varint_size(sign_extended(acted))
    message = PyBytes_FromStringAndSize(NULL, prefixed_size(size) + 2 * keep_rows_axis)
    at = write_prefix(<unsigned char *>PyBytes_AS_STRING(message), <unsigned char>(number << 3 | LENGTH_PREFIXED), size)
    for i in range(sources.count):
        source = &sources.at[i]
        at = write_packed(at, <unsigned char>data_tag, source) if data_tag else write_pair(at, source)
        at = copy_bytes(at, source.buffer.buf, source.data_bytes)
    if action_tag and acted:
        at[0] = <unsigned char>action_tag
        at = write_varint(at + 1, sign_extended(acted))
    if keep_rows_axis:
        at[0] = KEEP_ROWS_AXIS << 3 | VARINT
        at = write_varint(at + 1, 1)
    invariant(at == <unsigned char *>PyBytes_AS_STRING(message) + PyBytes_GET_SIZE(message))
    return message


def read_answer(bytes message not None):
    """Return ([(key, shape, dtype name, offset of the data, its size in bytes)], step) of a MukoeResponse.

    Returns None if protobuf must be asked. Raises ArrayError for a value that is not a packed array.
    """
    cdef reader_t start = <reader_t>PyBytes_AS_STRING(message)
    cdef reader_t at = start
    cdef reader_t end = start + PyBytes_GET_SIZE(message)
    cdef span_t body, payload
    cdef packed_t packed
    cdef uint64_t step = 0
    cdef list answer = []
    if at == end or at[0] != RESULT:
        return None
    at += 1
    if not read_payload(&at, end, &body) or at != end:
        return None
    at = body.start
    pairs = read_pairs(start, &at, end)
    if pairs is None:
        return None
    if at < end and at[0] == STEP:
        at += 1
        if not read_varint(&at, end, &step):
            return None
    if at != end:
        return None
    for name, offset, size in pairs:
        payload.start = start + <Py_ssize_t>offset
        payload.size = size
        shape, dtype = checked(repr(name), payload, &packed)
        answer.append((name, shape, dtype, packed.data.start - start, packed.data.size))
    return answer, <int32_t><uint32_t>step
