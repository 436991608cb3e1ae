"""How fast is ingestd, beside what people write by hand? `python -m benchmarks`.

Read `measure.py` first: it is one measurement, top to bottom. `README.md` says what is counted.
"""
