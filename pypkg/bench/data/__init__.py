"""Benchmarks of the data tools: index maps, loading, preprocessing, with baselines."""
