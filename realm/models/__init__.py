"""Retriever, reader, and the module that each stage trains."""
