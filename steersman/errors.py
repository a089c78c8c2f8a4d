"""The one tree of errors, mapped once to gRPC status codes, HTTP statuses and exit codes.

    SteersmanError
    ├── InvalidArgumentError      a request or value is wrong
    │   ├── ConfigError           a manifest or configuration field is wrong
    │   ├── DataError             a row of a data file is wrong
    │   ├── ContextLengthError    a prompt is longer than the model's context
    │   ├── ChecksumError         bytes are not what their checksum says
    │   └── UnsupportedError      this engine or server cannot do what is asked
    ├── FailedPreconditionError   the request is right, the state is not (yet)
    ├── NotFoundError
    ├── ConflictError             another writer, another version
    ├── UnauthenticatedError
    ├── PermissionDeniedError
    ├── RateLimitedError          try again after `retry_after` seconds
    ├── UnavailableError          a service is not there
    ├── DeadlineError
    ├── CancelledError
    ├── StorageError              disk full, bucket refused
    └── InternalError

A message is one sentence (or two): the field, file or row; the reason; the mend. Passwords in URLs are taken out of it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import grpc


_USER_INFO = re.compile(r"(?<=://)[^/?#@\s'\"]*@")
_SECRET_VALUE = re.compile(
    r"([?&][\w.-]*(?:key|token|secret|password|sig|signature|credential)=)[^&\s#'\"]+", re.IGNORECASE
)


def without_credentials(text: str) -> str:
    """The text with `***` for user names, passwords and secret query values of the URLs in it."""
    if "://" not in text:
        return text
    return _SECRET_VALUE.sub(r"\1***", _USER_INFO.sub("***@", text))


class SteersmanError(Exception):
    """Base of every error that Steersman raises on purpose."""

    # Name of a grpc.StatusCode; a name, so that errors do not need grpc.
    grpc_code: ClassVar[str] = "UNKNOWN"
    http_status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1
    # The `type` of an error in the OpenAI shape.
    openai_type: ClassVar[str] = "server_error"
    # Its `code` and `param`, where the class decides them.
    openai_code: ClassVar[str | None] = None
    openai_param: ClassVar[str | None] = None

    def __init__(self, message: str, *, details: dict[str, Any] | None = None) -> None:
        message = without_credentials(message)
        super().__init__(message)
        self.message = message
        self.details = details or {}

    def __str__(self) -> str:
        return self.message


class InvalidArgumentError(SteersmanError):
    grpc_code = "INVALID_ARGUMENT"
    http_status = 400
    exit_code = 2
    openai_type = "invalid_request_error"


class ConfigError(InvalidArgumentError):
    """A field of a manifest or configuration is wrong."""


class DataError(InvalidArgumentError):
    """A row of a data file is wrong; the message begins with `file:line`."""


class ContextLengthError(InvalidArgumentError):
    """A prompt is longer than the model's context."""

    openai_code = "context_length_exceeded"
    openai_param = "messages"


class ChecksumError(InvalidArgumentError):
    grpc_code = "DATA_LOSS"


class UnsupportedError(InvalidArgumentError):
    grpc_code = "UNIMPLEMENTED"


class FailedPreconditionError(SteersmanError):
    grpc_code = "FAILED_PRECONDITION"
    http_status = 409
    exit_code = 3
    openai_type = "invalid_request_error"


class NotFoundError(SteersmanError):
    grpc_code = "NOT_FOUND"
    http_status = 404
    exit_code = 4
    openai_type = "not_found_error"


class ConflictError(SteersmanError):
    grpc_code = "ABORTED"
    http_status = 409
    exit_code = 5
    openai_type = "conflict_error"


class UnauthenticatedError(SteersmanError):
    grpc_code = "UNAUTHENTICATED"
    http_status = 401
    exit_code = 6
    openai_type = "authentication_error"


class PermissionDeniedError(SteersmanError):
    grpc_code = "PERMISSION_DENIED"
    http_status = 403
    exit_code = 7
    openai_type = "permission_error"


class RateLimitedError(SteersmanError):
    grpc_code = "RESOURCE_EXHAUSTED"
    http_status = 429
    exit_code = 8
    openai_type = "rate_limit_error"

    def __init__(self, message: str, *, retry_after: float = 1.0, details: dict[str, Any] | None = None) -> None:
        super().__init__(message, details=details)
        self.retry_after = retry_after


class UnavailableError(SteersmanError):
    grpc_code = "UNAVAILABLE"
    http_status = 503
    exit_code = 9


class DeadlineError(SteersmanError):
    grpc_code = "DEADLINE_EXCEEDED"
    http_status = 504
    exit_code = 10


class CancelledError(SteersmanError):
    grpc_code = "CANCELLED"
    http_status = 499
    exit_code = 130


