"""Checkpoints of a run: what is written, in which order, and how a run resumes.

A checkpoint is complete or absent: ``writing.py`` defines the order of the writes, ``verify.py``
the checks. Checkpoints of earlier versions stay readable, so a new entry of the state must have a
default.
"""
