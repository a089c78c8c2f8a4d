"""Keys by API: for administrators, of their own tenant, with no more than they have."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import httpx
import sqlalchemy as sa

from services.gateway.auth.keys import create_key
from services.gateway.quotas import month_of
from services.gateway.store import ApiKey, Audit, KeyUse, open_store
from services.gateway.testing import gateway_config, running_gateway
from steersman.store.models import now
from steersman.testing.fake_policy import FakePolicy, serve_policy

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": "steersman", "messages": [{"role": "user", "content": "hello there"}]}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def test_a_key_from_its_making_to_its_end(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path}/g.db"
    store = open_store(database)
    admin = bearer(create_key(store, "acme", ["admin", "chat", "feedback"]))
    other = bearer(create_key(store, "other", ["admin", "chat"]))
    plain = bearer(create_key(store, "acme", ["chat"]))
    async with (
        serve_policy(FakePolicy()) as endpoint,
        running_gateway(gateway_config(endpoint, database=database, requireApiKey=True)) as gateway,
        httpx.AsyncClient(base_url=gateway.url, timeout=60) as http,
    ):
        new = {"scopes": ["chat"], "note": "shop", "tokens_per_day": 1000, "concurrent": 2, "days": 30}
        assert (await http.post("/v1/keys", json=new, headers=plain)).status_code == 403
        assert (await http.post("/v1/keys", json={"scopes": ["operate"]}, headers=admin)).status_code == 403
        for wrong in ({"scopes": []}, {"scopes": ["root"]}, {**new, "tokens_per_day": 0}, {**new, "days": -1}):
            assert (await http.post("/v1/keys", json=wrong, headers=admin)).status_code == 400
        made = (await http.post("/v1/keys", json=new, headers=admin)).json()
        assert (await http.post(CHAT, json=BODY, headers=bearer(made["key"]))).status_code == 200
        listed = (await http.get("/v1/keys", headers=admin)).json()["data"]
        (shown,) = [key for key in listed if key["id"] == made["id"]]
        assert shown["used"]["today"] == {"requests": 1, "tokens": 6}
        assert (shown["tokens_per_day"], shown["concurrent"], shown["note"]) == (1000, 2, "shop")
        assert "digest" not in shown
        assert len(listed) == 3, "of this tenant only"
        for method, path in (("POST", f"/v1/keys/{made['id']}/rotate"), ("DELETE", f"/v1/keys/{made['id']}")):
            assert (await http.request(method, path, json={}, headers=other)).status_code == 404
        rotated = await http.post(f"/v1/keys/{made['id']}/rotate", json={"grace_seconds": 0}, headers=admin)
        fresh = rotated.json()
        assert fresh["replaces"] == made["id"]
        assert (await http.post(CHAT, json=BODY, headers=bearer(fresh["key"]))).status_code == 200
        again = await http.post(f"/v1/keys/{made['id']}/rotate", json={}, headers=admin)
        assert again.status_code == 404
        assert (await http.delete(f"/v1/keys/{fresh['id']}", headers=admin)).json()["revoked_at"]
        with store.reading() as session:
            old, new_row = session.get_one(ApiKey, made["id"]), session.get_one(ApiKey, fresh["id"])
            lines = session.scalars(sa.select(Audit.outcome).where(Audit.action == "keys")).all()
        assert old.expires_at is not None
        assert new_row.revoked_at is not None
        assert (new_row.concurrent, new_row.tokens_per_day, new_row.scopes) == (2, 1000, ["chat"])
        assert list(lines) == ["create", "rotate", "revoke"]
    store.close()


async def test_a_key_is_changed_and_looked_at(tmp_path: Path) -> None:
    """What is left out stays, null takes a limit away, and nobody gives more than he has; the change counts at once."""
    database = f"sqlite:///{tmp_path}/g.db"
    store = open_store(database)
    admin, other = (bearer(create_key(store, tenant, ["admin", "chat"])) for tenant in ("acme", "other"))
    async with (
        serve_policy(FakePolicy()) as endpoint,
        running_gateway(gateway_config(endpoint, database=database, requireApiKey=True)) as gateway,
        httpx.AsyncClient(base_url=gateway.url, timeout=60) as http,
    ):
        new = {"scopes": ["chat"], "note": "shop", "requests_per_minute": 1, "concurrent": 2}
        made = (await http.post("/v1/keys", json=new, headers=admin)).json()
        path = f"/v1/keys/{made['id']}"
        assert (await http.post(CHAT, json=BODY, headers=bearer(made["key"]))).status_code == 200
        assert (await http.post(CHAT, json=BODY, headers=bearer(made["key"]))).status_code == 429
        changed = await http.patch(
            path, json={"requests_per_minute": None, "tokens_per_month": 10_000, "days": 7}, headers=admin
        )
        shown = changed.json()
        assert (shown["requests_per_minute"], shown["tokens_per_month"]) == (None, 10_000)
        assert (shown["concurrent"], shown["note"], shown["scopes"]) == (2, "shop", ["chat"])
        assert shown["expires_at"] > shown["created_at"]
        assert (await http.post(CHAT, json=BODY, headers=bearer(made["key"]))).status_code == 200, "at once"
        assert (await http.patch(path, json={"scopes": ["operate"]}, headers=admin)).status_code == 403
        assert (await http.patch(path, json={"note": "mine"}, headers=other)).status_code == 404
        wrong = await http.patch(path, json={"concurrent": 0}, headers=admin)
        assert wrong.json()["error"] | {"type": ""} == {
            "message": "concurrent: must be greater than 0",
            "type": "",
            "param": "concurrent",
            "code": None,
        }
        history = (await http.get(path, headers=admin)).json()
        assert [(day["requests"], day["tokens"]) for day in history["days"]] == [(2, 12)]
        assert history["used"]["this_month"] == {"requests": 2, "tokens": 12}
        assert history["last_used_on"] == history["days"][0]["day"]
        assert (history["state"], history["running"]) == ("active", 0)
        assert made["key"].split("-")[2] not in (await http.get("/v1/keys", headers=admin)).text
        assert (await http.get(path, headers=other)).status_code == 404
        assert (await http.delete(path, headers=admin)).json()["state"] == "revoked"
        assert (await http.post(CHAT, json=BODY, headers=bearer(made["key"]))).status_code == 401, "at once"
        assert (await http.patch(path, json={"note": "again"}, headers=admin)).status_code == 409
        with store.reading() as session:
            lines = session.execute(sa.select(Audit.outcome, Audit.records).where(Audit.action == "keys")).all()
        assert [outcome for outcome, _ in lines] == ["create", "change", "revoke"]
        assert lines[1].records == [{"key": made["id"], "fields": ["days", "requests_per_minute", "tokens_per_month"]}]
    store.close()


async def test_the_list_of_keys_is_read_in_parts(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path}/g.db"
    store = open_store(database)
    admin = bearer(create_key(store, "acme", ["admin"]))
    ids = [create_key(store, "acme", ["chat"]).split("-")[1] for _ in range(4)]
    async with (
        serve_policy(FakePolicy()) as endpoint,
        running_gateway(gateway_config(endpoint, database=database, requireApiKey=True)) as gateway,
        httpx.AsyncClient(base_url=gateway.url, timeout=60, headers=admin) as http,
    ):
        first = (await http.get("/v1/keys", params={"limit": 3})).json()
        rest = (await http.get("/v1/keys", params={"limit": 3, "after": first["data"][-1]["id"]})).json()
        assert [first["has_more"], rest["has_more"]] == [True, False]
        seen = [key["id"] for key in first["data"] + rest["data"]]
        assert len(seen) == len(set(seen)) == 5
        await http.delete(f"/v1/keys/{ids[0]}")
        revoked = (await http.get("/v1/keys", params={"state": "revoked"})).json()["data"]
        assert [key["id"] for key in revoked] == [ids[0]]
        for query, sentence in (
            ({"limit": 0}, "limit: must be at least 1"),
            ({"state": "gone"}, "state: must be 'active', 'expired' or 'revoked'"),
        ):
            refused = await http.get("/v1/keys", params=query)
            assert (refused.status_code, refused.json()["error"]["message"]) == (400, sentence)
    store.close()


async def test_a_month_has_a_budget(tmp_path: Path) -> None:
    """What other days of the month used counts, what the month before used does not."""
    database = f"sqlite:///{tmp_path}/g.db"
    store = open_store(database)
    key = create_key(store, "acme", ["chat"], tokens_per_month=500)
    today = now().date()
    month, after = month_of(now())
    assert month.day == after.day == 1
    assert month <= today < after
    with store.transaction() as session:
        session.add(KeyUse(key_id=key.split("-")[1], day=month - dt.timedelta(days=1), requests=1, tokens=10_000))
        session.add(KeyUse(key_id=key.split("-")[1], day=month, requests=1, tokens=499))
    async with (
        serve_policy(FakePolicy()) as endpoint,
        running_gateway(gateway_config(endpoint, database=database, requireApiKey=True)) as gateway,
        httpx.AsyncClient(base_url=gateway.url, timeout=60, headers=bearer(key)) as http,
    ):
        assert (await http.post(CHAT, json=BODY)).status_code == 200
        refused = await http.post(CHAT, json=BODY)
        assert refused.status_code == 429
        assert "500 tokens a month" in refused.json()["error"]["message"]
        assert int(refused.headers["retry-after"]) <= 31 * 86_400
    store.close()


async def test_where_no_key_is_needed_keys_are_not_managed_by_anybody() -> None:
    async with (
        serve_policy(FakePolicy()) as endpoint,
        running_gateway(gateway_config(endpoint)) as gateway,
        httpx.AsyncClient(base_url=gateway.url, timeout=60) as http,
    ):
        assert (await http.get("/v1/keys")).status_code == 403
