"""Tokens that the gateway signs for itself: permission to judge one answer, and browser sessions."""

from __future__ import annotations

import hashlib
import hmac
import time

from steersman.errors import UnauthenticatedError

FEEDBACK_SECONDS = 30 * 24 * 3600
SESSION_SECONDS = 12 * 3600


class _Signer:
    def __init__(self, secret: bytes, purpose: str) -> None:
        self._key = hmac.digest(secret, purpose.encode(), hashlib.sha256)

    def sign(self, text: str) -> str:
        return hmac.new(self._key, text.encode(), hashlib.sha256).hexdigest()[:40]


class FeedbackTokens:
    """`EXPIRY.SIGNATURE`: whoever holds it may judge that one answer, without an API key."""

    def __init__(self, secret: bytes) -> None:
        self._signer = _Signer(secret, "feedback")

    def issue(self, answer_id: str, tenant: str) -> str:
        expiry = int(time.time()) + FEEDBACK_SECONDS
        return f"{expiry}.{self._signer.sign(f'{answer_id}|{tenant}|{expiry}')}"

    def verify(self, token: str, answer_id: str, tenant: str) -> None:
        """Raises UnauthenticatedError."""
        expiry, _, signature = token.partition(".")
        good = hmac.compare_digest(signature.encode(), self._signer.sign(f"{answer_id}|{tenant}|{expiry}").encode())
        if not good or not expiry.isdigit() or int(expiry) < time.time():
            raise UnauthenticatedError("The feedback token is not valid for this answer, or has expired")


class Sessions:
    """`SUBJECT.EXPIRY.SIGNATURE`: the cookie of a browser session; the subject is the id of a key, or a name."""

    def __init__(self, secret: bytes) -> None:
        self._signer = _Signer(secret, "session")

    def issue(self, subject: str) -> str:
        expiry = int(time.time()) + SESSION_SECONDS
        return f"{subject}.{expiry}.{self._signer.sign(f'{subject}|{expiry}')}"

    def verify(self, cookie: str) -> str:
        """The subject; raises UnauthenticatedError."""
        subject, _, rest = cookie.partition(".")
        expiry, _, signature = rest.partition(".")
        good = hmac.compare_digest(signature.encode(), self._signer.sign(f"{subject}|{expiry}").encode())
        if not good or not expiry.isdigit() or int(expiry) < time.time():
            raise UnauthenticatedError("The session has expired; log in again")
        return subject
