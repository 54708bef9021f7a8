"""``python -m pypkg.bench``: operators, training step and data tools, timed beside their peers."""
