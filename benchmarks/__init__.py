"""Benchmarks: the speed and the quality of fastbert, measured on your machine."""
