"""Open Inference Protocol v2 over REST and gRPC: the gateway as a KServe custom predictor.

The SDK brings protocol, data plane and model registry; REST routes and gRPC servicer are mounted on the gateway's own
servers, because `ModelServer.start` knows no TLS for gRPC, no bind address and no drain of streams.

Input tensors (BYTES, one element a question): `text_input`, a user message, or `messages`, a conversation as JSON.
Parameters: max_tokens, temperature, top_p, seed, stop. Outputs: `text_output`, `answer_id`, `finish_reason` (BYTES) and
`weights_version` (INT64); `outputs` asks for some of them, and for binary ones. `generate` and `generate_stream` take
one `text_input` as plain JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from types import ModuleType
from typing import Annotated, Any

import grpc
import orjson
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import Response
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from services.gateway.answer import Answer, Question
from services.gateway.answering import Assistant
from services.gateway.auth.authenticator import Authenticator
from services.gateway.bodies import consent_of, fingerprint_of, json_response, read_body, request_id_of
from services.gateway.documentation import json_body
from services.gateway.errors import BadRequestError, from_validation
from services.gateway.openai.schema import ChatMessage, Wire, few_entries
from services.gateway.openai.stream import EventStream, event, until_disconnect
from services.gateway.openai.translate import to_message
from services.gateway.refusals import Refusals, noted
from steersman import __version__
from steersman.errors import FailedPreconditionError, NotFoundError, SteersmanError, UnavailableError
from steersman.rpc.finish import openai_finish_name
from steersman.v1 import common_pb2
from steersman.v1.policy_pb2 import PolicyServiceChatRequest

# The SDK parses sys.argv when it is imported and would take our `--config` for its `--configure_logging`.
_argv, sys.argv = sys.argv, [sys.argv[0], "--configure_logging", "false"]
# It imports a client of Kubernetes, which would import a validator of manifests, and that for seconds a parser of URLs;
# and pandas with pyarrow, for tables that nobody asks for here.
_tables = ModuleType("pandas")
vars(_tables)["DataFrame"] = type("DataFrame", (), {})
_hidden = {
    name: module for name, module in {"kubernetes_validate": None, "pandas": _tables}.items() if name not in sys.modules
}
for _name, _module in _hidden.items():
    sys.modules[_name] = _module  # type: ignore[assignment]
try:
    import kserve
    from kserve import errors as kserve_errors
    from kserve.protocol.dataplane import DataPlane
    from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import add_GRPCInferenceServiceServicer_to_server
    from kserve.protocol.grpc.servicer import InferenceServicer
    from kserve.protocol.infer_type import InferInput, InferOutput, InferRequest, InferResponse, RequestedOutput
    from kserve.protocol.model_repository_extension import ModelRepositoryExtension
    from kserve.protocol.rest.v2_endpoints import register_v2_endpoints
finally:
    sys.argv = _argv
    for _name in _hidden:
        del sys.modules[_name]

SERVICE_NAME = "inference.GRPCInferenceService"
_MOST_QUESTIONS = 64
_CONVERSATION: TypeAdapter[list[ChatMessage]] = TypeAdapter(list[ChatMessage])
_OUTPUTS = {"text_output": "BYTES", "answer_id": "BYTES", "finish_reason": "BYTES", "weights_version": "INT64"}
_PARAMETERS = {"max_tokens": int, "temperature": float, "top_p": float, "seed": int}
# Set by KServe's clients; they concern the encoding, not the answer.
_IGNORED_PARAMETERS = {"binary_data_output", "content_type", "headers"}


class AssistantModel(kserve.Model):
    """The assistant as a KServe model."""

    def __init__(self, name: str, assistant: Assistant, auth: Authenticator) -> None:
        super().__init__(name)
        self._assistant = assistant
        self._auth = auth
        self.ready = True

    async def healthy(self) -> bool:
        return self._assistant.ready and self._assistant.models.can_answer(self.name)

    def get_input_types(self) -> list[dict[str, Any]]:
        return [
            {"name": "text_input", "datatype": "BYTES", "shape": [-1]},
            {"name": "messages", "datatype": "BYTES", "shape": [-1]},
        ]

    def get_output_types(self) -> list[dict[str, Any]]:
        return [{"name": name, "datatype": datatype, "shape": [-1]} for name, datatype in _OUTPUTS.items()]

    async def predict(
        self,
        payload: InferRequest,
        headers: Mapping[str, str] | None = None,
        response_headers: dict[str, str] | None = None,
    ) -> InferResponse:
        headers = {name.lower(): value for name, value in (headers or {}).items()}
        caller = await self._auth.caller(headers)
        sampling, stop = _sampling(payload.parameters or {}), _stop(payload.parameters or {})
        for output in payload.request_outputs or ():
            if output.name not in _OUTPUTS:
                known = ", ".join(_OUTPUTS)
                raise BadRequestError(f"outputs: there is no '{output.name[:64]}'; use {known}", param="outputs")
        request_id = request_id_of(headers)
        questions = [
            Question(
                caller,
                request_id,
                PolicyServiceChatRequest(messages=messages, sampling=sampling, stop=stop, n=1, whole=True),
                model=self.name,
                id_prefix="infer-",
                consent=consent_of(headers),
            )
            for messages in _conversations(payload.inputs)
        ]
        # A failed question cancels the others.
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._ask(question)) for question in questions]
        return _response(payload, self.name, [task.result() for task in tasks])

    async def _ask(self, question: Question) -> Answer:
        answer = await self._assistant.answer(question)
        await answer.read()
        return answer


def _conversations(inputs: Sequence[InferInput]) -> list[list[common_pb2.Message]]:
    if len(inputs) != 1 or inputs[0].name not in ("text_input", "messages"):
        raise BadRequestError("Send one input tensor, 'text_input' or 'messages'", param="inputs")
    tensor = inputs[0]
    if tensor.datatype != "BYTES":
        raise BadRequestError(f"inputs.{tensor.name} must have the datatype BYTES", param="inputs")
    elements = _elements(tensor)
    if not 1 <= len(elements) <= _MOST_QUESTIONS:
        raise BadRequestError(f"inputs.{tensor.name} must hold 1 to {_MOST_QUESTIONS} elements", param="inputs")
    if tensor.name == "text_input":
        return [[common_pb2.Message(role="user", content=text)] for text in elements]
    try:
        parsed = [_CONVERSATION.validate_json(text) for text in elements]
    except ValidationError as error:
        raise from_validation(error) from None
    return [[to_message(message) for message in conversation] for conversation in parsed]


def _elements(tensor: InferInput) -> list[str]:
    try:
        values = tensor.as_numpy().reshape(-1).tolist()
        texts = [value.decode() if isinstance(value, bytes) else value for value in values]
    except UnicodeDecodeError:
        raise BadRequestError(f"inputs.{tensor.name} must be UTF-8", param="inputs") from None
    except Exception:
        raise BadRequestError(f"inputs.{tensor.name}: shape and data do not fit", param="inputs") from None
    if not all(isinstance(text, str) for text in texts):
        raise BadRequestError(f"inputs.{tensor.name} must hold texts", param="inputs")
    return texts


def _sampling(parameters: Mapping[str, Any]) -> common_pb2.SamplingParams:
    values: dict[str, Any] = {}
    for name, raw in parameters.items():
        value = _plain(raw)
        if name in _IGNORED_PARAMETERS or name == "stop":
            continue
        if name not in _PARAMETERS:
            known = ", ".join((*_PARAMETERS, "stop"))
            raise BadRequestError(f"parameters.{name} is not known; use {known}", param=f"parameters.{name}")
        try:
            # Over gRPC the SDK's clients can send a fraction only as text.
            number = float(value) if isinstance(value, str) else value
            whole = int(number)
        except (ValueError, TypeError, OverflowError):
            raise BadRequestError(f"parameters.{name} must be a number", param=f"parameters.{name}") from None
        if isinstance(value, bool) or (_PARAMETERS[name] is int and number != whole):
            raise BadRequestError(f"parameters.{name} must be a number", param=f"parameters.{name}")
        values[name] = whole if _PARAMETERS[name] is int else float(number)
    max_tokens, temperature, top_p = values.get("max_tokens", 0), values.get("temperature"), values.get("top_p")
    if not 0 <= max_tokens < 2**31 or not 0 <= (temperature or 0) <= 2 or not 0 < (1 if top_p is None else top_p) <= 1:
        raise BadRequestError("parameters: max_tokens, temperature (0 to 2) or top_p (0 to 1) is out of range")
    seed = values.get("seed", secrets.randbits(64)) % 2**64
    return common_pb2.SamplingParams(max_new_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)


def _stop(parameters: Mapping[str, Any]) -> list[str]:
    """Texts that end an answer: one, or several as a list, or as JSON where parameters know no lists (infer, gRPC)."""
    value = _plain(parameters.get("stop", []))
    if isinstance(value, str) and value.startswith("["):
        with contextlib.suppress(ValueError):
            value = orjson.loads(value)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadRequestError("parameters.stop must be a text or a list of texts", param="parameters.stop")
    return texts


def _plain(value: Any) -> Any:
    """The value of a gRPC parameter, or a REST parameter as it is."""
    return getattr(value, value.WhichOneof("parameter_choice") or "") if hasattr(value, "WhichOneof") else value


def _response(request: InferRequest, model: str, answers: Sequence[Answer]) -> InferResponse:
    columns: dict[str, list[str]] = {
        "text_output": [answer.choices[0].text for answer in answers],
        "answer_id": [answer.id for answer in answers],
        "finish_reason": [openai_finish_name(answer.choices[0].finish_reason) or "stop" for answer in answers],
    }
    shape = [len(answers)]
    # The SDK takes bytes for gRPC and text for JSON.
    outputs = [
        InferOutput(name, shape, "BYTES", [v.encode() for v in values] if request.from_grpc else values)
        for name, values in columns.items()
    ]
    outputs.append(InferOutput("weights_version", shape, "INT64", [answer.weights_version for answer in answers]))
    wanted = list(request.request_outputs or [])
    if request.from_grpc and wanted:  # there the SDK gives all of them
        outputs = [output for asked in wanted for output in outputs if output.name == asked.name]
    return InferResponse(
        request.id or answers[0].id,
        model,
        outputs,
        use_binary_outputs=request.use_binary_outputs,
        requested_outputs=[_binary(each, request) for each in wanted] or None,
    )


def _binary(asked: RequestedOutput, request: InferRequest) -> RequestedOutput:
    """A requested output that says itself whether it is binary, as the request does for all where it does not."""
    if asked.binary_data is None:
        return RequestedOutput(asked.name, {"binary_data": request.use_binary_outputs})
    return asked


class _DataPlane(DataPlane):
    """Says what this server is, and turns the SDK's slips on malformed input into errors of the tree."""

    def __init__(self, model_registry: kserve.ModelRepository, assistant: Assistant) -> None:
        super().__init__(model_registry=model_registry)
        self._assistant = assistant

    def metadata(self) -> dict[str, Any]:
        return {"name": "steersman", "version": __version__, "extensions": ["binary_tensor_data", "generate"]}

    async def ready(self) -> bool:
        return self._assistant.ready

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().decode(*args, **kwargs)
        except Exception as error:
            raise BadRequestError(f"The inference request cannot be read: {error}") from None

    async def infer(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super().infer(*args, **kwargs)
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None


class _Repository(ModelRepositoryExtension):
    """Weights come through the weights service; nobody loads or unloads the model here."""

    async def load(self, model_name: str) -> None:
        raise FailedPreconditionError("Models are not loaded here; the weights service of the policy does that")

    async def unload(self, model_name: str) -> None:
        raise FailedPreconditionError("Models are not unloaded here; stop the gateway or the policy service instead")


class _Servicer(InferenceServicer):
    """The SDK's servicer with errors of the tree; refusals leave audit lines."""

    def __init__(self, data_plane: DataPlane, repository: ModelRepositoryExtension, refusals: Refusals) -> None:
        super().__init__(data_plane, repository)
        self._refusals = refusals

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        with noted(self._refusals, context, f"{SERVICE_NAME}/ModelInfer"):
            return await _translated(self._infer(request, context))

    async def _infer(self, request: Any, context: Any) -> Any:
        if not await self._data_plane.model_ready(request.model_name):
            raise UnavailableError(f"The model {request.model_name} cannot answer at the moment")
        return await super().ModelInfer(request, context)

    async def ModelReady(self, request: Any, context: Any) -> Any:
        with noted(self._refusals, context, f"{SERVICE_NAME}/ModelReady"):
            return await _translated(super().ModelReady(request, context))

    async def ModelMetadata(self, request: Any, context: Any) -> Any:
        with noted(self._refusals, context, f"{SERVICE_NAME}/ModelMetadata"):
            return await _translated(super().ModelMetadata(request, context))


async def _translated(call: Any) -> Any:
    try:
        return await call
    except (SteersmanError, grpc.aio.AbortError):
        raise
    except kserve_errors.ModelNotFound as error:
        raise NotFoundError(error.reason) from None
    except (kserve_errors.InvalidInput, ValueError, TypeError, IndexError) as error:
        raise BadRequestError(f"The inference request cannot be read: {error}") from None


class GenerateBody(Wire):
    """One question of the protocol's generate extension."""

    text_input: Annotated[str, Field(min_length=1, max_length=10_000_000)]
    """What the user says."""
    parameters: Annotated[dict[str, Any], BeforeValidator(few_entries)] | None = None
    """max_tokens, temperature, top_p, seed, stop."""
    id: Annotated[str, Field(max_length=128)] | None = None


def generate_router(assistant: Assistant, auth: Authenticator) -> APIRouter:
    """`generate` and `generate_stream` of every model."""
    router = APIRouter(prefix="/v2/models/{model_name}", tags=["V2"])
    documented: dict[str, Any] = {
        "openapi_extra": json_body(GenerateBody),
        "responses": {200: {"description": "The answer.", "content": {"application/json": {}}}},
    }

    async def asked(request: Request, model_name: str, *, whole: bool) -> tuple[Answer, GenerateBody]:
        headers = {name.lower(): value for name, value in request.headers.items()}
        caller = await auth.caller(headers)
        body = await read_body(request, GenerateBody)
        parameters = body.parameters or {}
        ask = PolicyServiceChatRequest(
            messages=[common_pb2.Message(role="user", content=body.text_input)],
            sampling=_sampling(parameters),
            stop=_stop(parameters),
            n=1,
            whole=whole,
        )
        question = Question(
            caller,
            request.state.request_id,
            ask,
            model=model_name,
            id_prefix="infer-",
            idempotency_key=headers.get("idempotency-key", ""),
            fingerprint=fingerprint_of(body),
            consent=consent_of(headers),
        )
        return await until_disconnect(request.receive, assistant.answer(question)), body

    def part(answer: Answer, body: GenerateBody, text: str, finish: str | None) -> dict[str, Any]:
        said: dict[str, Any] = {"id": body.id or answer.id, "model_name": answer.model, "text_output": text}
        if finish is not None:
            version = answer.weights_version
            said["details"] = {"finish_reason": finish, "answer_id": answer.id, "weights_version": version}
        return said

    async def events(answer: Answer, body: GenerateBody) -> AsyncGenerator[bytes, None]:
        try:
            async with contextlib.aclosing(aiter(answer)) as responses:
                async for response in responses:
                    finish = openai_finish_name(response.finish_reason)
                    if response.delta or finish:
                        yield event(part(answer, body, response.delta, finish))
        except SteersmanError as error:
            yield event({"error": error.message})

    @router.post("/generate", summary="Answer a text", **documented)
    async def generate(request: Request, model_name: str) -> Response:
        answer, body = await asked(request, model_name, whole=True)
        try:
            await until_disconnect(request.receive, answer.read())
        finally:  # also where the client went before it was begun to be read
            await answer.close()
        choice = answer.choices[0]
        return json_response(part(answer, body, choice.text, openai_finish_name(choice.finish_reason) or "stop"))

    streamed = {**documented, "responses": {200: {"description": "Its parts.", "content": {"text/event-stream": {}}}}}

    @router.post("/generate_stream", summary="Answer a text as it comes", **streamed)
    async def generate_stream(request: Request, model_name: str) -> Response:
        answer, body = await asked(request, model_name, whole=False)
        return EventStream(events(answer, body), answer.close)

    return router


class OipServer(kserve.ModelServer):
    """KServe's model server with the assistant as its model; the gateway brings the listeners."""

    def __init__(self, assistant: Assistant, auth: Authenticator, refusals: Refusals) -> None:
        self._refusals = refusals
        super().__init__(registered_models=kserve.ModelRepository(), enable_latency_logging=False)
        self.dataplane = _DataPlane(self.registered_models, assistant)
        self.model_repository_extension = _Repository(self.registered_models)
        self._generate = generate_router(assistant, auth)
        for name in assistant.models.names:
            self.register_model(AssistantModel(name, assistant, auth))

    def mount(self, app: FastAPI) -> None:
        """Adds the REST routes under /v2."""
        app.include_router(self._generate)
        register_v2_endpoints(app, self.dataplane, self.model_repository_extension)
        failures = {
            kserve_errors.ModelNotFound: 404,
            kserve_errors.ModelNotReady: 503,
            kserve_errors.ServerNotReady: 503,
            kserve_errors.InvalidInput: 400,
            NotImplementedError: 404,
        }
        for cls, status in failures.items():
            app.add_exception_handler(cls, _failure(status))

    def service(self) -> tuple[Any, Any, str]:
        """For `steersman.rpc.server.Server`."""
        servicer = _Servicer(self.dataplane, self.model_repository_extension, self._refusals)
        return add_GRPCInferenceServiceServicer_to_server, servicer, SERVICE_NAME


def _failure(status: int) -> Any:
    async def handler(request: Any, error: Exception) -> Any:
        return json_response({"error": str(error)}, status)

    return handler
