"""SAP style: a real OData v4 service (SAP's CAP on SQLite) behind the gateway. Runs where Node is present."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from gateway_erp import Boundary, Identities, recording

from services.gateway.testing import free_port, gateway_config, running_gateway, wait_for_port
from steersman.testing.fake_policy import FakePolicy, serve_policy

HERE = Path(__file__).resolve().parent
ORDER = {
    "entity": "A_SalesOrder",
    "number": "SalesOrder",
    "owner": "SoldToParty_ID",
    "fields": {
        "number": "SalesOrder",
        "state": "OverallStatus",
        "total": "TotalNetAmount",
        "date": "CreationDate",
        "customer": "SoldToParty/name",
    },
    "newestFirst": "CreationDate",
}


@pytest.fixture(scope="module")
def cap(repo_root: Path) -> Iterator[str]:
    if not shutil.which("node") or not shutil.which("npm"):
        pytest.skip("Node is not installed")
    project = repo_root / ".cache" / "tests" / "cap"
    shutil.copytree(HERE / "cap", project, dirs_exist_ok=True)
    server = project / "node_modules" / "@sap" / "cds" / "bin" / "serve.js"
    if not (project / "node_modules" / "sql.js").is_dir():
        # SQLite as WebAssembly: the default driver would be compiled, for more than a minute.
        command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts"]
        try:
            done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=180)
        except subprocess.TimeoutExpired:
            pytest.skip("@sap/cds cannot be installed within three minutes")
        if done.returncode:
            pytest.skip(f"@sap/cds cannot be installed: {done.stderr[-300:]}")
    port = free_port()
    process = subprocess.Popen(
        ["node", server, "all", "--in-memory"],
        cwd=project,
        env={**os.environ, "PORT": str(port)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        wait_for_port(port, process)
        yield f"http://127.0.0.1:{port}/odata/v4/orders"
    finally:
        process.terminate()
        process.wait(20)


async def test_orders_of_a_real_odata_service(cap: str, identities: Identities) -> None:
    policy = FakePolicy(reply=lambda request: "\n".join(m.content for m in request.messages))
    base, _, path = cap.partition("/odata")
    async with recording(base) as boundary, serve_policy(policy) as endpoint:
        system = {"name": "s4", "type": "odata", "url": f"{boundary.url}/odata{path}", "kinds": {"order": ORDER}}
        config = gateway_config(endpoint, identity=identities.config, tools={"systems": [system]})
        async with running_gateway(config) as gateway, httpx.AsyncClient(base_url=gateway.url, timeout=60) as http:

            async def ask(customer: str, text: str) -> tuple[str, list[dict[str, str]]]:
                answer = await http.post(
                    "/v1/chat/completions",
                    json={"model": "steersman", "messages": [{"role": "user", "content": text}], "max_tokens": 4000},
                    headers={"x-customer-token": identities.token(customer)},
                )
                body = answer.json()
                return body["choices"][0]["message"]["content"], body["steersman"]["sources"]

            said, sources = await ask("C-A", "where is my order 2?")
            assert '"state": "in delivery"' in said
            assert '"customer": "Alice Almond"' in said
            assert "print every order" not in said
            assert sources == [{"system": "s4", "record": "order/2"}]
            assert (await ask("C-A", "my orders please"))[1][0] == {"system": "s4", "record": "order/2"}
            assert (await ask("C'C", "order 4"))[1] == [{"system": "s4", "record": "order/4"}]
            for text in ("order 3", "order 3' or '1' eq '1", "order 3) or (1 eq 1", "order 3&$filter=1 eq 1"):
                said, sources = await ask("C-A", text)
                assert {source["record"] for source in sources} <= {"order/1", "order/2"}, text
                assert "Bob" not in said
                assert "blocked" not in said
            for customer in ("C-A' or '1' eq '1", "x' or SalesOrder eq '3"):
                assert (await ask(customer, "order 3"))[1] == []
    _check_boundary(boundary)


def _check_boundary(boundary: Boundary) -> None:
    assert boundary.exchanges
    for exchange in boundary.exchanges:
        assert exchange.status == 200, exchange
        assert exchange.query["$filter"][0].startswith("SoldToParty_ID eq '")
        assert "Bob" not in str(exchange.body)
        assert "InternalNote" not in str(exchange.body)
