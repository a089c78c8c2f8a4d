"""llama-index, with its packages for servers like OpenAI's."""

from __future__ import annotations

from typing import Annotated, Any

import pydantic
from common import EMBEDDING, KEY, MODEL, URL, main, must
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike, OpenAILikeResponses

BASE: dict[str, Any] = {"model": MODEL, "api_base": f"{URL}/v1", "api_key": KEY, "max_retries": 0}
chat = OpenAILike(**BASE, is_chat_model=True, is_function_calling_model=True, should_use_structured_outputs=True)
HELLO = [ChatMessage(role="user", content="hello")]


class Order(pydantic.BaseModel):
    number: Annotated[int, pydantic.Field(ge=0, le=999)]


def get_order(number: int) -> str:
    """Looks an order up."""
    return "shipped"


async def chats() -> None:
    must((await chat.achat(HELLO)).message)


async def streams() -> None:
    must([part async for part in await chat.astream_chat(HELLO)])


async def tools() -> None:
    tool = FunctionTool.from_defaults(fn=get_order)
    answer = await chat.achat_with_tools([tool], user_msg="order 3", tool_required=True)
    must(chat.get_tool_calls_from_response(answer))


async def structured() -> None:
    must(isinstance((await chat.as_structured_llm(Order).achat(HELLO)).raw, Order))


async def completions() -> None:
    await OpenAILike(**BASE, is_chat_model=False).acomplete("once upon")


async def responds() -> None:
    must((await OpenAILikeResponses(**BASE).achat(HELLO)).message)


async def embeddings() -> None:
    model = OpenAILikeEmbedding(model_name=EMBEDDING, api_base=f"{URL}/v1", api_key=KEY)
    must(len(await model.aget_text_embedding_batch(["a", "b"])) == 2)


main(
    {
        "chat": chats,
        "chat streaming": streams,
        "tools": tools,
        "structured output": structured,
        "completions": completions,
        "responses": responds,
        "embeddings": embeddings,
    }
)
