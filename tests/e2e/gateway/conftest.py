"""Fixtures of the gateway's end-to-end tests."""

from gateway_erp import identities, tryton

__all__ = ["identities", "tryton"]
