"""Hostile input to everything that reads: `make fuzz`; a short run of it is part of the tests."""
