"""Code that runs in a worker: loads the handler, decodes records, calls it, reports outcomes.

Imports nothing but `ingestd.base`, msgspec and the standard library, so a child process starts
in a few hundredths of a second. The way of a job: `load` (once a worker), `call`, `close`.
"""
