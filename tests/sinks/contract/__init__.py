"""The contract of a sink: one suite (`test_contract.py`) that each sink passes with its adapter."""
