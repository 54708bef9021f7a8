"""Weights: initial values, tensor-parallel shards, model folders and file formats.

Only ``initialization.py`` uses Paddle. Names and layouts of a family's weights are in
``architecture/families``. A new kind of matrix needs a row in ``tp_shards.py``.
"""
