"""Steersman: from human feedback to a chatbot that answers the way people prefer.

This package is the shared core. It imports no torch and neither `services` nor `training`.
"""

__version__ = "0.1.0"

from steersman.home import settle

settle()  # before any library looks for the user's name or home
