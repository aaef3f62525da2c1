"""Retriever, reader, training objectives, and the module and batches of each training stage."""
