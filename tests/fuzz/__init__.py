"""Fuzz tests of everything that reads what a user wrote: see `tests.fuzz.targets`."""
