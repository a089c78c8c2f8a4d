"""Kubernetes operator: AlignmentRun -> Jobs, gate, canary, rollback."""
