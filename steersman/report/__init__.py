"""Evaluation of a run: statistics, before/after table, and the report with its plots.

`schema`, `statistics` and `summary` need numpy and scipy only; `report` draws and so imports matplotlib.
"""
