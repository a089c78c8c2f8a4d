"""Generation engines: transformers (embedded default), vLLM and TGI."""
