from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Representations(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class Dynamics(_message.Message):
    __slots__ = ("data", "action")
    DATA_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    action: int
    def __init__(self, data: _Optional[bytes] = ..., action: _Optional[int] = ...) -> None: ...

class KeyValue(_message.Message):
    __slots__ = ("key", "values")
    KEY_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    key: str
    values: bytes
    def __init__(self, key: _Optional[str] = ..., values: _Optional[bytes] = ...) -> None: ...

class Arrays(_message.Message):
    __slots__ = ("arrays",)
    ARRAYS_FIELD_NUMBER: _ClassVar[int]
    arrays: _containers.RepeatedCompositeFieldContainer[KeyValue]
    def __init__(self, arrays: _Optional[_Iterable[_Union[KeyValue, _Mapping]]] = ...) -> None: ...

class MukoeRequest(_message.Message):
    __slots__ = ("representations", "dynamics", "arrays", "keep_rows_axis")
    REPRESENTATIONS_FIELD_NUMBER: _ClassVar[int]
    DYNAMICS_FIELD_NUMBER: _ClassVar[int]
    ARRAYS_FIELD_NUMBER: _ClassVar[int]
    KEEP_ROWS_AXIS_FIELD_NUMBER: _ClassVar[int]
    representations: Representations
    dynamics: Dynamics
    arrays: Arrays
    keep_rows_axis: bool
    def __init__(self, representations: _Optional[_Union[Representations, _Mapping]] = ..., dynamics: _Optional[_Union[Dynamics, _Mapping]] = ..., arrays: _Optional[_Union[Arrays, _Mapping]] = ..., keep_rows_axis: bool = ...) -> None: ...

class ModelResponse(_message.Message):
    __slots__ = ("dictionary", "step")
    DICTIONARY_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    dictionary: _containers.RepeatedCompositeFieldContainer[KeyValue]
    step: int
    def __init__(self, dictionary: _Optional[_Iterable[_Union[KeyValue, _Mapping]]] = ..., step: _Optional[int] = ...) -> None: ...

class MukoeResponse(_message.Message):
    __slots__ = ("result",)
    RESULT_FIELD_NUMBER: _ClassVar[int]
    result: ModelResponse
    def __init__(self, result: _Optional[_Union[ModelResponse, _Mapping]] = ...) -> None: ...
