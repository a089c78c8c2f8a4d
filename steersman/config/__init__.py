"""Configuration: frozen pydantic models, YAML as a sparse overlay, `--set a.b=c` on top.

Nothing is imported here: a service or a probe that wants `config.base` or `config.tls` needs no manifest, whose models
take longer to make than the rest of a gateway to load.
"""
