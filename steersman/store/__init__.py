"""The database of feedback: projects, judgements, live feedback and releases."""

from steersman.store.engine import Store

__all__ = ["Store"]
