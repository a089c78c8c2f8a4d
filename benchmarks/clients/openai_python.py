"""openai for Python."""

from __future__ import annotations

from typing import Annotated, Any

import openai
import pydantic
from common import EMBEDDING, HELLO, KEY, MODEL, ORDER, URL, main, must

client = openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0)
chat, responses = client.chat.completions, client.responses
TOOL = {"type": "function", "function": {"name": "get_order", "parameters": ORDER}}
FLAT = {"type": "function", "name": "get_order", "parameters": ORDER}


class Order(pydantic.BaseModel):
    number: Annotated[int, pydantic.Field(ge=0, le=999)]


async def chats() -> None:
    must((await chat.create(model=MODEL, messages=HELLO)).choices[0].finish_reason)


async def streams() -> None:
    stream = await chat.create(model=MODEL, messages=HELLO, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    must(chunks[-1].usage.completion_tokens)


async def tools() -> None:
    answer = await chat.create(model=MODEL, messages=HELLO, tools=[TOOL], tool_choice="required")
    call = answer.choices[0].message.tool_calls[0]
    told = {"role": "tool", "tool_call_id": call.id, "content": "shipped"}
    await chat.create(model=MODEL, messages=[*HELLO, answer.choices[0].message, told])


async def parsed() -> None:
    must(
        isinstance(
            (await chat.parse(model=MODEL, messages=HELLO, response_format=Order)).choices[0].message.parsed, Order
        )
    )


async def logprobs() -> None:
    must((await chat.create(model=MODEL, messages=HELLO, logprobs=True, top_logprobs=2)).choices[0].logprobs.content)


async def prefill() -> None:
    await chat.create(model=MODEL, messages=[*HELLO, {"role": "assistant", "content": "Well"}])


async def sampling() -> None:
    more: dict[str, Any] = {
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "logit_bias": {"5": 1},
        "seed": 3,
        "n": 2,
    }
    must(len((await chat.create(model=MODEL, messages=HELLO, stop=["zz"], **more)).choices) == 2)


async def completions() -> None:
    must((await client.completions.create(model=MODEL, prompt="once", echo=True)).choices[0].text.startswith("once"))
    await client.completions.create(model=MODEL, prompt=[5, 6, 7])


async def models() -> None:
    must(MODEL in [model.id async for model in client.models.list()])


async def responds() -> None:
    first = await responses.create(model=MODEL, input="hello", instructions="be kind")
    second = await responses.create(model=MODEL, input="more", previous_response_id=first.id)
    must((await responses.retrieve(second.id)).output_text == second.output_text)
    await responses.delete(first.id)


async def responds_streaming() -> None:
    async with responses.stream(model=MODEL, input="hello") as stream:
        kinds = [event.type async for event in stream]
    must(kinds[0] == "response.created")
    must(kinds[-1] in ("response.completed", "response.incomplete"), kinds[-1])


async def responds_with_tools() -> None:
    first = await responses.create(model=MODEL, input="order 3", tools=[FLAT], tool_choice="required")
    call = first.output[0]
    told = {"type": "function_call_output", "call_id": call.call_id, "output": "shipped"}
    await responses.create(
        model=MODEL, input=[{"role": "user", "content": "order 3"}, *first.output, told], tools=[FLAT]
    )


async def responds_parsed() -> None:
    must(isinstance((await responses.parse(model=MODEL, input="order 3", text_format=Order)).output_parsed, Order))


async def embeddings() -> None:
    found = await client.embeddings.create(model=EMBEDDING, input=["a", "b"])
    must(len(found.data) == 2 and len(found.data[0].embedding) > 8)


async def images_in_chats() -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    await chat.create(model=MODEL, messages=[{"role": "user", "content": [part]}])


async def background() -> None:
    await responses.create(model=MODEL, input="hello", background=True)


async def web_search() -> None:
    await responses.create(model=MODEL, input="hello", tools=[{"type": "web_search"}])


main(
    {
        "chat": chats,
        "chat streaming": streams,
        "tools": tools,
        "structured output": parsed,
        "log-probabilities": logprobs,
        "prefill": prefill,
        "sampling options": sampling,
        "completions": completions,
        "models": models,
        "responses": responds,
        "responses streaming": responds_streaming,
        "responses tools": responds_with_tools,
        "responses structured output": responds_parsed,
        "embeddings": embeddings,
        "images": images_in_chats,
        "responses background": background,
        "responses web search": web_search,
    }
)
