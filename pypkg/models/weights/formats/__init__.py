"""Formats of weight files. Each module locates tensors in a file; ``stored_tensor`` reads them.

A new format is a module here and its place in ``tensor_files.py``. No pickle is executed, and
reading holds one tensor at a time.
"""
