"""KServe's own clients, the native gRPC service, health, reflection, TLS."""

from __future__ import annotations

import asyncio
import datetime as dt
import ipaddress
import json
import ssl
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest
from kserve.inference_client import RESTConfig
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub
from kserve.protocol.infer_type import RequestedOutput

from services.gateway.auth.keys import create_key
from services.gateway.server import Gateway
from services.gateway.store import open_store
from services.gateway.testing import gateway_config, running_gateway, until
from steersman.testing.fake_policy import FakePolicy, serve_policy
from steersman.v1 import chat_pb2, chat_pb2_grpc, common_pb2

HELLO = common_pb2.Message(role="user", content="hello there")


def question(*texts: str, name: str = "text_input", **parameters: object) -> InferRequest:
    tensor = InferInput(name, [len(texts)], "BYTES")
    tensor.set_data_from_numpy(np.array([text.encode() for text in texts], dtype=object), binary_data=False)
    return InferRequest("steersman", [tensor], request_id="q-1", parameters=parameters or None)


# --- Open Inference Protocol ------------------------------------------------------------------------------------


async def test_kserve_rest_client(gateway: Gateway) -> None:
    client = InferenceRESTClient(RESTConfig(protocol="v2"))
    assert await client.is_server_live(gateway.url)
    assert await client.is_server_ready(gateway.url)
    assert await client.is_model_ready(gateway.url, "steersman")
    response = await client.infer(gateway.url, question("hello there", "bye", max_tokens=3), model_name="steersman")
    outputs = {output.name: output.as_numpy().tolist() for output in response.outputs}
    assert response.id == "q-1"
    assert outputs["text_output"] == ["You said: hello", "You said: bye"]
    assert outputs["finish_reason"] == ["length", "stop"]
    assert outputs["weights_version"] == [1, 1]
    await client.close()


