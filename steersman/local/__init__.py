"""Runs on this machine: stages and services as child processes that cannot outlive their parent."""
