"""litellm."""

from __future__ import annotations

from typing import Annotated, Any

import litellm
import pydantic
from common import EMBEDDING, HELLO, KEY, MODEL, ORDER, URL, main, must

BASE: dict[str, Any] = {"api_base": f"{URL}/v1", "api_key": KEY, "num_retries": 0}
NAME = f"openai/{MODEL}"
TOOL = {"type": "function", "function": {"name": "get_order", "parameters": ORDER}}


class Order(pydantic.BaseModel):
    number: Annotated[int, pydantic.Field(ge=0, le=999)]


async def chats() -> None:
    must((await litellm.acompletion(model=NAME, messages=HELLO, **BASE)).choices[0].finish_reason)


async def streams() -> None:
    stream = await litellm.acompletion(model=NAME, messages=HELLO, stream=True, **BASE)
    must([chunk async for chunk in stream])


async def tools() -> None:
    answer = await litellm.acompletion(model=NAME, messages=HELLO, tools=[TOOL], tool_choice="required", **BASE)
    must(answer.choices[0].message.tool_calls)


async def structured() -> None:
    answer = await litellm.acompletion(model=NAME, messages=HELLO, response_format=Order, **BASE)
    Order.model_validate_json(answer.choices[0].message.content)


async def cache_control() -> None:
    part = {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}
    await litellm.acompletion(model=NAME, messages=[{"role": "user", "content": [part]}], **BASE)


async def completions() -> None:
    await litellm.atext_completion(model=f"text-completion-openai/{MODEL}", prompt="once", **BASE)


async def responds() -> None:
    first = await litellm.aresponses(model=NAME, input="hello", **BASE)
    await litellm.aresponses(model=NAME, input="more", previous_response_id=first.id, **BASE)


async def responds_streaming() -> None:
    stream = await litellm.aresponses(model=NAME, input="hello", stream=True, **BASE)
    kinds = [str(event.type) async for event in stream]
    must(len(kinds) > 3, kinds)


async def embeddings() -> None:
    found = await litellm.aembedding(model=f"openai/{EMBEDDING}", input=["a", "b"], **BASE)
    must(len(found.data) == 2)


main(
    {
        "chat": chats,
        "chat streaming": streams,
        "tools": tools,
        "structured output": structured,
        "cache_control": cache_control,
        "completions": completions,
        "responses": responds,
        "responses streaming": responds_streaming,
        "embeddings": embeddings,
    }
)
