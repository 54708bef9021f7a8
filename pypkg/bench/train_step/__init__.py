"""Benchmark of the whole training step beside other frameworks.

Each baseline runs in a process of its own (``worker.py``) from the same weights and batches. A new
baseline is a row of ``baselines.py`` and a function of ``worker.py``.
"""
