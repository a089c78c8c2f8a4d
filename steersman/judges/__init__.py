"""Judges of answers: language models that compare two of them, and the licence that every judge needs.

The package itself imports nothing: the manifest reads `options`.
"""
