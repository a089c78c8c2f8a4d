from steersman.v1 import bounds_pb2 as _bounds_pb2
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WeightsKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WEIGHTS_KIND_UNSPECIFIED: _ClassVar[WeightsKind]
    WEIGHTS_KIND_FULL: _ClassVar[WeightsKind]
    WEIGHTS_KIND_LORA: _ClassVar[WeightsKind]
WEIGHTS_KIND_UNSPECIFIED: WeightsKind
WEIGHTS_KIND_FULL: WeightsKind
WEIGHTS_KIND_LORA: WeightsKind

class WeightsManifest(_message.Message):
    __slots__ = ("kind", "size", "digest", "adapter_config_json", "artifact_url")
    KIND_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_CONFIG_JSON_FIELD_NUMBER: _ClassVar[int]
    ARTIFACT_URL_FIELD_NUMBER: _ClassVar[int]
    kind: WeightsKind
    size: int
    digest: str
    adapter_config_json: str
    artifact_url: str
    def __init__(self, kind: _Optional[_Union[WeightsKind, str]] = ..., size: _Optional[int] = ..., digest: _Optional[str] = ..., adapter_config_json: _Optional[str] = ..., artifact_url: _Optional[str] = ...) -> None: ...

class BeginUpdateRequest(_message.Message):
    __slots__ = ("version", "manifest")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    version: int
    manifest: WeightsManifest
    def __init__(self, version: _Optional[int] = ..., manifest: _Optional[_Union[WeightsManifest, _Mapping]] = ...) -> None: ...

class BeginUpdateResponse(_message.Message):
    __slots__ = ("already_loaded",)
    ALREADY_LOADED_FIELD_NUMBER: _ClassVar[int]
    already_loaded: bool
    def __init__(self, already_loaded: bool = ...) -> None: ...

class UploadChunksRequest(_message.Message):
    __slots__ = ("version", "offset", "data", "crc32")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    version: int
    offset: int
    data: bytes
    crc32: int
    def __init__(self, version: _Optional[int] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ..., crc32: _Optional[int] = ...) -> None: ...

class UploadChunksResponse(_message.Message):
    __slots__ = ("received",)
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    received: int
    def __init__(self, received: _Optional[int] = ...) -> None: ...

class CommitUpdateRequest(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    def __init__(self, version: _Optional[int] = ...) -> None: ...

class CommitUpdateResponse(_message.Message):
    __slots__ = ("version", "pause_seconds")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PAUSE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    version: int
    pause_seconds: float
    def __init__(self, version: _Optional[int] = ..., pause_seconds: _Optional[float] = ...) -> None: ...

class AbortUpdateRequest(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    def __init__(self, version: _Optional[int] = ...) -> None: ...

class AbortUpdateResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetWeightsStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetWeightsStatusResponse(_message.Message):
    __slots__ = ("loaded_version", "loaded_digest", "pending_version", "received")
    LOADED_VERSION_FIELD_NUMBER: _ClassVar[int]
    LOADED_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PENDING_VERSION_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    loaded_version: int
    loaded_digest: str
    pending_version: int
    received: int
    def __init__(self, loaded_version: _Optional[int] = ..., loaded_digest: _Optional[str] = ..., pending_version: _Optional[int] = ..., received: _Optional[int] = ...) -> None: ...
