"""Where records come in: `http` and `stdin`. A source checks, bounds and counts them."""
