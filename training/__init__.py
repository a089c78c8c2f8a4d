"""Training: stages of a run as clients of the services."""

RANKS_FILE = "STEERSMAN_RANKS_FILE"
"""Environment variable with the file through which the ranks of one machine meet; `training.ranks` sets it."""
