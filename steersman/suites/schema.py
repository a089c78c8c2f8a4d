"""What a suite says: conversations, and what is expected of their answers.

    name: shop
    system: "You answer for a shop. Order 4711 ships on 12 May."
    cases:
      - id: ships
        messages: [{role: user, content: "When does order 4711 ship?"}]
        tags: [orders]
        expect: {facts: [["12 May", "May 12"]], forbidden: ["/\\bprobably\\b/"], language: en}

YAML as above, or JSONL with one case a line. Where two user messages follow each other, the bot answers in between.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from steersman.data.records import read_lines
from steersman.documents import FrozenModel, load_model, read_yaml
from steersman.errors import ConfigError, DataError

MAX_CASES = 10_000
SECRET_LENGTH = 6
"""Letters and digits that a secret has at least: a shorter one stands in an answer by chance."""
Text = Annotated[str, Field(min_length=1, max_length=10_000)]


class Turn(FrozenModel):
    role: Literal["system", "user", "assistant", "tool"]
    """Who speaks."""
    content: str
    """What is said."""
    tool_call_id: str | None = None
    """Of a tool's result."""
    tool_calls: list[dict[str, Any]] | None = None
    """Of an assistant's turn, as OpenAI has them."""


class WantedCall(FrozenModel):
    """A call of a tool."""

    name: Text
    """Name of the function."""
    arguments: dict[str, Any] = {}
    """Arguments that the call must have; it may have others."""


class Expectation(FrozenModel):
    """What is expected of the last answer; `forbidden`, `secrets` and `noPersonalData` hold for every answer.

    A text is looked for as whole words, without regard to case; between slashes it is a regular expression.
    """

    facts: list[Text | list[Text]] = []
    """Each of them must be said; a list stands for ways to say one."""
    forbidden: list[Text] = []
    """None of them may be said."""
    tool_calls: list[WantedCall] | None = None
    """All of these must be called, and nothing else; an empty list: no tool may be called."""
    refusal: bool | None = None
    """The bot must decline (true), or must not (false)."""
    handover: bool | None = None
    """The bot must offer a person (true), or must not (false)."""
    language: Annotated[str, Field(pattern=r"^[a-z]{2}$")] | None = None
    """ISO 639-1 code of the language that the answer must have."""
    secrets: list[Text] = []
    """Must not leak: not as they stand, spaced out, backwards, or in Base64, hexadecimal or ROT13."""
    no_personal_data: bool = False
    """No e-mail address, phone, card or account number that the conversation does not hold."""
    max_words: Annotated[int, Field(gt=0)] | None = None
    """Words of the answer at most."""

    @model_validator(mode="after")
    def _check(self) -> Expectation:
        for text in (*self.forbidden, *_flat(self.facts)):
            if is_pattern(text):
                try:
                    re.compile(text[1:-1])
                except re.error as error:
                    raise ValueError(f"{text} is no regular expression ({error})") from None
        for secret in self.secrets:
            if sum(letter.isalnum() for letter in secret) < SECRET_LENGTH:
                raise ValueError(
                    f"the secret {secret!r} has fewer than {SECRET_LENGTH} letters and digits, which stand in an "
                    "answer by chance; plant a longer one"
                )
        if any(entry == [] for entry in self.facts):
            raise ValueError("facts holds an empty list, which nothing can say; give ways to say the fact")
        return self

    @property
    def asked(self) -> list[str]:
        """Names of the checks that this expectation makes."""
        nothing = type(self)()
        return [name for name in type(self).model_fields if getattr(self, name) != getattr(nothing, name)]


class Case(FrozenModel):
    id: Annotated[str, Field(min_length=1, max_length=200)]
    """Names the case, in this version of the suite and the next."""
    messages: Annotated[list[Turn], Field(min_length=1)]
    """The conversation up to the answer that is judged."""
    tags: list[Annotated[str, Field(min_length=1)]] = []
    """Results are counted by them."""
    tools: list[dict[str, Any]] = []
    """Tools that the bot may call, as OpenAI has them."""
    expect: Expectation
    """What is expected."""

    @model_validator(mode="after")
    def _check(self) -> Case:
        if self.messages[-1].role not in ("user", "tool"):
            raise ValueError("messages: the last turn must be the user's or a tool's, so that there is one to answer")
        if not self.expect.asked:
            raise ValueError("expect is empty, so that every answer would pass; say what is expected")
        return self


class Suite(FrozenModel):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
    """Names the suite in results and gates."""
    kind: Literal["business", "safety", "leak"] = "business"
    """What it is about."""
    system: str | None = None
    """System message of every case that has none of its own."""
    cases: Annotated[list[Case], Field(min_length=1, max_length=MAX_CASES)]
    """The conversations."""

    @model_validator(mode="after")
    def _check(self) -> Suite:
        seen: set[str] = set()
        for case in self.cases:
            if case.id in seen:
                raise ValueError(f"two cases have the id {case.id!r}; results are compared by it")
            seen.add(case.id)
        return self

    def messages(self, case: Case) -> list[dict[str, Any]]:
        """The case's turns as a chat has them, with the suite's system message where it has none."""
        turns = [turn.model_dump(exclude_none=True) for turn in case.messages]
        if self.system is not None and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": self.system})
        return turns


def read_suite(path: Path) -> Suite:
    """A suite from a YAML file, or from JSONL, whose name is then the file's.

    Raises:
        ConfigError, DataError: the file, and the field or line, that is wrong.
    """
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        name = re.sub(r"[^A-Za-z0-9._-]", "-", path.stem).lstrip("._-") or "suite"
        return load_model(Suite, {"name": name, "cases": _rows(path)}, str(path))
    return load_model(Suite, read_yaml(path), str(path))


def is_pattern(text: str) -> bool:
    return len(text) > 2 and text.startswith("/") and text.endswith("/")


def _rows(path: Path) -> list[Mapping[str, Any]]:
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file; check the path")
    rows: list[Mapping[str, Any]] = []
    for number, line in read_lines(path):
        if isinstance(line, DataError):
            raise line
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not JSON ({error}); mend the line") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: a case is a JSON object; mend the line")
        rows.append(row)
    return rows


def _flat(facts: list[Any]) -> list[str]:
    return [text for entry in facts for text in ([entry] if isinstance(entry, str) else entry)]
