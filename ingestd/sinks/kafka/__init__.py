"""The sink `kafka`: `sink` produces batches, `message` makes messages, `ledger` knows batches."""
