"""Tokenization, splitting into blocks, and padded model inputs."""
