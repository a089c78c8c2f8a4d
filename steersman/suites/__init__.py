"""Suites: conversations with what must and must not be said, asked of any model, run or endpoint.

`schema` reads a suite, `checks` judges an answer, `asking` speaks to an endpoint, `asked` runs a suite and keeps what
came out, `verdicts` are the figures: by tag, against an earlier version, against another model.
"""
