"""A TCP proxy that cuts, delays, freezes, half opens or damages connections when it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from dataclasses import dataclass, field
from typing import Any

from chaos.forking import Child, _forget_parent, _leave

MODES = ("pass", "cut", "delay", "freeze", "half", "flip")


class Proxy:
    """Forwards from `port` to a target, in a process of its own."""

    def __init__(self, target: int) -> None:
        """`target`: port on this machine; nothing need listen there yet."""
        listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port: int = listener.getsockname()[1]
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            _forget_parent()
            self._orders.close()
            _leave(lambda: asyncio.run(_serve(listener, theirs, target, parent)))
        listener.close()
        theirs.close()
        self.process = Child(pid, "proxy")

    def set(self, mode: str, **options: Any) -> None:
        """`cut`: everything now, nothing new; `delay`: `seconds` each way; `freeze`: nothing moves; `half`: answers are
        lost; `flip`: a bit of one of the next `bytes` of the requests."""
        assert mode in MODES
        with contextlib.suppress(OSError):
            self._orders.send(json.dumps({"mode": mode, **options}).encode())

    def close(self) -> None:
        self._orders.close()
        self.process.kill()
        self.process.wait()


@dataclass
class _State:
    mode: str = "pass"
    seconds: float = 0.0
    flip_after: int = 0
    moving: asyncio.Event = field(default_factory=asyncio.Event)
    writers: set[asyncio.StreamWriter] = field(default_factory=set)
    lost: set[asyncio.StreamWriter] = field(default_factory=set)
    """Answers did not reach these; they end with the fault."""


async def _serve(listener: socket.socket, orders: socket.socket, target: int, parent: int) -> None:
    from steersman.local.child import die_with_parent

    die_with_parent(parent)
    state = _State()
    state.moving.set()
    ended = asyncio.Event()

    def obey() -> None:
        try:
            order = orders.recv(4096)
        except BlockingIOError:
            return
        if not order:
            ended.set()
            return
        asked = json.loads(order)
        state.mode = asked["mode"]
        state.seconds = asked.get("seconds", 0.0)
        state.flip_after = asked.get("bytes", 0)
        if state.mode == "freeze":
            state.moving.clear()
        else:
            state.moving.set()
        for writer in list(state.writers if state.mode == "cut" else state.lost):
            writer.transport.abort()
        if state.mode == "pass":
            state.lost.clear()

    orders.setblocking(False)
    asyncio.get_running_loop().add_reader(orders, obey)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if state.mode == "cut":
            writer.transport.abort()
            return
        try:
            there_reader, there_writer = await asyncio.open_connection("127.0.0.1", target)
        except OSError:
            writer.transport.abort()
            return
        both = {writer, there_writer}
        state.writers |= both
        try:
            # Who was reset, as a killed process's connections are, resets the other one.
            with contextlib.suppress(OSError):
                await asyncio.gather(
                    _move(state, reader, there_writer, asked=True), _move(state, there_reader, writer, asked=False)
                )
        finally:
            state.writers -= both
            for each in both:
                each.transport.abort()

    server = await asyncio.start_server(connected, sock=listener)
    await ended.wait()
    server.close()


async def _move(state: _State, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, asked: bool) -> None:
    while data := await reader.read(65536):
        await state.moving.wait()
        if state.mode == "delay":
            await asyncio.sleep(state.seconds)
        if (state.mode == "half" or writer in state.lost) and not asked:
            state.lost.add(writer)
            continue
        if state.mode == "flip" and asked:
            if state.flip_after < len(data):
                changed = bytearray(data)
                changed[state.flip_after] ^= 0x10
                data, state.mode = bytes(changed), "pass"
            else:
                state.flip_after -= len(data)
        writer.write(data)
        await writer.drain()
    if writer not in state.lost:
        writer.write_eof()
