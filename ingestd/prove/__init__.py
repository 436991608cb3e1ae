"""The proof on a machine of one's own: a real daemon, killed at random, and what it kept.

`prover` starts the daemon (`victim`) again and again and kills it when the `plan` says so, while
`clients` post numbered records. What was sent is written down (`progress`), and in the end held
against the rows of the sink (`verdict`).
"""
