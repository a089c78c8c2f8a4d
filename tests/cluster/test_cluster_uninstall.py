"""The end of the installation that the modules before this one share."""

from __future__ import annotations

import pytest
from cluster_lab import until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]


def test_uninstalling_removes_everything(installed):
    """Last: the release goes, and with `keep` off the CRD and the volumes as well."""
    # Without kube-controller-manager nothing lets go of a claim that is deleted, or deletes what is owned.
    installed.helm("uninstall", installed.release, *(["--wait"] if installed.controllers else []))
    kinds = "deployments,services,configmaps,serviceaccounts,networkpolicies,roles,rolebindings,persistentvolumeclaims"
    selector = f"app.kubernetes.io/instance={installed.release}"
    left = [
        item["metadata"]["name"]
        for item in installed.list(kinds, selector)
        if installed.controllers or "deletionTimestamp" not in item["metadata"]
    ]
    assert left == [f"{installed.release}-steersman-database"], "the database alone stays until it is deleted by hand"
    until(
        lambda: (
            installed.kubectl("get", "crd", "alignmentruns.steersman.dev", check=False, namespaced=False).returncode
        ),
        60,
        "the CRD stays",
    )
