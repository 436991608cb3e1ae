"""Chunks in, batches out: exact to the record."""
