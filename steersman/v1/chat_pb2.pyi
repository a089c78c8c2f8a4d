from steersman.v1 import bounds_pb2 as _bounds_pb2
from steersman.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ChatRequest(_message.Message):
    __slots__ = ("model", "messages", "sampling", "stop", "conversation_id", "consent")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    CONVERSATION_ID_FIELD_NUMBER: _ClassVar[int]
    CONSENT_FIELD_NUMBER: _ClassVar[int]
    model: str
    messages: _containers.RepeatedCompositeFieldContainer[_common_pb2.Message]
    sampling: _common_pb2.SamplingParams
    stop: _containers.RepeatedScalarFieldContainer[str]
    conversation_id: str
    consent: bool
    def __init__(self, model: _Optional[str] = ..., messages: _Optional[_Iterable[_Union[_common_pb2.Message, _Mapping]]] = ..., sampling: _Optional[_Union[_common_pb2.SamplingParams, _Mapping]] = ..., stop: _Optional[_Iterable[str]] = ..., conversation_id: _Optional[str] = ..., consent: bool = ...) -> None: ...

class ChatResponse(_message.Message):
    __slots__ = ("answer_id", "delta", "finish_reason", "prompt_tokens", "completion_tokens", "weights_version", "sources", "feedback_token", "proposed_actions")
    ANSWER_ID_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_VERSION_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    FEEDBACK_TOKEN_FIELD_NUMBER: _ClassVar[int]
    PROPOSED_ACTIONS_FIELD_NUMBER: _ClassVar[int]
    answer_id: str
    delta: str
    finish_reason: _common_pb2.FinishReason
    prompt_tokens: int
    completion_tokens: int
    weights_version: int
    sources: _containers.RepeatedCompositeFieldContainer[Source]
    feedback_token: str
    proposed_actions: _containers.RepeatedCompositeFieldContainer[ProposedAction]
    def __init__(self, answer_id: _Optional[str] = ..., delta: _Optional[str] = ..., finish_reason: _Optional[_Union[_common_pb2.FinishReason, str]] = ..., prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., weights_version: _Optional[int] = ..., sources: _Optional[_Iterable[_Union[Source, _Mapping]]] = ..., feedback_token: _Optional[str] = ..., proposed_actions: _Optional[_Iterable[_Union[ProposedAction, _Mapping]]] = ...) -> None: ...

class ProposedAction(_message.Message):
    __slots__ = ("id", "action", "arguments_json", "text")
    ID_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_JSON_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    id: str
    action: str
    arguments_json: str
    text: str
    def __init__(self, id: _Optional[str] = ..., action: _Optional[str] = ..., arguments_json: _Optional[str] = ..., text: _Optional[str] = ...) -> None: ...

class ConfirmActionRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class ConfirmActionResponse(_message.Message):
    __slots__ = ("id", "action", "ticket", "text")
    ID_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    id: str
    action: str
    ticket: str
    text: str
    def __init__(self, id: _Optional[str] = ..., action: _Optional[str] = ..., ticket: _Optional[str] = ..., text: _Optional[str] = ...) -> None: ...

class Source(_message.Message):
    __slots__ = ("system", "record")
    SYSTEM_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    system: str
    record: str
    def __init__(self, system: _Optional[str] = ..., record: _Optional[str] = ...) -> None: ...

class SubmitFeedbackRequest(_message.Message):
    __slots__ = ("event_id", "answer_id", "thumbs_up", "edited_answer", "outcome", "reason", "feedback_token", "judge")
    EVENT_ID_FIELD_NUMBER: _ClassVar[int]
    ANSWER_ID_FIELD_NUMBER: _ClassVar[int]
    THUMBS_UP_FIELD_NUMBER: _ClassVar[int]
    EDITED_ANSWER_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    FEEDBACK_TOKEN_FIELD_NUMBER: _ClassVar[int]
    JUDGE_FIELD_NUMBER: _ClassVar[int]
    event_id: str
    answer_id: str
    thumbs_up: bool
    edited_answer: str
    outcome: str
    reason: str
    feedback_token: str
    judge: str
    def __init__(self, event_id: _Optional[str] = ..., answer_id: _Optional[str] = ..., thumbs_up: bool = ..., edited_answer: _Optional[str] = ..., outcome: _Optional[str] = ..., reason: _Optional[str] = ..., feedback_token: _Optional[str] = ..., judge: _Optional[str] = ...) -> None: ...

class SubmitFeedbackResponse(_message.Message):
    __slots__ = ("created",)
    CREATED_FIELD_NUMBER: _ClassVar[int]
    created: bool
    def __init__(self, created: bool = ...) -> None: ...
