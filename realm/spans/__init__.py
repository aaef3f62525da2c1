"""Salient spans: taggers and their cache."""
