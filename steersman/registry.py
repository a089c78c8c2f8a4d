"""The model registry: a version for every released run, and the aliases `candidate` and `champion`.

Speaks MLflow's REST API, so that the controller does not carry MLflow. Every call may be repeated.
"""

from __future__ import annotations

from typing import Any

import httpx

from steersman.errors import UnavailableError

RUN_TAG = "steersman.run_uid"


class Registry:
    def __init__(self, url: str, model: str, transport: httpx.AsyncBaseTransport | None = None) -> None:
        """Args:
        url: MLflow tracking server.
        model: name of the registered model.
        transport: how it is reached; None: over the network.
        """
        self._http = httpx.AsyncClient(base_url=f"{url.rstrip('/')}/api/2.0/mlflow", timeout=15.0, transport=transport)
        self._model = model

    async def set_alias(self, alias: str, run_uid: str, run: str, source: str) -> str:
        """Points `alias` at the version of a run, which is registered first where it is not yet.

        Returns:
            The version.

        Raises:
            UnavailableError: the registry does not answer or refuses.
        """
        await self._call("POST", "/registered-models/create", {"name": self._model}, may_exist=True)
        version = await self._find(run_uid)
        if version is None:
            tags = [{"key": RUN_TAG, "value": run_uid}, {"key": "steersman.run", "value": run}]
            body = {"name": self._model, "source": source, "tags": tags}
            version = (await self._call("POST", "/model-versions/create", body))["model_version"]["version"]
        await self._call("POST", "/registered-models/alias", {"name": self._model, "alias": alias, "version": version})
        return str(version)

    async def _find(self, run_uid: str) -> str | None:
        where = f"name='{self._model}' and tag.`{RUN_TAG}`='{run_uid}'"
        found = await self._call("GET", "/model-versions/search", {"filter": where, "max_results": 1})
        versions = found.get("model_versions") or []
        return versions[0]["version"] if versions else None

    async def _call(self, method: str, path: str, body: dict[str, Any], *, may_exist: bool = False) -> dict[str, Any]:
        try:
            if method == "GET":
                response = await self._http.get(path, params=body)
            else:
                response = await self._http.post(path, json=body)
            answer: dict[str, Any] = response.json()
        except (httpx.HTTPError, ValueError) as error:
            raise UnavailableError(f"the model registry does not answer ({error}); check mlflowUrl") from None
        if response.is_success or (may_exist and answer.get("error_code") == "RESOURCE_ALREADY_EXISTS"):
            return answer
        raise UnavailableError(f"the model registry refuses {path}: {answer.get('message', response.status_code)}")

    async def close(self) -> None:
        await self._http.aclose()