async def test_kserve_grpc_client(gateway: Gateway) -> None:
    client = InferenceGRPCClient(f"127.0.0.1:{gateway.grpc_port}")
    assert await client.is_server_live()
    assert await client.is_server_ready()
    assert await client.is_model_ready("steersman")
    conversation = json.dumps([{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}])
    response = await client.infer(question(conversation, name="messages", temperature="0.5", seed=3))
    assert response.outputs[0].as_numpy().tolist() == [b"You said: hi"]
    for broken in (
        question("x", name="pixels"),
        question("not json", name="messages"),
        question("x", teleport=1),
        question("x", seed="one"),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            await client.infer(broken)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    await client.close()


async def test_oip_stop_some_outputs_and_binary_ones(gateway: Gateway) -> None:
    rest, over_grpc = InferenceRESTClient(RESTConfig(protocol="v2")), f"127.0.0.1:{gateway.grpc_port}"
    asked = question("hello there", stop=" there", binary_data_output=True)
    everything = await rest.infer(gateway.url, asked, model_name="steersman")
    assert everything.get_output_by_name("text_output").as_numpy().tolist() == ["You said: hello"]
    assert len(everything.outputs) == 4
    body = {
        "inputs": [{"name": "text_input", "shape": [1], "datatype": "BYTES", "data": ["hi"]}],
        "outputs": [{"name": "text_output", "parameters": {"binary_data": True}}, {"name": "weights_version"}],
    }
    async with httpx.AsyncClient(base_url=gateway.url) as http:
        answer = await http.post("/v2/models/steersman/infer", json=body)
        length = int(answer.headers["inference-header-content-length"])
        head, raw = json.loads(answer.content[:length]), answer.content[length:]
        assert [output["name"] for output in head["outputs"]] == ["text_output", "weights_version"]
        assert head["outputs"][0]["parameters"]["binary_data_size"] == len(raw)
        assert raw == (12).to_bytes(4, "little") + b"You said: hi"
        assert head["outputs"][1]["data"] == [1]
        unknown = await http.post("/v2/models/steersman/infer", json={**body, "outputs": [{"name": "x"}]})
        assert unknown.status_code == 400
        assert "outputs: there is no 'x'" in unknown.json()["error"]
        for wrong in ({"stop": 5}, {"stop": [1]}, {"stop": "x" * 300}):
            refused = await http.post("/v2/models/steersman/infer", json={**body, "parameters": wrong})
            assert refused.status_code == 400, wrong

    client = InferenceGRPCClient(over_grpc)
    tensor = InferInput("text_input", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([b"hello there"], dtype=object), binary_data=True)
    outputs = [RequestedOutput("text_output"), RequestedOutput("weights_version")]
    raw_request = InferRequest("steersman", [tensor], request_outputs=outputs, parameters={"stop": '[" there"]'})
    found = await client.infer(raw_request)
    assert [output.name for output in found.outputs] == ["text_output", "weights_version"]
    assert found.outputs[0].as_numpy().tolist() == [b"You said: hello"]
    assert found.outputs[1].as_numpy().tolist() == [1]
    async with grpc.aio.insecure_channel(over_grpc) as channel:
        raw = await GRPCInferenceServiceStub(channel).ModelInfer(raw_request.to_grpc())
        assert raw.raw_output_contents[0] == (15).to_bytes(4, "little") + b"You said: hello"
        assert not raw.outputs[0].HasField("contents")
    await client.close()


async def test_oip_generate(gateway: Gateway, policy: FakePolicy) -> None:
    base = "/v2/models/steersman"
    async with httpx.AsyncClient(base_url=gateway.url) as http:
        body = {"text_input": "hello there", "parameters": {"max_tokens": 3, "stop": ["zz"]}, "id": "q"}
        said = (await http.post(f"{base}/generate", json=body)).json()
        assert (said["id"], said["model_name"], said["text_output"]) == ("q", "steersman", "You said: hello")
        assert said["details"]["finish_reason"] == "length"
        streamed = await http.post(f"{base}/generate_stream", json=body)
        assert streamed.headers["content-type"].startswith("text/event-stream")
        parts = [json.loads(block.removeprefix("data: ")) for block in streamed.text.strip().split("\n\n")]
        assert "".join(part["text_output"] for part in parts) == "You said: hello"
        assert [("details" in part) for part in parts] == [False] * (len(parts) - 1) + [True]
        for change, status in (
            ({"text_input": ""}, 400),
            ({"text_input": 5}, 400),
            ({"parameters": {"teleport": 1}}, 400),
            ({"pixels": 1}, 400),
        ):
            refused = await http.post(f"{base}/generate", json={**body, **change})
            assert refused.status_code == status, change
            assert isinstance(refused.json()["error"], str)
        assert (await http.post("/v2/models/other/generate", json=body)).status_code == 404
        policy.fail_after_tokens = 1
        broken = (await http.post(f"{base}/generate_stream", json=body)).text
        assert "error" in json.loads(broken.strip().split("\n\n")[-1].removeprefix("data: "))


async def test_oip_metadata_and_refusals(gateway: Gateway) -> None:
    async with httpx.AsyncClient(base_url=gateway.url) as http:
        assert (await http.get("/v2")).json()["name"] == "steersman"
        assert (await http.get("/v2/models")).json() == {"models": ["steersman"]}
        metadata = (await http.get("/v2/models/steersman")).json()
        assert [tensor["name"] for tensor in metadata["inputs"]] == ["text_input", "messages"]
        missing = await http.get("/v2/models/other")
        assert (missing.status_code, missing.json()) == (404, {"error": "Model with name other does not exist."})
        tensor = {"name": "text_input", "shape": [1], "datatype": "BYTES", "data": ["hi"]}
        for change, status in (
            ({}, 200),
            ({"datatype": "FP32", "data": [1.0]}, 400),
            ({"data": []}, 400),
            ({"name": "x"}, 400),
            ({"shape": [7]}, 400),
        ):
            answer = await http.post("/v2/models/steersman/infer", json={"inputs": [{**tensor, **change}]})
            assert answer.status_code == status, (change, answer.text)
        assert (await http.post("/v2/models/steersman/infer", content=b"\xff\x00")).status_code == 400
        assert (await http.post("/v2/repository/models/steersman/unload")).status_code == 409


async def test_oip_needs_a_key_and_a_ready_replica(policy: FakePolicy, tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path}/g.db"
    key = create_key(open_store(database), "acme", ["chat"])
    body = {"inputs": [{"name": "text_input", "shape": [1], "datatype": "BYTES", "data": ["hi"]}]}
    async with serve_policy(policy) as endpoint:
        gateway = Gateway(gateway_config(endpoint, database=database, requireApiKey=True))
        await gateway.start()
        async with httpx.AsyncClient(base_url=gateway.url) as http:
            assert (await http.post("/v2/models/steersman/infer", json=body)).status_code == 401
            headers = {"authorization": f"Bearer {key}"}
            assert (await http.post("/v2/models/steersman/infer", json=body, headers=headers)).status_code == 200
    async with httpx.AsyncClient(base_url=gateway.url) as http:
        await until(lambda: not gateway.assistant.ready)
        assert (await http.get("/v2/health/ready")).status_code == 503
        assert (await http.get("/v2/models/steersman/ready")).status_code == 503
        assert (await http.post("/v2/models/steersman/infer", json=body, headers=headers)).status_code == 503
    await gateway.drain()


# --- native gRPC ------------------------------------------------------------------------------------------------


async def test_native_chat_streams_and_takes_feedback(gateway: Gateway) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{gateway.grpc_port}") as channel:
        stub = chat_pb2_grpc.ChatServiceStub(channel)
        parts = [part async for part in stub.Chat(chat_pb2.ChatRequest(messages=[HELLO]))]
        assert "".join(part.delta for part in parts) == "You said: hello there"
        assert len(parts) == 5
        assert (parts[-1].finish_reason, parts[-1].completion_tokens) == (common_pb2.FINISH_REASON_STOP, 4)
        event = chat_pb2.SubmitFeedbackRequest(event_id="e", answer_id=parts[0].answer_id, thumbs_up=True)
        assert (await stub.SubmitFeedback(event)).created
        assert not (await stub.SubmitFeedback(event)).created
        event.event_id, event.answer_id = "e2", "nothing"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.SubmitFeedback(event)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        wrong = chat_pb2.ChatRequest(messages=[common_pb2.Message(role="pirate", content="arr")])
        with pytest.raises(grpc.aio.AioRpcError, match="pirate"):
            await stub.Chat(wrong).read()


async def test_cancelling_a_native_call_stops_the_generation(gateway: Gateway, policy: FakePolicy) -> None:
    policy.seconds_per_token = 0.05
    policy.reply = lambda request: "word " * 1000
    async with grpc.aio.insecure_channel(f"127.0.0.1:{gateway.grpc_port}") as channel:
        call = chat_pb2_grpc.ChatServiceStub(channel).Chat(chat_pb2.ChatRequest(messages=[HELLO]))
        await call.read()
        call.cancel()
        await until(lambda: policy.running == 0)
        assert policy.cancelled == 1


async def test_health_follows_readiness_and_services_are_listed(policy: FakePolicy) -> None:
    async with serve_policy(policy) as endpoint:
        gateway = Gateway(gateway_config(endpoint))
        await gateway.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{gateway.grpc_port}") as channel:
            reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
            requests = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
            listed = [answer async for answer in reflection.ServerReflectionInfo(requests)]
            names = {service.name for service in listed[0].list_services_response.service}
            assert {"steersman.v1.ChatService", "inference.GRPCInferenceService"} <= names
            await _health(channel, health_pb2.HealthCheckResponse.SERVING)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{gateway.grpc_port}") as channel:
        await _health(channel, health_pb2.HealthCheckResponse.NOT_SERVING)
    await gateway.drain()


async def _health(channel: grpc.aio.Channel, wanted: int) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service="steersman.v1.ChatService")
    async with asyncio.timeout(10):
        while (await stub.Check(request)).status != wanted:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


