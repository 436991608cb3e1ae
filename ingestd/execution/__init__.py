"""Running batches: lanes (one worker each), the pool that hands jobs to them, and retry."""
