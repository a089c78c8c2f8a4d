"""`steersman submit|status|logs|cancel`: runs in a cluster, for people without kubectl.

Uses the kubeconfig that kubectl would use, or the pod's service account.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steersman.cli.options import Context, JsonOption, Namespace
from steersman.errors import ConfigError, ConflictError, NotFoundError, PermissionDeniedError, UnavailableError

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

GROUP, VERSION, PLURAL = "steersman.dev", "v1alpha1", "alignmentruns"
ENDED = ("Succeeded", "RolledBack", "Failed", "Cancelled")

app = typer.Typer(help="Runs in a Kubernetes cluster.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="Name of the run.")]


class Cluster:
    """The API of one namespace; its errors are sentences."""

    def __init__(self, client: ApiClient, namespace: str) -> None:
        from kubernetes.client import BatchV1Api, CoreV1Api, CustomObjectsApi

        self.namespace = namespace
        self._runs = CustomObjectsApi(client)
        self._core = CoreV1Api(client)
        self._batch = BatchV1Api(client)

    def call(self, what: str, function: Any, *arguments: Any, **options: Any) -> Any:
        """Calls the client; an error of the API server becomes one of ours.

        Args:
            what: what is asked for, for the message.
        """
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        try:
            return function(*arguments, _request_timeout=30, **options)
        except ApiException as error:
            kinds = {
                403: PermissionDeniedError,
                404: NotFoundError,
                409: ConflictError,
                422: ConfigError,
                400: ConfigError,
            }
            raise kinds.get(error.status, UnavailableError)(f"{what}: {_reason(error)}") from None
        except HTTPError as error:
            raise UnavailableError(f"{what}: the API server does not answer ({error}); check the kubeconfig") from None

    def submit(self, document: dict[str, Any]) -> dict[str, Any]:
        """Creates a run, or changes what may change of an existing one.

        By server-side apply: in a merge patch the API server drops the nulls of list elements, and so `lora: null`.
        """
        name = document["metadata"]["name"]
        run: dict[str, Any] = self.call(
            name,
            self._runs.patch_namespaced_custom_object,
            *(GROUP, VERSION, self.namespace, PLURAL, name, document),
            field_manager="steersman",
            force=True,
            _content_type="application/apply-patch+yaml",
        )
        return run

    def get(self, name: str) -> dict[str, Any]:
        place = (GROUP, VERSION, self.namespace, PLURAL, name)
        run: dict[str, Any] = self.call(f"run {name}", self._runs.get_namespaced_custom_object, *place)
        return run

    def groups(self) -> set[str]:
        """API groups that the server has: what is installed."""
        from kubernetes.client import ApisApi

        return {group.name for group in self.call("API groups", ApisApi(self._core.api_client).get_api_versions).groups}

    def storage_classes(self) -> list[str]:
        from kubernetes.client import StorageV1Api

        found = self.call("storage classes", StorageV1Api(self._core.api_client).list_storage_class).items
        return [item.metadata.name for item in found]

    def gpus(self) -> list[str]:
        """`node: count` of the nodes that have GPUs to give."""
        nodes = self.call("nodes", self._core.list_node).items
        counts = {node.metadata.name: (node.status.allocatable or {}).get("nvidia.com/gpu", "0") for node in nodes}
        return [f"{name}: {count}" for name, count in counts.items() if count != "0"]

    def list(self) -> list[dict[str, Any]]:
        place = (GROUP, VERSION, self.namespace, PLURAL)
        found: dict[str, Any] = self.call("runs", self._runs.list_namespaced_custom_object, *place)
        return [*found["items"]]

    def annotate(self, name: str, annotations: dict[str, str]) -> None:
        body = {"metadata": {"annotations": annotations}}
        place = (GROUP, VERSION, self.namespace, PLURAL, name)
        self.call(f"run {name}", self._runs.patch_namespaced_custom_object, *place, body)

    def logs(self, name: str, stage: str, lines: int) -> str:
        """End of the log of the newest pod of a stage; what the status kept, where no pod is left."""
        selector = f"steersman.dev/run={name},steersman.dev/stage={stage}"
        pods = self.call("pods", self._core.list_namespaced_pod, self.namespace, label_selector=selector).items
        if pods:
            newest = max(pods, key=lambda pod: pod.metadata.creation_timestamp)
            container = _container_with_log(newest)
            answer = self.call(
                f"log of {newest.metadata.name}",
                self._core.read_namespaced_pod_log,
                newest.metadata.name,
                self.namespace,
                tail_lines=lines,
                _preload_content=False,  # the client's own reading fails at what is no UTF-8
                **({"container": container} if container else {}),
            )
            return str(answer.data.decode(errors="replace"))
        for entry in (self.get(name).get("status") or {}).get("stages", []):
            if entry["name"] == stage and entry.get("log"):
                return str(entry["log"])
        raise NotFoundError(f"stage {stage} of {name} has no pod and left no log; see steersman status {name}")


def connect(context: str | None, namespace: str | None) -> Cluster:
    """Opens the cluster of the kubeconfig, or the one that this pod runs in."""
    import yaml

    try:
        from kubernetes import client, config
    except ImportError:
        raise ConfigError("kubernetes is not installed; pip install 'steersman[controller]'") from None
    try:
        api = config.new_client_from_config(context=context)
        contexts, active = config.list_kube_config_contexts()
        chosen = next((item for item in contexts if item["name"] == context), active)
        return Cluster(api, namespace or chosen["context"].get("namespace") or "default")
    except config.ConfigException as error:
        if context is not None:
            raise ConfigError(f"--context {context}: {error}") from None
    except (OSError, ValueError, yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        # The library reads what lies there without a look at its shape.
        where = os.environ.get("KUBECONFIG") or "~/.kube/config"
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"the kubeconfig {where} cannot be read ({reason}); mend it, or set KUBECONFIG") from None
    try:
        config.load_incluster_config()
    except config.ConfigException:
        raise ConfigError("there is no kubeconfig; set KUBECONFIG, or run kubectl config first") from None
    here = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
    return Cluster(client.ApiClient(), namespace or here.read_text().strip())


@app.command()
def submit(
    file: Annotated[Path, typer.Option("--file", "-f", help="Manifest.")],
    set_: Annotated[list[str], typer.Option("--set", help="spec.a.b=value; repeatable.")] = [],  # noqa: B006
    namespace: Namespace = None,
    context: Context = None,
    watch: Annotated[bool, typer.Option(help="Show the progress until the run ends.")] = False,
) -> None:
    """Hand a manifest to the cluster; the same file as for `steersman run`."""
    from steersman.config.base import apply_overrides, read_yaml
    from steersman.config.manifest import load_manifest

    run = load_manifest(file, set_)
    document = apply_overrides(read_yaml(file), set_)
    cluster = connect(context, namespace or run.metadata.namespace)
    document["metadata"]["namespace"] = cluster.namespace
    cluster.submit(document)
    typer.echo(f"{run.metadata.name}: submitted to {cluster.namespace}")
    if watch:
        raise _followed(cluster, run.metadata.name)


@app.command()
def status(
    name: Annotated[str | None, typer.Argument(help="Name of the run; all runs by default.")] = None,
    namespace: Namespace = None,
    context: Context = None,
    watch: Annotated[bool, typer.Option(help="Show the progress until the run ends.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show where runs are."""
    from steersman.cli.shapes import RunState, print_json

    if as_json and watch:
        raise ConfigError("--json is one line about now, --watch tells until the run ends; give one of them")
    cluster = connect(context, namespace)
    if as_json:
        print_json([RunState.of(run) for run in ([cluster.get(name)] if name else cluster.list())])
        return
    if name is None:
        for run in cluster.list():
            typer.echo(summary(run))
        return
    if watch:
        raise _followed(cluster, name)
    typer.echo(describe(cluster.get(name)))


