"""Runs: configuration, run folder, and the models that stages start from."""
