"""``python -m pypkg.bench``: operators and the training step, timed beside their peers."""
