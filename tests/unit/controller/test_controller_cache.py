"""Lists are asked for when something changed, and only then."""

from __future__ import annotations

import pytest
from fake_kube import FakeKube, alignment_run

from services.controller.cache import LOG_SECONDS, REFRESH_SECONDS, CachedKube


class Counting(FakeKube):
    lists = 0
    logs_read = 0

    async def list(self, *arguments):
        self.lists += 1
        return await super().list(*arguments)

    async def pod_log(self, *arguments):
        self.logs_read += 1
        return await super().pod_log(*arguments)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def kube() -> Counting:
    return Counting()


async def test_a_list_is_asked_for_again_after_a_change_and_after_a_while(kube):
    clock = Clock()
    cached = CachedKube(kube, clock)  # type: ignore[arg-type]
    kube.put(alignment_run())
    for _ in range(3):
        assert [run["metadata"]["name"] for run in await cached.list("AlignmentRun", "ml")] == ["demo"]
    assert kube.lists == 1
    kube.put(alignment_run("other", uid="2"))
    cached.changed("AlignmentRun", "ml")  # a watch told it
    assert len(await cached.list("AlignmentRun", "ml")) == 2
    assert kube.lists == 2
    await cached.patch("AlignmentRun", "ml", "demo", {"spec": {"suspend": True}})
    runs = {run["metadata"]["name"]: run for run in await cached.list("AlignmentRun", "ml")}
    assert runs["demo"]["spec"]["suspend"] is True, "our own write is seen at once"
    clock.now += REFRESH_SECONDS
    await cached.list("AlignmentRun", "ml")
    assert kube.lists == 4
    await cached.list("Event", "ml")
    await cached.list("Event", "ml")
    assert kube.lists == 6, "kinds that nobody watches are always asked for"


async def test_what_changes_during_a_list_makes_it_stale(kube):
    cached = CachedKube(kube, Clock())  # type: ignore[arg-type]
    real = kube.list

    async def slow(*arguments):
        found = await real(*arguments)
        cached.changed("Job", "ml")
        return found

    kube.list = slow  # type: ignore[method-assign]
    await cached.list("Job", "ml")
    kube.list = real  # type: ignore[method-assign]
    before = kube.lists
    await cached.list("Job", "ml")
    assert kube.lists == before + 1


async def test_labels_are_matched_and_nobody_can_change_what_is_kept(kube):
    cached = CachedKube(kube, Clock())  # type: ignore[arg-type]
    for name in ("a", "b"):
        labels = {"steersman.dev/run": name, "steersman.dev/stage": "rl"}
        kube.put({"kind": "Pod", "metadata": {"name": name, "namespace": "ml", "labels": labels}})
    kube.put({"kind": "Pod", "metadata": {"name": "of-somebody-else", "namespace": "ml", "labels": {}}})
    found = await cached.list("Pod", "ml", "steersman.dev/run=a,steersman.dev/stage=rl")
    assert [pod["metadata"]["name"] for pod in found] == ["a"]
    found[0]["metadata"]["labels"].clear()
    assert len(await cached.list("Pod", "ml", "steersman.dev/run=a")) == 1
    assert kube.lists == 1


async def test_the_end_of_a_log_is_read_every_few_seconds(kube):
    clock = Clock()
    cached = CachedKube(kube, clock)  # type: ignore[arg-type]
    kube.logs["p"] = "one"
    assert [await cached.pod_log("ml", "p", 5) for _ in range(3)] == ["one"] * 3
    assert kube.logs_read == 1
    clock.now += LOG_SECONDS
    kube.logs["p"] = "two"
    assert await cached.pod_log("ml", "p", 5) == "two"
