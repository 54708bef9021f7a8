"""Documents of the input: files found and divided into units, and a reader for each format.

A new input format is a reader here and its suffix in ``files.py``. Nothing here knows tokens.
"""
