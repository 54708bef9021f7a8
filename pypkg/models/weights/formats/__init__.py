"""Formats of weight files. Each module locates tensors in a file; ``stored_tensor`` reads them.

A new format is a module here and an entry in ``tensor_files.py``. No pickle is executed, and only
one tensor at a time is in memory.
"""
