"""Fakes and transports for tests of code that stands on Steersman."""
