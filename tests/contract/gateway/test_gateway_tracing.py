"""Traces after OpenTelemetry's GenAI conventions: off by default, over real OTLP when switched on."""

from __future__ import annotations

import gzip
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from services.gateway.config import Telemetry
from services.gateway.server import Gateway
from services.gateway.testing import gateway_config, running_gateway, serve_app
from services.gateway.tracing import Tracer
from steersman.testing.fake_policy import FakePolicy, serve_policy
from steersman.v1 import common_pb2, policy_pb2

pytest.importorskip("opentelemetry.sdk", reason="OpenTelemetry is not installed (extra `tracing`)")
CHAT = "/v1/chat/completions"
SECRET = "my number is 12345"
BODY: dict[str, Any] = {"model": "steersman", "messages": [{"role": "user", "content": SECRET}], "max_tokens": 9}
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


async def test_a_span_for_every_answer(gateway: Gateway, policy: FakePolicy) -> None:
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    from opentelemetry.trace import SpanKind, StatusCode

    exporter = InMemorySpanExporter()
    gateway.assistant.tracer = Tracer(Telemetry(), exporter)
    policy.weights_version = 7
    async with httpx.AsyncClient(base_url=gateway.url) as http:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "r-1"}
        answer = (await http.post(CHAT, json={**BODY, "conversation_id": "c-1"}, headers=headers)).json()
        policy.fail_after_tokens = 1
        await http.post(CHAT, json={**BODY, "stream": True})
    gateway.assistant.tracer.close()
    good, broken = exporter.get_finished_spans()
    assert (good.name, good.kind) == ("chat steersman", SpanKind.SERVER)
    assert good.context is not None
    assert good.parent is not None
    assert f"{good.context.trace_id:032x}" == TRACE
    assert f"{good.parent.span_id:016x}" == PARENT
    wanted = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "steersman",
        "gen_ai.request.model": "steersman",
        "gen_ai.request.max_tokens": 9,
        "gen_ai.conversation.id": "c-1",
        "gen_ai.response.id": answer["id"],
        "gen_ai.response.model": "steersman@7",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 4,
        "gen_ai.usage.output_tokens": 6,
        "steersman.request_id": "r-1",
    }
    assert good.attributes is not None
    assert {name: good.attributes.get(name) for name in wanted} == wanted
    assert (broken.status.status_code, (broken.attributes or {})["error.type"]) == (
        StatusCode.ERROR,
        "UnavailableError",
    )
    assert "12345" not in "".join(span.to_json() for span in (good, broken))


@pytest.mark.parametrize(
    ("mode", "called", "tool", "call_id"),
    [
        ("lookup", "", "lookup", None),
        ("tools", "check_stock", "check_stock", "call-1"),
        ("tools", "made up of P-12345", "unknown", "call-1"),
    ],
)
async def test_a_span_below_it_for_every_look_into_a_business_system(
    mode: str, called: str, tool: str, call_id: str | None
) -> None:
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    async def products(request: Request) -> Response:
        return JSONResponse({"value": [{"code": "P-12345", "quantity": 3}]})

    def reply(request: policy_pb2.PolicyServiceChatRequest) -> Any:
        told = [message.content for message in request.messages if message.role in ("tool", "system")]
        if told or mode == "lookup":
            return " ".join(told)
        return [common_pb2.ToolCall(id="call-1", name=called, arguments='{"product": "P-12345"}')]

    policy, exporter = FakePolicy(), InMemorySpanExporter()
    policy.reply = reply
    stock = {"entity": "products", "number": "code", "owner": None, "fields": {"code": "code", "available": "quantity"}}
    async with (
        serve_app(Starlette(routes=[Route("/products", products)])) as url,
        serve_policy(policy) as endpoint,
        running_gateway(
            gateway_config(
                endpoint,
                tools={
                    "mode": mode,
                    "systems": [{"name": "sap", "type": "odata", "url": url, "kinds": {"stock": stock}}],
                },
            )
        ) as gateway,
        httpx.AsyncClient(base_url=gateway.url) as http,
    ):
        gateway.assistant.tracer = Tracer(Telemetry(), exporter)
        body = {"model": "steersman", "messages": [{"role": "user", "content": "Is P-12345 in stock?"}]}
        answer = (await http.post(CHAT, json=body)).json()
        gateway.assistant.tracer.close()
    found = '"available": 3' in answer["choices"][0]["message"]["content"]
    assert found == (tool != "unknown")
    child, whole = exporter.get_finished_spans()
    assert child.parent is not None
    assert whole.context is not None
    assert (child.name, child.parent.span_id) == (f"execute_tool {tool}", whole.context.span_id)
    attributes = dict(child.attributes or {})
    assert (attributes["gen_ai.operation.name"], attributes["gen_ai.tool.name"]) == ("execute_tool", tool)
    assert attributes.get("gen_ai.tool.call.id") == call_id
    assert "12345" not in child.to_json()


async def test_spans_arrive_at_a_collector_only_when_switched_on() -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the OTLP exporter is not installed")
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    received: list[Any] = []

    async def collect(request: Request) -> Response:
        body = await request.body()
        if request.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        received.append(ExportTraceServiceRequest.FromString(body))
        return Response(b"", media_type="application/x-protobuf")

    collector = Starlette(routes=[Route("/v1/traces", collect, methods=["POST"])])
    async with serve_app(collector) as url, serve_policy(FakePolicy()) as endpoint:
        for telemetry in ({}, {"otlpEndpoint": f"{url}/v1/traces"}):
            async with (
                running_gateway(gateway_config(endpoint, telemetry=telemetry)) as gateway,
                httpx.AsyncClient(base_url=gateway.url) as http,
            ):
                assert (await http.post(CHAT, json=BODY)).status_code == 200
            assert bool(received) == bool(telemetry)
    (resource,) = received[0].resource_spans
    assert {a.key: a.value.string_value for a in resource.resource.attributes}["service.name"] == "steersman-gateway"
    assert resource.scope_spans[0].spans[0].name == "chat steersman"
