"""Run by the image's Python: every module of gateway and controller is imported, and a gateway answers.

In front of a policy service without a model, over OpenAI's API and over the Open Inference Protocol, REST and gRPC.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import pkgutil

import grpc
import httpx
import psycopg
from kserve.protocol.grpc import grpc_predict_v2_pb2 as oip
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub

import services.controller
import services.gateway
from services.gateway.testing import gateway_config, running_gateway
from steersman.testing.fake_policy import FakePolicy, serve_policy


def import_everything() -> int:
    """Imports the modules of both services; returns their number."""
    number = 0
    for package in (services.controller, services.gateway):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
                number += 1
    return number


async def ask() -> None:
    """One question over each protocol."""
    tensor = {"name": "text_input", "shape": [1], "datatype": "BYTES", "data": ["hi"]}
    async with serve_policy(FakePolicy()) as endpoint, running_gateway(gateway_config(endpoint)) as gateway:
        async with httpx.AsyncClient(base_url=gateway.url, timeout=60) as http:
            body = {"model": "steersman", "messages": [{"role": "user", "content": "hi"}]}
            openai = (await http.post("/v1/chat/completions", json=body)).raise_for_status().json()
            assert openai["choices"][0]["message"]["content"] == "You said: hi", openai
            rest = (await http.post("/v2/models/steersman/infer", json={"inputs": [tensor]})).raise_for_status().json()
            assert "You said: hi" in str(rest), rest
        async with grpc.aio.insecure_channel(f"127.0.0.1:{gateway.grpc_port}") as channel:
            stub = GRPCInferenceServiceStub(channel)
            content = oip.InferTensorContents(bytes_contents=[b"hi"])
            inputs = [
                oip.ModelInferRequest.InferInputTensor(name="text_input", shape=[1], datatype="BYTES", contents=content)
            ]
            answer = await stub.ModelInfer(oip.ModelInferRequest(model_name="steersman", inputs=inputs))
            assert b"You said: hi" in answer.SerializeToString(), answer


if __name__ == "__main__":
    assert importlib.util.find_spec("torch") is None, "torch is installed; this image must not carry it"
    imported = import_everything()
    asyncio.run(ask())
    print(
        f"{imported} modules imported, psycopg {psycopg.__version__}; answers over OpenAI's API, OIP REST and OIP gRPC"
    )
