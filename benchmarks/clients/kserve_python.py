"""KServe's SDK: the Open Inference Protocol over REST and gRPC."""

from __future__ import annotations

import sys

from common import GRPC, KEY, MODEL, URL, main, must

sys.argv = sys.argv[:1]  # the SDK reads the command line

import kserve  # noqa: E402
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest  # noqa: E402
from kserve.inference_client import RESTConfig  # noqa: E402
from kserve.protocol.infer_type import RequestedOutput  # noqa: E402


def headers() -> dict[str, str]:
    """New for every call: the SDK puts what it sends into the dictionary that it is given."""
    return {"authorization": f"Bearer {KEY}"}


def request(binary: bool = False, names: tuple[str, ...] = ()) -> InferRequest:
    import numpy as np

    given = InferInput("text_input", [1], "BYTES")
    given.set_data_from_numpy(np.array(["hello"], dtype=object), binary_data=binary)
    outputs = [RequestedOutput(name) for name in names] or None
    return InferRequest(MODEL, [given], request_outputs=outputs, parameters={"max_tokens": 8})


def rest(protocol: str = "v2") -> InferenceRESTClient:
    return InferenceRESTClient(RESTConfig(protocol=protocol))


async def ready() -> None:
    must(await rest().is_server_ready(URL))
    must(await rest().is_model_ready(URL, MODEL, headers=headers()))


async def infer() -> None:
    found = await rest().infer(URL, request(), model_name=MODEL, headers=headers())
    must(found.get_output_by_name("text_output"))


async def infer_binary() -> None:
    found = await rest().infer(URL, request(binary=True), model_name=MODEL, headers=headers())
    must(found.get_output_by_name("text_output"))


async def some_outputs() -> None:
    found = await rest().infer(URL, request(names=("text_output",)), model_name=MODEL, headers=headers())
    must([output.name for output in found.outputs] == ["text_output"], found.outputs)


async def over_grpc() -> None:
    client = InferenceGRPCClient(GRPC)
    metadata = (("authorization", f"Bearer {KEY}"),)
    must(await client.is_server_ready())
    must((await client.infer(request(), headers=metadata)).get_output_by_name("text_output"))
    found = await client.infer(request(names=("text_output",)), headers=metadata)
    must([output.name for output in found.outputs] == ["text_output"], found.outputs)


must(kserve.__name__)
main(
    {
        "readiness": ready,
        "infer": infer,
        "infer binary": infer_binary,
        "infer some outputs": some_outputs,
        "infer over gRPC": over_grpc,
    }
)
