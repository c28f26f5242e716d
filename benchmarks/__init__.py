"""Benchmarks: one file an operator, one a model; report.py draws tables and rooflines."""
