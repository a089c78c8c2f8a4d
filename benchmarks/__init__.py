"""Peers and our own parts compute on the OpenMP runtime of services and stages."""

from steersman.openmp import prefer_yielding_threads

prefer_yielding_threads()
