"""Benchmarks of single operators: cases, frameworks of the baselines, limits, accuracy."""
