"""An HTTP server that knows nothing of records."""
