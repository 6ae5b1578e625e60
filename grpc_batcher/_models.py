"""The kinds of model: how a request travels as a message, what the callback gets, and what it may return.

To serve a new kind, add its message to `proto/mukoe_batcher.proto` and its line to `MODELS` (see docs/new-model.md).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError

from . import _wire
from ._proto.mukoe_batcher_pb2 import MukoeRequest, MukoeResponse

# What protobuf raises for bytes that are no message. The last two come from protobuf 3.20: UnicodeDecodeError in plain
# Python, SystemError in C++.
BROKEN_MESSAGE = (DecodeError, UnicodeDecodeError, SystemError)

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


class BadRequestError(Exception):
    """A message that the model does not accept; the text says why."""


class BadResultError(Exception):
    """Something a callback returned that cannot be an answer; the text says why."""


class Answer(NamedTuple):
    """What a caller gets: the callback's dictionary and step for its request."""

    dictionary: dict[str, bytes]
    step: int


@dataclass(frozen=True)
class Model:
    """A kind of request.

    name: as given to `create_batcher`.
    message_field: its field in MukoeRequest's `request_type`.
    arguments: the fields of its message, which are also `send_request`'s arguments. The callback gets the value of the
        only field, or a tuple of all values in this order.
    """

    name: str
    message_field: str
    arguments: tuple[str, ...]

    def read_request(self, message: bytes) -> Any:
        """Return what the callback gets for a serialized MukoeRequest. Raises BadRequestError."""
        values = self._codec.read(message) if self._codec is not None else None
        if values is None:
            values = self._read_with_protobuf(message)
        return values if len(values) > 1 else values[0]

    def write_request(self, arguments: Mapping[str, Any]) -> bytes:
        """Return the serialized MukoeRequest. Raises TypeError or ValueError for values that its fields cannot hold."""
        if self._codec is None:
            return self._write_with_protobuf(arguments)
        try:
            return self._codec.write([arguments[name] for name in self.arguments])
        except (TypeError, ValueError, BufferError, OverflowError):
            # Rare: an array that is not contiguous, or a value that cannot be sent. Protobuf says which.
            return self._write_with_protobuf(arguments)

    @cached_property
    def _codec(self) -> _wire.RequestCodec | None:
        """Reads and writes this kind with fewer copies than protobuf; None for kinds that only protobuf can."""
        field = MukoeRequest.DESCRIPTOR.fields_by_name[self.message_field]
        known = {FieldDescriptor.TYPE_BYTES: True, FieldDescriptor.TYPE_INT32: False}
        assert field.message_type is not None
        parts = [field.message_type.fields_by_name[name] for name in self.arguments]
        try:
            return _wire.RequestCodec(field.number, [(part.number, known[part.type]) for part in parts])
        except (KeyError, ValueError):
            return None

    @cached_property
    def field_numbers(self) -> dict[str, int]:
        """The number of its message in MukoeRequest, and those of its arguments in that message."""
        field = MukoeRequest.DESCRIPTOR.fields_by_name[self.message_field]
        assert field.message_type is not None
        parts = field.message_type.fields_by_name
        return {self.message_field: field.number, **{name: parts[name].number for name in self.arguments}}

    def parse(self, message: bytes) -> MukoeRequest:
        """Return a request of this kind as protobuf reads it. Raises BadRequestError."""
        try:
            request = MukoeRequest.FromString(message)
        except BROKEN_MESSAGE as error:
            raise BadRequestError(f"{len(message)} bytes that are not a MukoeRequest: {error}") from None
        kind = request.WhichOneof("request_type")
        if kind != self.message_field:
            raise BadRequestError(
                f"the request holds {kind or 'no request_type'}; this batcher serves {self.name!r} and takes "
                f"{self.message_field}"
            )
        return request

    def _read_with_protobuf(self, message: bytes) -> tuple[Any, ...]:
        body = getattr(self.parse(message), self.message_field)
        return tuple([getattr(body, name) for name in self.arguments])

    def _write_with_protobuf(self, arguments: Mapping[str, Any]) -> bytes:
        request = MukoeRequest()
        body = getattr(request, self.message_field)
        body.SetInParent()  # or a request whose values are all defaults would hold no request_type
        for name in self.arguments:
            value = arguments[name]
            try:
                is_bytes = body.DESCRIPTOR.fields_by_name[name].type == FieldDescriptor.TYPE_BYTES
                setattr(body, name, memoryview(value).tobytes() if is_bytes else value)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name} is {value!r:.200}: {error}") from None
        return request.SerializeToString()


