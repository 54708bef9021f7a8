"""``python -m pypkg.bench``: operators, training steps and data tools, timed against baselines."""
