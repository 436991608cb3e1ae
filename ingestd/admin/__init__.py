"""The admin server: health, readiness, metrics and status."""
