"""Proof of durability: a real daemon is killed at random, and the records that it kept are counted.

`prover` starts the daemon again and again and kills it as `plan` decides, while `clients` post
numbered records. The outcomes are kept in a file (`progress`), and in the end compared with the
rows of the sink (`verdict`).
"""
