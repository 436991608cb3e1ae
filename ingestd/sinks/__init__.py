"""Sinks: handlers that come with ingestd and write outward. They run where any handler runs."""
