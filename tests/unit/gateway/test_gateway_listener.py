"""The socket that the gateway listens on."""

from __future__ import annotations

import socket

from services.gateway.server import listen


def test_an_answer_is_not_held_back_until_its_head_is_acknowledged() -> None:
    """Head and body go out as two segments; without TCP_NODELAY the second waits 40 ms on a kept connection."""
    with (
        listen("127.0.0.1", 0, unread_seconds=1) as listener,
        socket.create_connection(listener.getsockname()),
        listener.accept()[0] as accepted,
    ):
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
