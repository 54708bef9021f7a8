"""Finished corpora: reading, writing, checking, merging and splitting ``.bin/.idx`` pairs.

The byte layout is described in ``files.py``; only ``writer.py`` and ``merge_split.py`` write.
"""
