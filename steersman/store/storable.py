"""What a database can keep: text without NUL and without halves of characters."""

from __future__ import annotations

import re
from typing import Any

_UNSTORABLE = re.compile("[\0\ud800-\udfff]")


def holds_unstorable(value: Any) -> bool:
    """Whether any text in a JSON-like value cannot be stored."""
    if isinstance(value, str):
        return _UNSTORABLE.search(value) is not None
    if isinstance(value, dict):
        return any(holds_unstorable(name) or holds_unstorable(part) for name, part in value.items())
    return isinstance(value, list | tuple) and any(holds_unstorable(part) for part in value)
