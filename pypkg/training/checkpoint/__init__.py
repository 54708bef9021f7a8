"""Checkpoints of a run: what is written, in which order, and how a run resumes."""
