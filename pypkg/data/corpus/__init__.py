"""Finished corpora: reading, writing, checking, merging and splitting ``.bin/.idx`` pairs.

``files.py`` describes the byte layout. Only ``writer.py`` and ``merge_split.py`` write.
"""
