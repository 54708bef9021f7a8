"""Saving and loading checkpoints, beside the rate of the disk.

``worker.py`` is a rank of the run that is timed; ``torch_worker.py`` is the baseline and imports
torch alone.
"""
