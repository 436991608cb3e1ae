"""Execution of batches: workers, the pool that hands jobs to them, and retries."""
