"""Saving and loading checkpoints, beside the rate of the disk."""
