"""A token may hold a part of a character; the bytes of the tokens of a text are the text's."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from services.policy.chat import ChatFormat
from services.policy.token_bytes import TokenBytes
from steersman.errors import InvalidArgumentError
from steersman.testing.models import tiny_tokenizer
from steersman.v1 import common_pb2
from steersman.v1 import policy_pb2 as pb

TEXTS = ["hello there", "grüße 👩‍🚀 注文は２つ", "naïve \u0000 tab\tline\n", "🇩🇪 ½ é"]


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2's: pieces with a mark for spaces, bytes for what has no piece."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["<unk>", "▁", "h", "e", "l", "o", "▁h", "é"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "h")], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("make", [tiny_tokenizer, byte_fallback])
def test_the_bytes_join_to_the_text(make: type, text: str) -> None:
    tokenizer = make()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) >= len(text)
    bytes_of = TokenBytes(tokenizer)
    assert b"".join(map(bytes_of, ids)) == text.encode()


def test_tools_that_the_template_does_not_show_are_refused_by_name() -> None:
    request = pb.PolicyServiceChatRequest(
        messages=[common_pb2.Message(role="user", content="hi")],
        tools_json='[{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]',
    )
    blind = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    with pytest.raises(InvalidArgumentError, match="tools") as caught:
        ChatFormat(tiny_tokenizer(chat_template=blind), "").encode(request)
    assert caught.value.details["param"] == "tools"
    seeing = "{% if tools %}{{ tools | tojson }}{% endif %}" + blind
    assert len(ChatFormat(tiny_tokenizer(chat_template=seeing), "").encode(request))
    # An answer that must be a call is constrained to one, shown or not.
    request.json_schema = '{"type": "object"}'
    assert len(ChatFormat(tiny_tokenizer(chat_template=blind), "").encode(request))
