"""pydantic-ai."""

from __future__ import annotations

from typing import Annotated, Any

import pydantic
from common import KEY, MODEL, URL, main, must
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

provider = OpenAIProvider(base_url=f"{URL}/v1", api_key=KEY)
chat, responses = OpenAIChatModel(MODEL, provider=provider), OpenAIResponsesModel(MODEL, provider=provider)


class Order(pydantic.BaseModel):
    number: Annotated[int, pydantic.Field(ge=0, le=999)]


def get_order(number: Annotated[int, pydantic.Field(ge=0, le=999)]) -> str:
    """Looks an order up."""
    return "shipped"


async def asks(model: Any) -> None:
    must((await Agent(model, instructions="be kind").run("hello")).output is not None)


async def streams(model: Any) -> None:
    async with Agent(model).run_stream("hello") as result:
        must([text async for text in result.stream_text()])


async def structured(model: Any) -> None:
    must(isinstance((await Agent(model, output_type=NativeOutput(Order)).run("order 3")).output, Order))


async def by_tool(model: Any) -> None:
    must(isinstance((await Agent(model, output_type=Order, tools=[get_order]).run("order 3")).output, Order))


async def goes_on(model: Any) -> None:
    first = await Agent(model).run("hello")
    await Agent(model).run("more", message_history=first.all_messages())


main(
    {
        "chat": lambda: asks(chat),
        "chat streaming": lambda: streams(chat),
        "structured output": lambda: structured(chat),
        "tools": lambda: by_tool(chat),
        "several turns": lambda: goes_on(chat),
        "responses": lambda: asks(responses),
        "responses streaming": lambda: streams(responses),
        "responses structured output": lambda: structured(responses),
        "responses tools": lambda: by_tool(responses),
        "responses several turns": lambda: goes_on(responses),
    }
)