class StorageError(SteersmanError):
    grpc_code = "FAILED_PRECONDITION"  # RESOURCE_EXHAUSTED says: too much at once, try again
    http_status = 507
    exit_code = 11


class InternalError(SteersmanError):
    grpc_code = "INTERNAL"
    http_status = 500
    exit_code = 1


_FROM_GRPC: dict[str, type[SteersmanError]] = {
    "INVALID_ARGUMENT": InvalidArgumentError,
    "OUT_OF_RANGE": InvalidArgumentError,
    "DATA_LOSS": ChecksumError,
    "FAILED_PRECONDITION": FailedPreconditionError,
    "NOT_FOUND": NotFoundError,
    "ALREADY_EXISTS": ConflictError,
    "ABORTED": ConflictError,
    "UNAUTHENTICATED": UnauthenticatedError,
    "PERMISSION_DENIED": PermissionDeniedError,
    "RESOURCE_EXHAUSTED": RateLimitedError,
    "UNAVAILABLE": UnavailableError,
    "DEADLINE_EXCEEDED": DeadlineError,
    "CANCELLED": CancelledError,
    "UNIMPLEMENTED": UnsupportedError,
}


ERROR_DOMAIN = "steersman.dev"
"""Of the `ErrorInfo` in a status; its reason is the name of the class."""


def from_grpc(error: grpc.RpcError, service: str) -> SteersmanError:
    """Turns a client-side gRPC error into the error of the tree, naming the service.

    A server of ours says which one it was, and when to try again; of any other the code decides.
    """
    code = error.code().name
    reason, retry_after, about = _rich(error)
    # Which field of the request is wrong, as the service said.
    named_field = {name: about[name] for name in ("param", "code") if about.get(name, "None") != "None"}
    message = f"{service}: {error.details() or code}"
    details = {"grpc_code": code, "service": service, **named_field}
    cls = _FROM_GRPC.get(code, InternalError)
    named = {known.__name__: known for known in all_error_types() if known.grpc_code == code}
    cls = named.get(reason, cls)
    if issubclass(cls, RateLimitedError):
        return cls(message, retry_after=1.0 if retry_after is None else retry_after, details=details)
    return cls(message, details=details)


def _rich(error: grpc.RpcError) -> tuple[str, float | None, dict[str, str]]:
    """Class name, seconds to wait and the error's own details out of the status's; empty where there are none."""
    from google.protobuf.message import DecodeError
    from google.rpc import error_details_pb2, status_pb2

    reason, seconds, about = "", None, dict[str, str]()
    metadata = getattr(error, "trailing_metadata", lambda: None)() or ()
    packed = next((value for key, value in metadata if key == "grpc-status-details-bin"), None)
    if packed is None:
        return reason, seconds, about
    try:
        status = status_pb2.Status.FromString(packed)
        for detail in status.details:
            info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
            if detail.Unpack(info) and info.domain == ERROR_DOMAIN:
                reason, about = info.reason, dict(info.metadata)
            elif detail.Unpack(retry):
                seconds = retry.retry_delay.ToTimedelta().total_seconds()
    except (DecodeError, ValueError):  # what another server put there
        return "", None, {}
    return reason, seconds, about


_FROM_HTTP: dict[int, type[SteersmanError]] = {
    400: InvalidArgumentError,
    401: UnauthenticatedError,
    403: PermissionDeniedError,
    404: NotFoundError,
    409: ConflictError,
    429: RateLimitedError,
    499: CancelledError,
    503: UnavailableError,
    504: DeadlineError,
    507: StorageError,
}


def from_http(status: int, message: str, *, retry_after: str | None = None) -> SteersmanError:
    """The error of the tree for an HTTP status: other 4xx are wrong requests, other 5xx internal errors."""
    cls = _FROM_HTTP.get(status, InvalidArgumentError if status < 500 else InternalError)
    if cls is RateLimitedError:
        seconds = float(retry_after) if retry_after and retry_after.replace(".", "", 1).isdigit() else 1.0
        return RateLimitedError(message, retry_after=seconds, details={"http_status": status})
    return cls(message, details={"http_status": status})


def all_error_types() -> list[type[SteersmanError]]:
    """Every class of the tree, for tests that walk the mappings."""
    found: list[type[SteersmanError]] = []
    queue: list[type[SteersmanError]] = [SteersmanError]
    while queue:
        cls = queue.pop()
        found.append(cls)
        queue.extend(cls.__subclasses__())
    return found


def why(error: BaseException) -> str:
    """The words of another's error for a sentence of ours: what a system call refused comes without its number."""
    return getattr(error, "strerror", None) or str(error)


def meant(given: str, known: Iterable[str]) -> str:
    """The end of a sentence about a name that is not known: `; did you mean 'grpo'?`, empty where none is near."""
    near = difflib.get_close_matches(given, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""
