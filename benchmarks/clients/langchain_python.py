"""langchain, with its package for OpenAI's API."""

from __future__ import annotations

from typing import Annotated, Any

import pydantic
from common import EMBEDDING, KEY, MODEL, URL, main, must
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

BASE: dict[str, Any] = {"base_url": f"{URL}/v1", "api_key": KEY, "model": MODEL, "max_retries": 0}
chat = ChatOpenAI(**BASE)
responses = ChatOpenAI(**BASE, use_responses_api=True)


class Order(pydantic.BaseModel):
    """An order."""

    number: Annotated[int, pydantic.Field(ge=0, le=999)]


@tool
def get_order(number: Annotated[int, pydantic.Field(ge=0, le=999)]) -> str:
    """Looks an order up."""
    return "shipped"


async def chats() -> None:
    must((await chat.ainvoke("hello")).response_metadata)


async def streams() -> None:
    must([chunk async for chunk in chat.astream("hello")])


async def with_tools(model: ChatOpenAI) -> None:
    said = await model.bind_tools([get_order], tool_choice="required").ainvoke("order 3")
    call = said.tool_calls[0]
    told = ToolMessage("shipped", tool_call_id=call["id"])
    await model.bind_tools([get_order], tool_choice="none").ainvoke([HumanMessage("order 3"), said, told])


async def structured() -> None:
    must(isinstance(await chat.with_structured_output(Order).ainvoke("order 3"), Order))


async def by_function() -> None:
    must(isinstance(await chat.with_structured_output(Order, method="function_calling").ainvoke("order 3"), Order))


async def logprobs() -> None:
    must((await chat.bind(logprobs=True).ainvoke("hello")).response_metadata["logprobs"])


async def responds() -> None:
    must((await responses.ainvoke("hello")).id)


async def responds_streaming() -> None:
    must([chunk async for chunk in responses.astream("hello")])


async def completions() -> None:
    await OpenAI(**BASE).ainvoke("once upon")


async def embeddings() -> None:
    model = OpenAIEmbeddings(base_url=f"{URL}/v1", api_key=KEY, model=EMBEDDING, check_embedding_ctx_length=False)
    must(len(await model.aembed_documents(["a", "b"])) == 2)


main(
    {
        "chat": chats,
        "chat streaming": streams,
        "tools": lambda: with_tools(chat),
        "structured output": structured,
        "structured output by function": by_function,
        "log-probabilities": logprobs,
        "responses": responds,
        "responses streaming": responds_streaming,
        "responses tools": lambda: with_tools(responses),
        "completions": completions,
        "embeddings": embeddings,
    }
)
