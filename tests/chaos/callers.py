"""Customers, staff and a ticket system: what they were acknowledged is written down, and must be kept.

python -m chaos.callers FOLDER: reads FOLDER/callers.json, works until FOLDER/stop is there and nothing is under way
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx

PAUSE = (0.05, 0.4)
"""Seconds between two operations of one caller: what is tried is faults, not load."""
_FIELD = re.compile(r'name="(item_id|event_id|shown_at)" value="([^"]*)"')


class GaveUp(Exception):
    """An operation did not come to an end within the patience."""


class Callers:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        plan = json.loads((folder / "callers.json").read_text())
        self._urls: list[str] = plan["urls"]
        self._project: int = plan["project"]
        self._late = (404,) if plan["clock jumps"] else ()
        """By a clock that jumps a proposal runs out at once."""
        self._patience: float = plan["patience"]
        """Seconds that a caller asks the same again before he gives up."""
        self._draw = random.Random(plan["seed"])
        self._log = (folder / "acknowledged.jsonl").open("a")
        self._count = 0
        self.http = httpx.AsyncClient(timeout=httpx.Timeout(20), limits=httpx.Limits(max_connections=None))

    @property
    def stopping(self) -> bool:
        return (self._folder / "stop").exists()

    def number(self) -> int:
        self._count += 1
        return self._count

    def note(self, kind: str, **what: Any) -> None:
        self._log.write(json.dumps({"kind": kind, **what}) + "\n")
        self._log.flush()

    async def insist(self, what: str, send: Callable[[str], Awaitable[httpx.Response]], *good: int) -> httpx.Response:
        """Sends the same again, to any gateway, until it is answered; refusals that are no pause are noted as odd."""
        end = time.monotonic() + self._patience
        last = "nothing"
        while time.monotonic() < end:
            try:
                response = await send(self._draw.choice(self._urls))
            except httpx.HTTPError as error:
                last = type(error).__name__
            else:
                if response.status_code in good:
                    return response
                last = f"{response.status_code} {response.text[:200]}"
                if response.status_code not in (409, 429, 503, 504):
                    self.note("odd", what=what, answer=last)
                    raise GaveUp(what)
            waiting = 1.0 if last.startswith("409") else 0.05  # what another gateway began takes its time
            await asyncio.sleep(self._draw.uniform(waiting, waiting + 0.4))
        self.note("gave up", what=what, answer=last)
        raise GaveUp(what)

    def _post(self, path: str, **content: Any) -> Callable[[str], Awaitable[httpx.Response]]:
        return lambda url: self.http.post(url + path, **content)

    async def customer(self, index: int) -> None:
        """Conversations with memory, each answer judged; now and then a person is asked for."""
        while not self.stopping:
            conversation = f"c-{index}-{self.number()}"
            for turn in range(self._draw.randint(1, 3)):
                if self.stopping:
                    return
                await self._turn(conversation, turn)
                await asyncio.sleep(self._draw.uniform(*PAUSE))

    async def _turn(self, conversation: str, turn: int) -> None:
        number = self.number()
        wants_person = turn == 0 and self._draw.random() < 0.2
        said = "I want to talk to a human, please" if wants_person else f"hello number {number}"
        body = {"model": "steersman", "messages": [{"role": "user", "content": said}], "max_tokens": 6}
        body["conversation_id"] = conversation
        headers = {"idempotency-key": f"k-{number}"}

        ask = self._post("/v1/chat/completions", json=body, headers=headers)
        answer = (await self.insist("chat", ask, 200)).json()
        text = answer["choices"][0]["message"]["content"]
        self.note("answer", key=f"k-{number}", id=answer["id"], conversation=conversation, said=said, text=text)
        if self._draw.random() < 0.2:
            again = (await self.insist("replay", ask, 200)).json()
            self.note("answer", key=f"k-{number}", id=again["id"], conversation=conversation, said=said, text=text)
        for proposal in answer["steersman"]["proposed_actions"]:
            confirm = self._post(f"/v1/actions/{proposal['id']}/confirm")
            for _ in range(self._draw.choice((1, 1, 2))):
                done = await self.insist("confirm", confirm, 200, *self._late)
                if done.status_code == 200:
                    self.note("action", id=proposal["id"], ticket=done.json()["ticket"])
        if self._draw.random() < 0.7:
            event = {"event_id": f"e-{number}", "answer_id": answer["id"], "thumbs": self._draw.choice(("up", "down"))}
            for _ in range(self._draw.choice((1, 1, 2))):
                await self.insist("feedback", self._post("/v1/feedback", json=event), 200)
                self.note("feedback", event=event["event_id"], answer=answer["id"], thumbs=event["thumbs"])

    async def labeller(self, name: str) -> None:
        """Judges one item after the other; who is told that his session has expired logs in again."""
        page = f"/label/{self._project}"
        cookie: dict[str, str] = {}
        while not self.stopping:
            cookie = cookie or await self._login(name)
            task = await self.insist("task", lambda url: self.http.get(url + page, headers=cookie), 200, 303, 401)  # noqa: B023
            if _expired(task):
                cookie = {}
                continue
            fields = dict(_FIELD.findall(task.text))
            if "event_id" not in fields:
                return
            sent = {**fields, "choice": self._draw.choice(("left:2", "right:1", "tie"))}
            # Sent again after its answer was lost, an item may be nobody's task any more.
            judged = await self.insist("judge", self._post(page, data=sent, headers=cookie), 303, 401, 404)
            if _expired(judged):
                cookie = {}
            elif judged.status_code == 303:
                self.note("judgement", event=fields["event_id"], item=fields["item_id"], labeller=name)
            await asyncio.sleep(self._draw.uniform(*PAUSE))

    async def _login(self, name: str) -> dict[str, str]:
        form = {"name": name, "key": "", "next": "/"}
        entered = await self.insist("login", self._post("/login", data=form), 303)
        self.http.cookies.clear()  # the session is the labeller's alone
        return {"cookie": entered.headers["set-cookie"].partition(";")[0]}

    async def desk(self, port: int) -> None:
        """The ticket system behind the webhook."""

        async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(re.search(rb"(?i)content-length: (\d+)", head).group(1))  # type: ignore[union-attr]
            order = json.loads(await reader.readexactly(length))
            self.note("ticket", id=order["id"])
            body = json.dumps({"ticket": f"T-{order['id'][:6]}"}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n")
            writer.write(b"content-length: %d\r\n\r\n" % len(body) + body)
            await writer.drain()
            writer.close()

        await asyncio.start_server(take, "127.0.0.1", port)

    async def work(self) -> None:
        plan = json.loads((self._folder / "callers.json").read_text())
        await self.desk(plan["desk"])
        people = [self.customer(index) for index in range(plan["customers"])]
        people += [self.labeller(name) for name in ("Ada", "Ben")]
        ended = await asyncio.gather(*people, return_exceptions=True)
        for error in ended:
            if isinstance(error, BaseException) and not isinstance(error, GaveUp):
                self.note("odd", what="caller", answer=repr(error)[:300])
        await self.http.aclose()


def _expired(response: httpx.Response) -> bool:
    return response.status_code == 401 or response.headers.get("location", "").startswith("/login")


def main() -> None:
    asyncio.run(Callers(Path(sys.argv[1])).work())


if __name__ == "__main__":
    main()
