"""Keys by API: for administrators, of their own tenant, with no more than they have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import sqlalchemy as sa

from services.gateway.auth.keys import create_key
from services.gateway.store import ApiKey, Audit, open_store
from services.gateway.testing import gateway_config, running_gateway
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
        assert (await http.delete(f"/v1/keys/{fresh['id']}", headers=admin)).json()["revoked"]
        with store.reading() as session:
            old, new_row = session.get_one(ApiKey, made["id"]), session.get_one(ApiKey, fresh["id"])
            lines = session.scalars(sa.select(Audit.outcome).where(Audit.action == "keys")).all()
        assert old.expires_at is not None
        assert new_row.revoked_at is not None
        assert (new_row.concurrent, new_row.tokens_per_day, new_row.scopes) == (2, 1000, ["chat"])
        assert list(lines) == ["create", "rotate", "revoke"]
    store.close()


async def test_where_no_key_is_needed_keys_are_not_managed_by_anybody() -> None:
    async with (
        serve_policy(FakePolicy()) as endpoint,
        running_gateway(gateway_config(endpoint)) as gateway,
        httpx.AsyncClient(base_url=gateway.url, timeout=60) as http,
    ):
        assert (await http.get("/v1/keys")).status_code == 403
