"""Benchmark of the whole training step beside other frameworks."""
