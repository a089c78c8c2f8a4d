"""Seeded random faults against the real processes: `make chaos`; a few seeds are part of the tests."""
