"""What every room may import: records, errors, settings, clock, signals, telemetry."""
