"""Where records come in: `http`, `stdin` and `fetch`. A source checks, bounds and counts them."""
