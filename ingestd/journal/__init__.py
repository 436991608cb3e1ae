"""Journals: durable stores of accepted records until they are settled. Start at `interface`."""