@app.command()
def logs(
    name: Name,
    stage: Annotated[str | None, typer.Argument(help="Stage; the running or failed one by default.")] = None,
    namespace: Namespace = None,
    context: Context = None,
    lines: Annotated[int, typer.Option(min=1, help="How many of the last lines.")] = 200,
) -> None:
    """Show the end of a stage's log."""
    cluster = connect(context, namespace)
    chosen = stage or (cluster.get(name).get("status") or {}).get("stage")
    if chosen is None:
        raise NotFoundError(f"{name} has not begun a stage yet; see steersman status {name}")
    typer.echo(cluster.logs(name, chosen, lines).rstrip("\n"))


@app.command()
def cancel(name: Name, namespace: Namespace = None, context: Context = None) -> None:
    """End a run: its Jobs stop, a canary is taken back; what is written stays."""
    connect(context, namespace).annotate(name, {"steersman.dev/cancel": "true"})
    typer.echo(f"{name}: asked to stop")


def summary(run: dict[str, Any]) -> str:
    """One line about a run."""
    state = run.get("status") or {}
    parts = [run["metadata"]["name"], state.get("phase", "Pending")]
    if state.get("stage"):
        steps = f" {state['step']}/{state['totalSteps']}" if "totalSteps" in state else ""
        parts.append(f"{state['stage']}{steps}")
    parts += [f"{key} {state[key]:.3g}" for key in ("reward", "kl") if key in state]
    return "  ".join([*parts, state.get("message", "")]).rstrip()


