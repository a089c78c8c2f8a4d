from google.protobuf import descriptor_pb2 as _descriptor_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor
BOUND_FIELD_NUMBER: _ClassVar[int]
bound: _descriptor.FieldDescriptor

class Bound(_message.Message):
    __slots__ = ("characters", "entries", "least", "most")
    CHARACTERS_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    LEAST_FIELD_NUMBER: _ClassVar[int]
    MOST_FIELD_NUMBER: _ClassVar[int]
    characters: int
    entries: int
    least: float
    most: float
    def __init__(self, characters: _Optional[int] = ..., entries: _Optional[int] = ..., least: _Optional[float] = ..., most: _Optional[float] = ...) -> None: ...
