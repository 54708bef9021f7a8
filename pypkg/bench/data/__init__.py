"""Benchmarks of the data tools: index maps, loading, preprocessing, with baselines.

A module for each suite. A baseline that needs other packages runs in a Python of its own.
"""
