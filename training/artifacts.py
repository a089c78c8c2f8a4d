"""Where stages find the writers of artifacts; they live in the core because services write folders as well."""

from steersman.artifacts import atomic_dir, manifest_of_hashes, storage_errors, verify

__all__ = ["atomic_dir", "manifest_of_hashes", "storage_errors", "verify"]
