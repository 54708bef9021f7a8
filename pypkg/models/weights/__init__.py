"""Weights: initial values, tensor-parallel shards, model folders and file formats.

Only ``initialization.py`` uses Paddle. Names and layouts of a family's
weights are in ``architecture/families``; a new kind of matrix is a row of ``tp_shards.py``.
"""
