"""The sink `postgres`: `sink` writes batches, `server` knows PostgreSQL, `rows` makes rows."""
