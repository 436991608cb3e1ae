"""The durable store of what is accepted and not yet done. Start at `interface`."""
