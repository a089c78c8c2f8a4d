"""The one tree of errors: every class has its place in every mapping."""

from __future__ import annotations

import grpc
import pytest

from steersman.errors import SteersmanError, all_error_types, from_grpc
from steersman.rpc.server import to_status


class FakeRpcError(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        self._code, self._details = code, details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details


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
