"""Foundations that every package imports: records, errors, clock, logging, metrics."""
