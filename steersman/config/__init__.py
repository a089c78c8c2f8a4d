"""Configuration: frozen pydantic models, YAML as a sparse overlay, `--set a.b=c` on top.

Nothing is imported here: a service or a probe that wants `config.base` or `config.tls` needs no manifest, whose models
take as long to make as a probe takes.
"""
