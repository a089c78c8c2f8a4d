"""OpenTelemetry traces after the GenAI semantic conventions, behind a switch.

https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/ . Texts are never recorded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from services.gateway.answer import Answer, Trace
from services.gateway.config import Telemetry
from steersman import __version__
from steersman.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span
    from opentelemetry.trace import Tracer as OtelTracer


class SpanTrace(Trace):
    """The span of one answer, with a child for each tool call."""

    def __init__(self, tracer: OtelTracer, span: Span) -> None:
        self._tracer = tracer
        self._span = span

    @contextmanager
    def tool(self, name: str, call_id: str = "") -> Iterator[None]:
        """A span around one tool call or lookup; arguments and results are texts and stay out of it."""
        from opentelemetry.trace import SpanKind, set_span_in_context

        attributes = {"gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": name, "gen_ai.tool.type": "function"}
        if call_id:
            attributes["gen_ai.tool.call.id"] = call_id
        span = self._tracer.start_span(
            f"execute_tool {name}",
            context=set_span_in_context(self._span),
            kind=SpanKind.INTERNAL,
            attributes=attributes,
        )
        try:
            yield
        except BaseException as error:
            _fail(span, error)
            raise
        finally:
            span.end()

    def end(self, answer: Answer, outcome: str, error: BaseException | None) -> None:
        self._span.set_attributes(
            {
                "gen_ai.response.id": answer.id,
                "gen_ai.response.model": f"{answer.model}@{answer.weights_version}",
                "gen_ai.response.finish_reasons": [outcome],
                "gen_ai.usage.input_tokens": answer.prompt_tokens,
                "gen_ai.usage.output_tokens": answer.completion_tokens,
                "steersman.first_token_seconds": answer.first_token_seconds,
                "steersman.sources": [f"{source.system}:{source.record}" for source in answer.sources],
            }
        )
        if error is not None:
            _fail(self._span, error)
        self._span.end()


def _fail(span: Span, error: BaseException) -> None:
    from opentelemetry.trace import Status, StatusCode

    span.set_attribute("error.type", type(error).__name__)
    span.set_status(Status(StatusCode.ERROR))


class Tracer:
    """Makes the trace of each answer; does nothing while the switch is off."""

    def __init__(self, config: Telemetry, exporter: SpanExporter | None = None) -> None:
        self._tracer: OtelTracer | None = None
        self._provider: TracerProvider | None = None
        if config.otlp_endpoint is None and exporter is None:
            return
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor

            if exporter is None:
                from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

                exporter = OTLPSpanExporter(endpoint=config.otlp_endpoint)
        except ImportError as error:
            raise ConfigError(f"telemetry.otlpEndpoint needs a package that is not installed: {error.name}") from None
        resource = Resource.create({"service.name": "steersman-gateway", "service.version": __version__})
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("steersman.gateway", __version__)

    def start(self, answer: Answer, model: str) -> Trace:
        """A trace that begins now, below the caller's `traceparent`."""
        if self._tracer is None:
            return Trace()
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        request = answer.question.request
        attributes = {
            "gen_ai.operation.name": "text_completion" if request.prompt or request.prompt_token_ids else "chat",
            "gen_ai.provider.name": "steersman",
            "gen_ai.request.model": model,
            "gen_ai.request.max_tokens": request.sampling.max_new_tokens,
            "gen_ai.request.temperature": request.sampling.temperature,
            "gen_ai.request.choice.count": max(request.n, 1),
            "steersman.tenant": answer.question.caller.tenant,
            "steersman.request_id": answer.question.request_id,
        }
        if answer.question.conversation_id:
            attributes["gen_ai.conversation.id"] = answer.question.conversation_id
        context = TraceContextTextMapPropagator().extract({"traceparent": answer.question.traceparent})
        name = f"{attributes['gen_ai.operation.name']} {model}"
        span = self._tracer.start_span(name, context=context, kind=SpanKind.SERVER, attributes=attributes)
        return SpanTrace(self._tracer, span)

    def close(self) -> None:
        if self._provider is not None:
            self._provider.shutdown()
