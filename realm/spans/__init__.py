"""Salient spans: taggers and a cache of their results."""