# --- TLS --------------------------------------------------------------------------------------------------------


def _certificate(folder: Path, name: str, issuer: tuple[x509.Certificate, ec.EllipticCurvePrivateKey] | None):
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    moment = dt.datetime.now(dt.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer[0].subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(moment - dt.timedelta(minutes=1))
        .not_valid_after(moment + dt.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
    )
    certificate = builder.sign(issuer[1] if issuer else key, hashes.SHA256())
    (folder / f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / f"{name}.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return certificate, key


@pytest.mark.parametrize("mutual", [False, True])
async def test_tls_and_mtls_on_both_ports(policy: FakePolicy, tmp_path: Path, mutual: bool) -> None:
    authority = _certificate(tmp_path, "ca", None)
    for name in ("server", "client"):
        _certificate(tmp_path, name, authority)
    tls = {"cert": f"{tmp_path}/server.pem", "key": f"{tmp_path}/server.key"}
    if mutual:
        tls["clientCa"] = f"{tmp_path}/ca.pem"
    trusting = ssl.create_default_context(cafile=f"{tmp_path}/ca.pem")
    knowing = ssl.create_default_context(cafile=f"{tmp_path}/ca.pem")
    knowing.load_cert_chain(f"{tmp_path}/client.pem", f"{tmp_path}/client.key")
    ca, cert, key = ((tmp_path / name).read_bytes() for name in ("ca.pem", "client.pem", "client.key"))

    async with serve_policy(policy) as endpoint, running_gateway(gateway_config(endpoint, tls=tls)) as gateway:

        async def rest(context: ssl.SSLContext) -> int:
            async with httpx.AsyncClient(verify=context) as http:
                return (await http.get(f"{gateway.url}/readyz")).status_code

        async def native(credentials: grpc.ChannelCredentials) -> str:
            async with grpc.aio.secure_channel(f"127.0.0.1:{gateway.grpc_port}", credentials) as channel:
                call = chat_pb2_grpc.ChatServiceStub(channel).Chat(chat_pb2.ChatRequest(messages=[HELLO]), timeout=5)
                return "".join([part.delta async for part in call])

        assert gateway.url.startswith("https://")
        assert await rest(knowing) == 200
        assert await native(grpc.ssl_channel_credentials(ca, key, cert)) == "You said: hello there"
        if mutual:
            with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError, httpx.ConnectError)):
                await rest(trusting)
            with pytest.raises(grpc.aio.AioRpcError):
                await native(grpc.ssl_channel_credentials(ca))
        else:
            assert await rest(trusting) == 200
            assert await native(grpc.ssl_channel_credentials(ca)) == "You said: hello there"
