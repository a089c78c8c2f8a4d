"""The bytes of single tokens: a token may hold a part of a character, which no text can show."""

from __future__ import annotations

import json
import re
from typing import Any

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level() -> dict[str, int]:
    """From the printable stand-ins of byte-level BPE to the bytes (`bytes_to_unicode` of OpenAI's GPT-2, reversed)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


class TokenBytes:
    """Of a transformers tokenizer: byte-level, with byte fallback, or neither."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(getattr(tokenizer, "all_special_ids", ()))
        backend = getattr(tokenizer, "backend_tokenizer", None)
        said = json.loads(backend.to_str()) if backend is not None else {}
        kinds = set(_types(said.get("decoder"))) | set(_types(said.get("pre_tokenizer")))
        self._stand_ins = _byte_level() if "ByteLevel" in kinds else None
        self._fallback = "ByteFallback" in kinds
        self._spaces = "Metaspace" in kinds or self._fallback

    def __call__(self, token_id: int) -> bytes:
        """The bytes of the tokens of a text, one after another, are the text's UTF-8."""
        if token_id in self._special or not (self._stand_ins or self._spaces):
            return str(self._tokenizer.decode([token_id])).encode()
        piece = str(self._tokenizer.convert_ids_to_tokens(token_id))
        if self._stand_ins is not None:
            found = [self._stand_ins.get(char) for char in piece]
            # An added token is written as it is.
            return piece.encode() if None in found else bytes(byte for byte in found if byte is not None)
        if self._fallback and (match := _BYTE_PIECE.fullmatch(piece)):
            return bytes([int(match.group(1), 16)])
        return piece.replace("\u2581", " ").encode()


def _types(part: Any) -> list[str]:
    """Every `type` within a part of a tokenizer's description."""
    if isinstance(part, dict):
        own = [part["type"]] if isinstance(part.get("type"), str) else []
        return own + [found for value in part.values() if isinstance(value, (dict, list)) for found in _types(value)]
    return [found for value in part for found in _types(value)] if isinstance(part, list) else []
