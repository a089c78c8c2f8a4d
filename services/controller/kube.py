"""The few calls of the Kubernetes API that the controller makes, on plain dictionaries."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from kubernetes.aio.client import ApiClient
from kubernetes.aio.client.exceptions import ApiException
from kubernetes.aio.dynamic.client import DynamicClient

from steersman.errors import UnavailableError

Json = dict[str, Any]
MERGE_PATCH = "application/merge-patch+json"
APPLY_PATCH = "application/apply-patch+yaml"
FIELD_MANAGER = "steersman-controller"
"""Who owns the fields that we write."""


@dataclass(frozen=True)
class Resource:
    """Where objects of a kind live."""

    group: str
    version: str
    plural: str

    def path(self, namespace: str, name: str | None = None, subresource: str | None = None) -> str:
        root = f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"
        parts = [root, "namespaces", namespace, self.plural, name, subresource]
        return "/".join(part for part in parts if part)


RESOURCES: Mapping[str, Resource] = {
    "AlignmentRun": Resource("steersman.dev", "v1alpha1", "alignmentruns"),
    "ConfigMap": Resource("", "v1", "configmaps"),
    "Secret": Resource("", "v1", "secrets"),
    "Service": Resource("", "v1", "services"),
    "Pod": Resource("", "v1", "pods"),
    "Event": Resource("", "v1", "events"),
    "Job": Resource("batch", "v1", "jobs"),
    "StatefulSet": Resource("apps", "v1", "statefulsets"),
    "Deployment": Resource("apps", "v1", "deployments"),
    "Workload": Resource("kueue.x-k8s.io", "v1beta2", "workloads"),
    "NetworkPolicy": Resource("networking.k8s.io", "v1", "networkpolicies"),
    "InferenceService": Resource("serving.kserve.io", "v1beta1", "inferenceservices"),
    "Certificate": Resource("cert-manager.io", "v1", "certificates"),
}

_OPTIONAL = {"InferenceService": "KServe", "Workload": "Kueue 0.15 or newer", "Certificate": "cert-manager"}
"""Kinds of other projects, which a cluster may not have."""

RIGHTS: Mapping[str, tuple[str, ...]] = {
    "AlignmentRun": ("get", "list", "watch", "patch", "delete"),
    "AlignmentRun/status": ("patch",),
    "ConfigMap": ("get", "create", "patch", "delete"),
    "Secret": ("create",),
    "Service": ("get", "create", "delete"),
    "Pod": ("get", "list", "watch"),
    "Pod/log": ("get",),
    "Event": ("list", "create"),
    "Job": ("get", "list", "watch", "create", "delete"),
    "StatefulSet": ("get", "list", "watch", "create", "patch", "delete"),
    "Deployment": ("get", "create", "patch", "delete"),
    "NetworkPolicy": ("get", "create"),
}
"""What the controller must be allowed in every namespace of runs; a test compares the chart's Role."""


def explain(error: ApiException) -> str:
    """What the API server says, for example which quota is exceeded; the HTTP reason where it says nothing."""
    try:
        return f"{error.status} {json.loads(error.body or '')['message']}"
    except (TypeError, ValueError, KeyError):
        return f"{error.status} {error.reason}"


class Kube:
    """Thin and typed by nothing but dictionaries; errors are the client's ApiException."""

    def __init__(self, client: ApiClient) -> None:
        self._client = DynamicClient(client)

    async def get(self, kind: str, namespace: str, name: str) -> Json | None:
        """The object; None when it does not exist, or when its kind does not."""
        try:
            return await self._json("get", RESOURCES[kind].path(namespace, name))
        except ApiException as error:
            if error.status == HTTPStatus.NOT_FOUND:
                return None
            raise

    async def list(self, kind: str, namespace: str, selector: str | None = None) -> list[Json]:
        """Objects of a namespace that carry the labels of `selector`; none where their kind does not exist."""
        try:
            answer = await self._json("get", RESOURCES[kind].path(namespace), label_selector=selector)
        except ApiException as error:
            if error.status == HTTPStatus.NOT_FOUND and kind in _OPTIONAL:
                return []
            raise
        return list(answer["items"])

    async def create(self, kind: str, namespace: str, body: Json, *, dry_run: bool = False) -> bool:
        """False when an object of that name exists already.

        Args:
            dry_run: everything is checked, nothing is kept.

        Raises:
            UnavailableError: the cluster lacks the project that the kind belongs to.
        """
        path = f"{RESOURCES[kind].path(namespace)}?fieldManager={FIELD_MANAGER}{'&dryRun=All' if dry_run else ''}"
        try:
            await self._json("post", path, body=body)
        except ApiException as error:
            if error.status == HTTPStatus.CONFLICT:
                return False
            if error.status == HTTPStatus.NOT_FOUND and kind in _OPTIONAL and "namespaces" not in explain(error):
                project = _OPTIONAL[kind]
                said = f"this cluster has no kind {kind}; install {project}, or do without it"
                raise UnavailableError(f"{said} in the manifest and the chart's values") from None
            raise
        return True

    async def patch(self, kind: str, namespace: str, name: str, body: Json, subresource: str | None = None) -> Json:
        """Merge patch. A stale `metadata.resourceVersion` in it raises ApiException 409."""
        path = f"{RESOURCES[kind].path(namespace, name, subresource)}?fieldManager={FIELD_MANAGER}"
        return await self._json("patch", path, body=body, content_type=MERGE_PATCH)

    async def apply(self, kind: str, namespace: str, name: str, body: Json) -> Json:
        """Server-side apply of the fields in `body`, taken over from whoever has them; those that we applied before
        and no longer name go. A stale `metadata.resourceVersion` raises ApiException 409."""
        path = f"{RESOURCES[kind].path(namespace, name)}?fieldManager={FIELD_MANAGER}&force=true"
        return await self._json("patch", path, body=body, content_type=APPLY_PATCH)

    async def delete(self, kind: str, namespace: str, name: str) -> None:
        """Deletes in the foreground: the object stays visible until its pods are gone."""
        try:
            await self._json("delete", RESOURCES[kind].path(namespace, name), propagation_policy="Foreground")
        except ApiException as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise

    async def pod_log(self, namespace: str, name: str, lines: int) -> str:
        """Last lines of the first container; empty when the pod has not started or is gone, or its node is silent."""
        path = f"{RESOURCES['Pod'].path(namespace, name, 'log')}?tailLines={lines}"
        try:
            return (await self._raw("get", path)).decode(errors="replace")
        except TimeoutError:
            return ""
        except ApiException as error:
            # The API server asks the node's kubelet, and says 500 and above when that does not answer.
            if error.status in (HTTPStatus.NOT_FOUND, HTTPStatus.BAD_REQUEST) or error.status >= 500:
                return ""
            raise

    async def may(self, namespace: str, kind: str, verb: str) -> bool:
        """Whether we have a right; `kind` may name a subresource: `Pod/log`."""
        name, _, subresource = kind.partition("/")
        resource = RESOURCES[name]
        asked = {"namespace": namespace, "verb": verb, "group": resource.group, "resource": resource.plural}
        body = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": asked | ({"subresource": subresource} if subresource else {})},
        }
        answer = await self._json("post", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", body=body)
        return bool((answer.get("status") or {}).get("allowed"))

    async def _json(self, method: str, path: str, **options: Any) -> Json:
        answer: Json = json.loads(await self._raw(method, path, **options))
        return answer

    async def _raw(self, method: str, path: str, **options: Any) -> bytes:
        response = await self._client.request(method, path, serialize=False, _request_timeout=30, **options)
        content: bytes = await response.read()
        return content
