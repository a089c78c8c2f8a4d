"""The one tree of errors: every class has its place in every mapping."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from steersman.errors import (
    InvalidArgumentError,
    NotFoundError,
    RateLimitedError,
    SteersmanError,
    StorageError,
    all_error_types,
    from_grpc,
    why,
)
from steersman.rpc.server import to_status


class FakeRpcError(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode, details: str, metadata: Any = ()) -> None:
        self._code, self._details, self._metadata = code, details, metadata

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> list[tuple[str, bytes]]:
        return list(self._metadata)


OWN = [cls for cls in all_error_types() if cls.__module__ == "steersman.errors"]
"""Without those that a service adds, which depend on what else was imported."""


@pytest.mark.parametrize("cls", OWN)
def test_every_error_maps_to_grpc_http_and_exit_code(cls: type[SteersmanError]) -> None:
    error = cls("field x: reason; mend", details={"field": "x"})
    status = to_status(error)
    assert status.code == grpc.StatusCode[cls.grpc_code]
    assert status.details == "field x: reason; mend"
    assert 400 <= cls.http_status < 600
    assert 0 < cls.exit_code < 256
    assert cls.openai_type


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_every_status_comes_back_as_an_error_of_the_tree(code: grpc.StatusCode) -> None:
    error = from_grpc(FakeRpcError(code, "reason"), "policy")
    assert isinstance(error, SteersmanError)
    assert str(error) == "policy: reason"


@pytest.mark.parametrize("cls", all_error_types())
def test_an_error_keeps_its_status_over_grpc(cls: type[SteersmanError]) -> None:
    sent = to_status(cls("reason"))
    assert from_grpc(FakeRpcError(sent.code, sent.details), "policy").grpc_code in (cls.grpc_code, "INTERNAL")
    if cls.grpc_code == "UNIMPLEMENTED":
        assert from_grpc(FakeRpcError(sent.code, sent.details), "policy").http_status == 400


@pytest.mark.parametrize("cls", OWN)
def test_an_error_of_ours_is_the_same_class_on_the_other_side(cls: type[SteersmanError]) -> None:
    """Also where two classes share a code."""
    sent = to_status(cls("reason"))
    back = from_grpc(FakeRpcError(sent.code, sent.details, sent.trailing_metadata), "policy")
    assert type(back) is cls
    assert str(back) == "policy: reason"


def test_a_busy_service_says_when_to_try_again() -> None:
    sent = to_status(RateLimitedError("too much", retry_after=12.5))
    back = from_grpc(FakeRpcError(sent.code, sent.details, sent.trailing_metadata), "policy")
    assert isinstance(back, RateLimitedError)
    assert back.retry_after == 12.5


def test_busy_full_and_oversized_are_three_codes() -> None:
    assert len({cls.grpc_code for cls in (RateLimitedError, StorageError, InvalidArgumentError)}) == 3


@pytest.mark.parametrize("packed", [b"", b"\xff\xff", b"\x12\x03abc"])
def test_details_that_another_server_wrote_do_no_harm(packed: bytes) -> None:
    error = FakeRpcError(grpc.StatusCode.NOT_FOUND, "gone", [("grpc-status-details-bin", packed)])
    assert type(from_grpc(error, "policy")) is NotFoundError


def test_what_a_system_call_refused_is_told_without_its_number() -> None:
    assert why(FileNotFoundError(2, "No such file or directory", "a")) == "No such file or directory"
    assert why(OSError("a pipe broke")) == "a pipe broke"
    assert why(ValueError("7 is not even")) == "7 is not even"
