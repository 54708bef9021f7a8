"""``python -m pypkg.bench``: operators, training steps and data tools, timed against baselines.

A room for each suite. ``timing.py`` and ``environment.py`` serve them all, ``report`` renders their
results. Benchmarks may import the whole package, and nothing imports them.
"""
