"""Text to wordpieces, blocks and padded inputs."""
