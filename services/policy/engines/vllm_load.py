"""How busy vLLM is, from the statistics of its scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase


class Load:
    """Written on the engine's thread, read by any."""

    def __init__(self) -> None:
        self.waiting = 0
        """Samples that waited for a place at the last step."""
        self.details: Mapping[str, float] = {}

    def logger(self, config: Any, engine_index: int = 0) -> StatLoggerBase:
        """A factory of vLLM's statistics loggers."""
        return _Logger(self)


class _Logger(StatLoggerBase):
    def __init__(self, load: Load) -> None:  # type: ignore[override]
        self._load = load
        self._asked = self._hit = 0

    def record(self, scheduler_stats: Any, *_: Any, **__: Any) -> None:
        if scheduler_stats is None:
            return
        self._asked += scheduler_stats.prefix_cache_stats.queries
        self._hit += scheduler_stats.prefix_cache_stats.hits
        self._load.waiting = scheduler_stats.num_waiting_reqs
        self._load.details = {
            "kv_cache_usage": float(scheduler_stats.kv_cache_usage),
            "prefix_tokens": float(self._asked),
            "prefix_tokens_cached": float(self._hit),
        }

    def log_engine_initialized(self) -> None:
        pass
