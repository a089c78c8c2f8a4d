"""The policy service: text generation and weight updates."""
