"""Benchmarks: the speed and the quality of fastbert, measured on your machine.

Each folder says what it measures. `python -m benchmarks` runs everything that needs no GPU, `check`
compares a run with the results on record, and `figures` fills the pages from them.
"""
