"""Checkpoints of a run: what is written, in which order, and how a run resumes.

A checkpoint is whole or absent: ``writing.py`` fixes the order of the writes, ``verify.py`` what is
checked. Checkpoints of earlier versions stay readable, so a new entry of the state has a default.
"""
