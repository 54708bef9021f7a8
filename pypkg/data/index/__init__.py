"""Index maps of a corpus (PaddleNLP's sample order) and their cache on disk.

``maps.py`` defines the order. Every checkpoint refers to it, so it does not change; tests compare
it with PaddleNLP's.
"""
