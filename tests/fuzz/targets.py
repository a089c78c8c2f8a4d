"""Everything that reads what comes from outside, as a function of one hostile value.

A target may raise what it documents (an error of the tree, which becomes one sentence); anything else is a defect.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from google.protobuf.message import DecodeError
from hypothesis import strategies as st
from pydantic import ValidationError

from fuzz import calls, machines, values
from steersman.errors import SteersmanError

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Target:
    name: str
    source: Callable[[], values.Make | st.SearchStrategy[Any]]
    """Made when it is used. What hypothesis draws is shrunk when it is bad."""
    read: Callable[[Any], object]
    allowed: tuple[type[BaseException], ...] = (SteersmanError,)
    share: int = 10
    """How much of the inputs it gets: much where an input costs little."""


def targets() -> list[Target]:
    """All of them; those that need a model load a tiny one once."""
    changed, flipped, several, texts = values.changed, values.flipped, values.several, values.texts
    return [
        Target("manifest", lambda: changed(_manifests()), _manifest, share=2),
        Target("manifest text", lambda: flipped(_manifest_texts()), _manifest_text, share=2),
        Target("override", lambda: lambda draw: f"spec.{texts(draw)}", _override),
        Target("rows", lambda: _json(changed(_rows())), _row, share=30),
        Target("row bytes", lambda: flipped([values.as_json(row) for row in _rows()]), _row, share=20),
        Target(
            "importers",
            lambda: _pair(_format_names(), changed(_records())),
            _import,
            # What the importing loop takes for a record of another shape, which it leaves out and names.
            allowed=(SteersmanError, KeyError, TypeError, ValueError, AttributeError, IndexError),
            share=30,
        ),
        Target("files", lambda: flipped(_files()), _records_of, share=5),
        Target("chat body", lambda: _json(changed(_chats())), _chat, share=30),
        Target("packed tensor", lambda: lambda draw: (draw.randbytes(draw.randrange(65)), _fields(draw)), _tensor,
               share=30),
        Target("protobuf", lambda: _pair(range(100), flipped(_messages())), _protobuf, share=20),
        Target("engine stream", lambda: several(changed(_chunks()), 4), _chunk_stream, share=20),
        Target("messages", lambda: texts, _text, share=30),
        Target("tool calls", lambda: lambda draw: f"<tool_call>{texts(draw)}</tool_call>", _tool_calls, share=5),
        Target("template", lambda: several(changed(_turns()), 4, least=1), _render),
        Target("reward reference", lambda: texts, _reference),
        Target("grpc methods", calls.requests, calls.call, share=4),
        Target("feedback machine", machines.feedback_commands, machines.feedback, share=1),
        Target("idempotency machine", machines.idempotency_commands, machines.idempotency, share=1),
        Target("admission machine", machines.admission_commands, machines.admission, share=2),
        Target("weights machine", machines.weights_commands, machines.weights, share=2),
        Target("two controllers", machines.operator_commands, machines.operator, share=1),
    ]  # fmt: skip


def _json(make: values.Make) -> values.Make:
    return lambda draw: values.as_json(make(draw))


def _pair(ones: Sequence[Any], make: values.Make) -> values.Make:
    return lambda draw: (draw.choice(ones), make(draw))


# -- configuration ----------------------------------------------------------------------------------


@cache
def _manifest_texts() -> list[bytes]:
    return [path.read_bytes() for path in sorted((ROOT / "examples").glob("*/*.yaml"))]


@cache
def _manifests() -> list[Any]:
    return [yaml.safe_load(text) for text in _manifest_texts()]


def _manifest(document: Any) -> None:
    from steersman.config.base import load_model
    from steersman.config.manifest import AlignmentRun

    load_model(AlignmentRun, document, "fuzz")


def _manifest_text(text: bytes) -> None:
    from steersman.config.manifest import load_manifest

    with _file(text, ".yaml") as path:
        load_manifest(path)


def _override(override: str) -> None:
    from steersman.config.base import apply_overrides

    apply_overrides({"spec": {"stages": [{"sft": None}], "seed": 1}}, [override])


@contextlib.contextmanager
def _file(content: bytes, suffix: str) -> Iterator[Path]:
    with tempfile.NamedTemporaryFile(suffix=suffix) as file:
        file.write(content)
        file.flush()
        yield Path(file.name)


# -- data -------------------------------------------------------------------------------------------


def _rows() -> list[Any]:
    user, answer = {"role": "user", "content": "Where is order 7?"}, {"role": "assistant", "content": "On its way."}
    call = {"id": "1", "type": "function", "function": {"name": "find", "arguments": '{"no": 7}'}}
    asked = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    tool = {"role": "tool", "tool_call_id": "1", "content": "sent"}
    return [
        {"messages": [user, answer], "id": "1", "consent": "yes", "facts": {"needed": ["7"]}},
        {"messages": [user, *asked, tool, answer], "tools": [{"type": "function", "function": {"name": "find"}}]},
        {
            "prompt": [user],
            "chosen": [answer],
            "rejected": [{**answer, "content": "No."}],
            "margin": 1.0,
            "soft_label": 0.8,
        },
        {"prompt": [user], "completion": [answer], "label": True},
        {"prompt": [user], "completion": [answer], "aspects": {"helpful": 4}, "scales": {"helpful": [0, 4]}},
        {"prompt": [user]},
    ]


def _row(line: bytes) -> None:
    from steersman.data import records

    for kind in (records.Demonstration, records.Preference, records.Feedback, records.Aspects, records.Prompt):
        with contextlib.suppress(SteersmanError):
            records.parse_row(line, kind, "fuzz:1").to_json()


@cache
def _format_names() -> list[str]:
    from steersman.data.formats import FORMATS

    return sorted(FORMATS)


def _records() -> list[Any]:
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    return [
        *_rows(),
        {"instruction": "Say it", "input": "", "output": "It.", "system": "s", "history": [["a", "b"]]},
        {"conversations": turns, "chosen": turns[1], "rejected": {"from": "gpt", "value": "No."}},
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
        {
            "history": "q",
            "human_ref_A": "a",
            "human_ref_B": "b",
            "labels": 1,
            "score_A": 5,
            "score_B": 2,
            "score_ratio": 2.5,
        },
        {
            "prompt": "p",
            "response": "r",
            "helpfulness": 4,
            "correctness": 4,
            "coherence": 4,
            "complexity": 2,
            "verbosity": 1,
        },
        {"question": "q", "answer": "a #### 4"},
    ]


def _import(case: tuple[str, Any]) -> None:
    from steersman.data.format import ImportOptions, Skip
    from steersman.data.formats import FORMATS

    name, record = case
    if not isinstance(record, dict):
        return
    form = FORMATS[name]
    made = form.convert(record, ImportOptions())
    for item in [made] if isinstance(made, (dict, Skip)) else made:
        if not isinstance(item, Skip):
            with contextlib.suppress(ValidationError):
                form.row.model_validate(item)


def _files() -> list[bytes]:
    import gzip

    lines = b"".join(values.as_json(row) + b"\n" for row in _rows())
    return [
        lines,
        gzip.compress(lines),
        b"prompt,answer\nq,a\n",
        b'prompt;answer\n"q;1";a\n',
        json.dumps(_rows()).encode(),
    ]


def _records_of(content: bytes) -> None:
    from steersman.data.sources import read_records

    for suffix in (".jsonl", ".json", ".csv", ".jsonl.gz"):
        with _file(content, suffix) as path, contextlib.suppress(SteersmanError):
            for _ in read_records(str(path)):
                pass


# -- the endpoint -----------------------------------------------------------------------------------


def _chats() -> list[Any]:
    tool = {
        "type": "function",
        "function": {
            "name": "find",
            "parameters": {
                "type": "object",
                "properties": {"no": {"$ref": "#/$defs/n"}},
                "$defs": {"n": {"type": "string"}},
            },
        },
    }
    schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}}
    message = {"role": "user", "content": [{"type": "text", "text": "Where is order 2?"}]}
    return [
        {
            "model": "m",
            "messages": [message],
            "temperature": 1,
            "top_p": 0.9,
            "n": 2,
            "seed": 3,
            "stop": ["x"],
            "stream": True,
        },
        {"model": "m", "messages": [message], "tools": [tool], "tool_choice": "required", "parallel_tool_calls": False},
        {"model": "m", "messages": [message], "response_format": schema, "logprobs": True, "top_logprobs": 3},
        {"model": "m", "prompt": ["a", "b"], "max_tokens": 4, "logprobs": 2, "suffix": None},
    ]


def _chat(body: bytes) -> None:
    from services.gateway.errors import from_validation
    from services.gateway.openai.schema import ChatCompletionRequest, CompletionRequest
    from services.gateway.openai.translate import chat_request, completion_request

    for kind in (ChatCompletionRequest, CompletionRequest):
        try:
            parsed = kind.model_validate_json(body)
        except ValidationError as error:
            sentence = from_validation(error).message
            assert 0 < len(sentence) < 1000, sentence
            continue
        if isinstance(parsed, ChatCompletionRequest):
            chat_request(parsed).SerializeToString()
        else:
            for prompt in parsed.prompts:
                completion_request(parsed, prompt).SerializeToString()


def _chunks() -> list[Any]:
    call = {"index": 0, "id": "c", "function": {"name": "f", "arguments": "{"}}
    top = [{"token": "b", "logprob": -2.0, "bytes": [98]}]
    logprobs = {"content": [{"token": "a", "logprob": -0.1, "bytes": [97], "top_logprobs": top}]}
    return [
        {"choices": [{"index": 0, "delta": {"content": "a"}, "logprobs": logprobs, "finish_reason": None}]},
        {"choices": [{"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": "tool_calls"}]},
        {"choices": [{"index": 0, "text": "a", "finish_reason": "stop"}], "usage": {"prompt_tokens": 3}},
        {"error": {"message": "no"}},
    ]


def _chunk_stream(chunks: list[Any]) -> None:
    from services.gateway.backends.openai import Translator

    translator = Translator()
    for chunk in chunks:
        for response in translator.take(chunk):
            response.SerializeToString()
    for response in translator.end():
        response.SerializeToString()


@cache
def _reader() -> Any:
    from services.gateway.tools.reading import Reader

    return Reader({"order": ["Vorgang"]}, {"order": ["SO-?[0-9]{4,8}"]})


def _text(text: str) -> None:
    from services.gateway.redaction import redact
    from services.gateway.tools.hand_over import wants_person

    found = _reader().wishes(text, 10)
    assert len(found) <= 10
    wants_person(text)
    redact(text)


# -- the wire ---------------------------------------------------------------------------------------


def _fields(draw: random.Random) -> tuple[list[int], int]:
    lengths = draw.choices([0, 1, 2, 4, 8, 2**31, 2**32 - 1], k=draw.randrange(5))
    return lengths, draw.randrange(10)


def _tensor(case: tuple[bytes, tuple[list[int], int]]) -> None:
    from steersman.rpc.wire import unpack_rows
    from steersman.v1 import common_pb2

    data, (lengths, dtype) = case
    tensor = common_pb2.RaggedTensor()
    for field in tensor.DESCRIPTOR.fields:
        with contextlib.suppress(TypeError, ValueError):
            if field.type == field.TYPE_BYTES:
                setattr(tensor, field.name, data)
            elif field.is_repeated:
                getattr(tensor, field.name).extend(lengths)
            else:
                setattr(tensor, field.name, dtype)
    for kind in (np.int32, np.float32):
        rows = []
        with contextlib.suppress(SteersmanError):
            rows = unpack_rows(tensor, kind, "fuzz")
        assert sum(row.nbytes for row in rows) <= len(data)


@cache
def _kinds_of_messages() -> list[Any]:
    from steersman.v1 import chat_pb2, policy_pb2, reference_pb2, reward_pb2, weights_pb2

    files = (chat_pb2, policy_pb2, reference_pb2, reward_pb2, weights_pb2)
    return [getattr(file, name) for file in files for name in sorted(file.DESCRIPTOR.message_types_by_name)]


def _messages() -> list[bytes]:
    from steersman.rpc.wire import pack_rows
    from steersman.v1 import policy_pb2, reward_pb2

    prompts = pack_rows([np.array([1, 2, 3], np.int32)], np.int32)
    item = reward_pb2.ScoreItem(token_ids=prompts, facts_json='{"a": 1}')
    return [
        policy_pb2.GenerateRequest(prompts=prompts, n=2).SerializeToString(),
        reward_pb2.ScoreRequest(items=[item], tokenizer_fingerprint="f").SerializeToString(),
    ]


def _protobuf(case: tuple[int, bytes]) -> None:
    from services.policy.servicer import sampling_params
    from services.reward.servicer import _item
    from steersman.v1 import policy_pb2, reward_pb2

    number, data = case
    kinds = _kinds_of_messages()
    try:
        message = kinds[number % len(kinds)].FromString(data)
    except DecodeError:
        return
    if isinstance(message, policy_pb2.GenerateRequest):
        sampling_params(message.sampling)
    elif isinstance(message, reward_pb2.ScoreRequest):
        for index, item in enumerate(message.items):
            _item(f"items[{index}]", item, message.tokenizer_fingerprint)


# -- text of models ---------------------------------------------------------------------------------


def _tool_calls(text: str) -> None:
    from services.policy.reading import AnswerReader, TextStream

    tokenizer, family = _tokenizer(), _family()
    text = text.encode("utf-8", "replace").decode()  # what a model writes is Unicode
    reader = AnswerReader(TextStream(tokenizer, family.dropped, family.kept), (), family.whole, marks=family.marks)
    pieces = [reader.push(token) for token in tokenizer.encode(text, add_special_tokens=False)]
    for piece in (*pieces, reader.finish()):
        for call in piece.calls:
            json.loads(call.arguments)


@cache
def _family() -> Any:
    from services.policy.chat import ChatFormat

    return ChatFormat(_tokenizer(), "").family()


def _turns() -> list[Any]:
    return [turn for row in _rows() for name in ("messages", "prompt") for turn in row.get(name, ())]


@cache
def _tokenizer() -> Any:
    from steersman.testing.models import tiny_tokenizer

    return tiny_tokenizer()


def _render(turns: list[Any]) -> None:
    from steersman.data.records import Message
    from steersman.nn.render import prompt_ids

    messages = []
    for turn in turns:
        try:
            messages.append(Message.model_validate(turn).model_dump(exclude_none=True))
        except ValidationError:
            return
    ids = prompt_ids(_tokenizer(), messages)
    control = set(_tokenizer().all_special_ids)
    assert sum(token in control for token in ids) <= 4 * len(messages) + 4, "a text became control tokens"


def _reference(text: str) -> None:
    from steersman.rewards import split_reference

    split_reference(text)
    io.StringIO(text)
