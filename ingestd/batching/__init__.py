"""Batching: chunks to batches, exact to the record."""