def describe(run: dict[str, Any]) -> str:
    """Everything that the status says, for people."""
    state = run.get("status") or {}
    lines = [summary(run)]
    for condition in state.get("conditions", []):
        held = condition["type"] == "Progressing" and condition["status"] == "False"
        if held and state.get("phase") not in (*ENDED, "Suspended"):
            lines.append(f"  held up since {condition['lastTransitionTime']}: {condition['reason']}")
    for stage in state.get("stages", []):
        reason = f"  {stage['reason']}, {stage.get('attempts', 0)} failed pods" if "reason" in stage else ""
        lines.append(f"  {stage['name']:<24}{stage['phase']}{reason}")
    release = state.get("release")
    if release:
        outcome = release.get("decision") or f"{release['percent']}% of the traffic"
        lines.append(f"  release {release['model']}: {outcome} {release.get('reason') or ''}".rstrip())
        evidence = release.get("evidence") or {}
        for who in ("champion", "candidate"):
            seen = evidence.get(who) or {}
            if seen.get("requests") or seen.get("judged"):
                lines.append(
                    f"    {who:<10}{seen['requests']:.0f} requests, {seen['errors']:.0f} failed, "
                    f"{seen['slow']:.0f} slow; {seen['judged']:.0f} judged, {seen['bad']:.0f} with a thumb down"
                )
    failed = next((stage for stage in state.get("stages", []) if stage.get("log")), None)
    if failed:
        lines += ["", f"The end of {failed['name']}'s log:", failed["log"]]
    return "\n".join(lines)


def follow(cluster: Cluster, name: str, show: Callable[[str], None], seconds: float = 2.0) -> dict[str, Any]:
    """Shows the line of a run whenever it changes, until it ends; returns its status then."""
    last = ""
    while True:
        run = cluster.get(name)
        line = summary(run)
        if line != last:
            show(line)
            last = line
        state: dict[str, Any] = run.get("status") or {}
        if state.get("phase") in ENDED:
            return state
        time.sleep(seconds)


def _followed(cluster: Cluster, name: str) -> typer.Exit:
    """What `--watch` ends with: 0 when the run succeeded."""
    return typer.Exit(0 if follow(cluster, name, typer.echo)["phase"] == "Succeeded" else 1)


def _container_with_log(pod: Any) -> str | None:
    """The stage's container once it has begun, before that the one that prepares; None: the API server may choose."""
    started = [
        status.name
        for statuses in (pod.status.init_container_statuses, pod.status.container_statuses)
        for status in statuses or []
        if status.state and (status.state.running or status.state.terminated)
    ]
    return started[-1] if started else None


def _reason(error: Any) -> str:
    """The message of the API server's Status, or the HTTP reason."""
    import json

    try:
        return str(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError):
        return f"{error.status} {error.reason}"
