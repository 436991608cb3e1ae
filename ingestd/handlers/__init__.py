"""What runs in a worker: load the handler, decode its records, call it, say what became of them.

Imports nothing but `ingestd.base`, msgspec and the standard library, so a child process starts
in a few hundredths of a second. The way of a job: `load` (once a worker), `call`, `close`.
"""