MODELS = {
    model.name: model
    for model in (
        Model("repr", "representations", ("data",)),
        Model("dyna", "dynamics", ("data", "action")),
    )
}

# Its arguments are the names that a batcher declares, so it is not among those that send_request knows by theirs.
ARRAYS = Model("arrays", "arrays", ())

_BY_ARGUMENTS = {frozenset(model.arguments): model for model in MODELS.values()}
if len(_BY_ARGUMENTS) != len(MODELS):
    raise ValueError("two models take the same arguments; send_request could not tell them apart")


def write_request(arguments: Mapping[str, Any]) -> bytes:
    """Return the serialized request of the model that takes exactly these arguments.

    Raises TypeError if there is none, and TypeError or ValueError for values of a wrong type or range.
    """
    model = _BY_ARGUMENTS.get(frozenset(arguments))
    if model is None:
        known = "; ".join(f"({', '.join(model.arguments)}) for {model.name!r}" for model in MODELS.values())
        raise TypeError(f"no model takes the arguments ({', '.join(arguments)}); the models take {known}")
    return model.write_request(arguments)


def check_int32(name: str, value: Any) -> int:
    """Return a value as an int. Raises TypeError or ValueError unless it is an int32."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {_describe(value)}; it must be an int") from None
    if not INT32_MIN <= number <= INT32_MAX:
        raise ValueError(f"{name} is {number}, which does not fit an int32")
    return number


def check_result(result: Any, default_step: int = 0) -> Answer:
    """Return what a callback gave for one request, as an answer that no later change of it affects.

    default_step: what None stands for.

    Raises BadResultError unless it is a pair of a dictionary of `bytes` and an int32 or None.
    """
    if type(result) is tuple and len(result) == 2 and (answer := _plain_answer(*result)) is not None:
        return answer
    if not isinstance(result, Sequence) or len(result) != 2:
        raise BadResultError(f"must be a pair (dictionary, step); it is {_describe(result)}")
    dictionary, step = result
    if not isinstance(dictionary, Mapping):
        raise BadResultError(f"must have a dictionary first; it has {_describe(dictionary)}")
    copy = {}
    for key, value in dictionary.items():
        if not isinstance(value, bytes):
            raise BadResultError(f"must have bytes for values; {key!r} has {_describe(value)}")
        text = key if type(key) is str else "".join(str(key))  # no subclass of str
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadResultError(f"has the key {key!r}, which UTF-8 cannot express: {error}") from None
        copy[text] = value if type(value) is bytes else bytes(value)  # such as numpy's, which are a subclass
    if len(copy) != len(dictionary):
        raise BadResultError(f"has keys that are equal as text: {list(dictionary)!r:.200}")
    try:
        return Answer(copy, default_step if step is None else check_int32("step", step))
    except (TypeError, ValueError) as error:
        raise BadResultError(f"has a step that cannot be sent: {error}") from None


def _plain_answer(dictionary: Any, step: Any) -> Answer | None:
    """Return the answer of what nearly every callback gives, a dict of str to bytes and an int; None for anything else.

    It is several times as fast as the checks that can tell what is wrong.
    """
    if type(dictionary) is not dict or type(step) is not int or not INT32_MIN <= step <= INT32_MAX:
        return None
    for key, value in dictionary.items():
        if type(key) is not str or not key.isascii() or type(value) is not bytes:
            return None
    return Answer(dictionary.copy(), step)


def write_answer(answer: Answer) -> bytes:
    """Return the serialized MukoeResponse."""
    return _wire.write_answer(*answer)


def read_answer(message: bytes) -> tuple[dict[str, bytes], int]:
    """Return the answer in a serialized MukoeResponse. Raises DecodeError."""
    answer = _wire.read_answer(message)
    if answer is not None:
        return answer
    try:
        result = MukoeResponse.FromString(message).result
    except BROKEN_MESSAGE as error:
        raise DecodeError(str(error)) from error
    return {pair.key: pair.values for pair in result.dictionary}, result.step


def _describe(value: Any) -> str:
    try:
        return f"a {type(value).__name__}: {value!r:.100}"
    except Exception:
        return f"a {type(value).__name__}"
